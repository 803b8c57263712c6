"""Configurations from YAML files and `section.key=value` overrides, and back to YAML."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import Field, fields, is_dataclass
from pathlib import Path
from typing import Any

from gradcache_clip.train.config import Config, ConfigError


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Defaults, then the YAML file, then `section.key=value` overrides, checked as a whole.

    Raises:
        ConfigError: an unknown key (with the nearest valid name), a value of the wrong type or
            outside its range, a file that is missing or no YAML mapping.

    Example:
        >>> load_config(None, ["train.batch_size=4096"]).train.batch_size
        4096
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    merged = OmegaConf.structured(Config)
    for source in (_read_yaml(path), _read_overrides(overrides)):
        _reject_unknown_keys(source, Config, "")
        try:
            merged = OmegaConf.merge(merged, source)
        except OmegaConfBaseException as error:
            key = getattr(error, "full_key", None) or "config"
            raise ConfigError(f"{key}: {str(error).splitlines()[0]}") from error
    config = OmegaConf.to_object(merged)
    assert isinstance(config, Config)
    return config


def save_config(config: Config, path: str | Path) -> None:
    """Write the resolved configuration; `load_config(path)` gives it back."""
    from omegaconf import OmegaConf

    OmegaConf.save(OmegaConf.structured(config), str(path))


def _read_yaml(path: str | Path | None) -> dict[str, Any]:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    if path is None:
        return {}
    if not Path(path).is_file():
        raise ConfigError(f"config: expected a YAML file, got {path}, which does not exist")
    try:
        loaded = OmegaConf.to_container(OmegaConf.load(path))
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: expected YAML, got an error while reading: {error}") from error
    return _as_mapping(loaded, str(path))


def _read_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    from omegaconf import OmegaConf

    for override in overrides:
        if "=" not in override:
            raise ConfigError(
                f"override: expected section.key=value, got {override!r}; "
                "write for instance train.batch_size=4096"
            )
    return _as_mapping(OmegaConf.to_container(OmegaConf.from_dotlist(list(overrides))), "override")


def _as_mapping(loaded: Any, name: str) -> dict[str, Any]:
    if not isinstance(loaded, dict):
        raise ConfigError(
            f"{name}: expected sections with keys, got {type(loaded).__name__}; "
            f"sections are {', '.join(item.name for item in fields(Config))}"
        )
    return loaded


def _reject_unknown_keys(given: Any, schema: type, prefix: str) -> None:
    known = {item.name: item for item in fields(schema)}
    for key, value in _as_mapping(given, prefix.rstrip(".") or "config").items():
        if key not in known:
            near = difflib.get_close_matches(str(key), _all_keys(prefix, schema), n=1, cutoff=0.5)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"keys are {', '.join(known)}"
            raise ConfigError(f"{prefix}{key}: no such key; {hint}")
        section = _section(known[key])
        if section is not None:
            _reject_unknown_keys(value, section, f"{prefix}{key}.")


def _all_keys(prefix: str, schema: type) -> list[str]:
    names = []
    for item in fields(schema):
        section = _section(item)
        names.append(item.name)
        if section is not None and not prefix:
            names.extend(f"{item.name}.{key.name}" for key in fields(section))
    return names


def _section(item: Field[Any]) -> type | None:
    factory = item.default_factory
    return factory if isinstance(factory, type) and is_dataclass(factory) else None
