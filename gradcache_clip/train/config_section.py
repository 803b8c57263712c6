"""Base class of configuration sections, and helpers to declare and check their keys."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Discriminator, Field, field_validator

from gradcache_clip.train.config_errors import ConfigError


class Section(BaseModel):
    """An immutable section with a default for each key; unknown keys are rejected."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        coerce_numbers_to_str=True,
        use_attribute_docstrings=True,
        validate_default=True,
    )

    @field_validator("*", mode="before")
    @classmethod
    def _as_written(cls, value: Any, info: Any) -> Any:
        kind = cls.model_fields[info.field_name].annotation
        if isinstance(value, bool) and kind in (int, float):
            # pydantic would take true as 1.
            raise ValueError("true and false are not numbers")
        if isinstance(value, str) and "\0" in value:
            raise ValueError("a null byte ends a path")
        # `validation:` without a value is null in YAML; it means the empty string here.
        return "" if value is None and kind is str else value


def changeable(default: Any, **bounds: Any) -> Any:
    """Declare a key that may change when a run is resumed; other keys must stay the same."""
    return Field(default, json_schema_extra={"changeable": True}, **bounds)


def discriminated_by(key: str, default: str) -> Discriminator:
    """Let a key of a section choose its class, as pydantic's discriminators do.

    Unlike pydantic's own, the key has a default and may be left out.
    """

    def tag(given: Any) -> Any:
        return given.get(key, default) if isinstance(given, dict) else getattr(given, key, None)

    return Discriminator(tag)


def expect(config: Section, key: str, expected: Any, setting: str) -> None:
    """Raise ConfigError unless `section.key` has the only value that another setting allows.

    Args:
        config: a whole configuration, or the section that contains the key.
        setting: the other setting, such as `loss.name=moco`.
    """
    section, name = key.split(".")
    got = getattr(getattr(config, section, config), name)
    if got != expected:
        wanted = str(expected).lower() if isinstance(expected, bool) else repr(expected)
        shown = str(got).lower() if isinstance(got, bool) else repr(got)
        raise ConfigError(
            f"{key}: expected {wanted} with {setting}, got {shown}; change one of the two"
        )
