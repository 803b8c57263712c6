"""Configurations from YAML files and `section.key=value` overrides, and back to YAML."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import Field, fields, is_dataclass
from pathlib import Path
from typing import Any

from gradcache_clip.train.config import Config, ConfigError, ModelConfig

# A model's arguments say nothing to another model.
_ARGUMENTS_OF = {"image": "image_kwargs", "text": "text_kwargs"}
_EXPECTED = {
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "list[int]": "a list of integers such as [1, 5, 10]",
    "list[str]": "a list such as [a, b]",
    "dict[str, Any]": "a mapping such as {depth: 4}",
}


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Defaults, then the YAML file, then `section.key=value` overrides, checked as a whole.

    A value replaces the one before it, mappings such as `model.image_kwargs` too; a longer key
    such as `model.image_kwargs.depth=4` changes one entry. An override that changes `model.image`
    (`model.text`) drops the `image_kwargs` (`text_kwargs`) of the file. An empty value is the empty
    text where text is expected, and text is taken as it stands: `data.train={000..099}.tar`.

    Raises:
        ConfigError: an unknown key (with the nearest valid name), a value of the wrong type or
            outside its range, a file that is missing or no YAML mapping. The message is one line.

    Example:
        >>> load_config(None, ["train.batch_size=4096"]).train.batch_size
        4096
    """
    given = _read_yaml(path)
    _reject_unknown_keys(given, Config, "")
    _apply(given, [_parse(override) for override in overrides])
    return _resolve(given)


def save_config(config: Config, path: str | Path) -> None:
    """Write the resolved configuration; `load_config(path)` gives it back."""
    from omegaconf import OmegaConf

    OmegaConf.save(OmegaConf.structured(config), str(path))


def _resolve(given: Mapping[str, Any]) -> Config:
    """Typed and checked; OmegaConf converts values and looks up `${section.key}`."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), given))
    except OmegaConfBaseException as error:
        raise _value_error(error, given) from error
    except RecursionError as error:
        raise ConfigError(
            "config: expected ${section.key} to end at a value, got a circle; write the value out"
        ) from error
    assert isinstance(config, Config)
    return config


def _read_yaml(path: str | Path | None) -> dict[str, Any]:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    if path is None:
        return {}
    if Path(path).is_dir():
        raise ConfigError(
            f"config: expected a YAML file, got {path}, which is a directory; pass a file, "
            f"such as {Path(path) / 'config.yaml'}"
        )
    if not Path(path).is_file():
        raise ConfigError(
            f"config: expected a YAML file, got {path}, which does not exist; check the path"
        )
    try:
        loaded = OmegaConf.to_container(OmegaConf.load(path))
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark else ""
        raise ConfigError(
            f"{path}: expected YAML, got an error{line}: {_one_line(error)}; correct that place"
        ) from error
    sections = _as_mapping(loaded, str(path))
    return {
        key: _with_empty_texts(value, key) if isinstance(value, dict) else value
        for key, value in sections.items()
    }


def _with_empty_texts(keys: dict[str, Any], section: str) -> dict[str, Any]:
    """`validation:` with nothing behind it is YAML's null, and means the empty text."""
    return {
        key: "" if value is None and _type_of([section, key]) == "str" else value
        for key, value in keys.items()
    }


def _parse(override: str) -> tuple[list[str], Any]:
    """`section.key=value` to its keys and its value."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    name, separator, text = override.partition("=")
    keys = name.strip().split(".")
    if not separator or not all(keys):
        raise ConfigError(
            f"override: expected section.key=value, got {override!r}; "
            "write for instance train.batch_size=4096"
        )
    if _type_of(keys) == "str":
        return keys, _unquoted(text.strip())
    try:
        return keys, OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]
    except (YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(
            f"{name}: expected a YAML value, got {text!r} ({_one_line(error)}); "
            "close every bracket and quote"
        ) from error


def _unquoted(text: str) -> str:
    match = re.fullmatch(r"(['\"])(.*)\1", text, flags=re.DOTALL)
    return match[2] if match else text


def _apply(given: dict[str, Any], overrides: Sequence[tuple[list[str], Any]]) -> None:
    """Put overrides into `given`, in order; later ones win."""
    for keys, value in overrides:
        nested = value
        for key in reversed(keys):
            nested = {key: nested}
        _reject_unknown_keys(nested, Config, "")
    single = [pair for keys, value in overrides for pair in _each_key(keys, value)]
    _drop_other_models_arguments(given, single)
    for keys, value in single:
        place = given
        for key in keys[:-1]:
            if not isinstance(place.get(key), dict):
                place[key] = {}
            place = place[key]
        place[keys[-1]] = value


def _each_key(keys: list[str], value: Any) -> list[tuple[list[str], Any]]:
    """`train={steps: 5, seed: 1}` says nothing of the section's other keys."""
    return [([*keys, key], value[key]) for key in value] if len(keys) == 1 else [(keys, value)]


def _drop_other_models_arguments(
    given: dict[str, Any], overrides: Sequence[tuple[list[str], Any]]
) -> None:
    before = given.get("model", {})
    for model, arguments in _ARGUMENTS_OF.items():
        names = [value for keys, value in overrides if keys == ["model", model]]
        if names and names[-1] != before.get(model, getattr(ModelConfig, model)):
            before.pop(arguments, None)


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
            raise ConfigError(f"{prefix}{key}: no such key; {_hint(str(key), schema, prefix)}")
        section = _section(known[key])
        if section is not None:
            _reject_unknown_keys(value, section, f"{prefix}{key}.")


def _hint(key: str, schema: type, prefix: str) -> str:
    section, dot, rest = key.partition(".")
    if dot and not prefix and _type_of([section, rest]) is not None:
        return f"a file nests its keys: write {rest!r} indented below '{section}:'"
    near = difflib.get_close_matches(key, _all_keys(prefix, schema), n=1, cutoff=0.5)
    names = ", ".join(item.name for item in fields(schema))
    return f"did you mean {prefix}{near[0]}?" if near else f"keys are {names}"


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


def _type_of(keys: Sequence[str]) -> str | None:
    """The type of `section.key` as config.py writes it; None where there is no such field."""
    schema: Any = {item.name: _section(item) for item in fields(Config)}.get(keys[0])
    if schema is None or len(keys) != 2:
        return None
    return {item.name: str(item.type) for item in fields(schema)}.get(keys[1])


def _value_error(error: Exception, given: Mapping[str, Any]) -> ConfigError:
    """OmegaConf's error as one line: key, expected, got, remedy."""
    from omegaconf.errors import GrammarParseError, InterpolationResolutionError

    keys = re.split(r"[.\[]", str(getattr(error, "full_key", None) or "config"))[:2]
    name, section = ".".join(keys), given.get(keys[0])
    got = section.get(keys[-1]) if isinstance(section, Mapping) else section
    if isinstance(error, (GrammarParseError, InterpolationResolutionError)):
        return ConfigError(
            f"{name}: expected ${{section.key}} to name a value of this config, got {got!r} "
            f"({_one_line(error)}); correct the name or write the value out"
        )
    expected = _EXPECTED.get(_type_of(keys) or "", "another value")
    return ConfigError(
        f"{name}: expected {expected}, got {got!r}; change it in the config or with {name}=VALUE"
    )


def _one_line(error: Exception) -> str:
    """What OmegaConf or YAML complains of, without their further lines on where it was."""
    return str(getattr(error, "problem", None) or error).splitlines()[0]
