"""What the sections of every configuration have in common."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Discriminator, Field, field_validator

from gradcache_clip.train.config_errors import ConfigError


class Section(BaseModel):
    """Keys with defaults; unknown ones are refused, and values stay as they were checked."""

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
            raise ValueError("true and false are no numbers")
        # `validation:` with nothing behind it is YAML's null, and means the empty text.
        return "" if value is None and kind is str else value


def changeable(default: Any, **bounds: Any) -> Any:
    """A key that may have another value when a run is resumed; any other makes another run."""
    return Field(default, json_schema_extra={"changeable": True}, **bounds)


def discriminated_by(key: str, default: str) -> Discriminator:
    """A key of a section decides which class the section is of."""

    def tag(given: Any) -> Any:
        return given.get(key, default) if isinstance(given, dict) else getattr(given, key, None)

    return Discriminator(tag)


def expect(config: Section, key: str, expected: Any, beside: str) -> None:
    """Raise ConfigError unless `section.key` has the one value that another setting allows.

    Args:
        config: a whole configuration, or the section that the key is of.
        beside: that setting, such as `loss.name=moco`.
    """
    section, name = key.split(".")
    got = getattr(getattr(config, section, config), name)
    if got != expected:
        wanted = str(expected).lower() if isinstance(expected, bool) else repr(expected)
        shown = str(got).lower() if isinstance(got, bool) else repr(got)
        raise ConfigError(
            f"{key}: expected {wanted} with {beside}, got {shown}; change one of the two"
        )
