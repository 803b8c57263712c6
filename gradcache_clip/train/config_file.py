"""Configurations from YAML files and `section.key=value` overrides, and back to YAML."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gradcache_clip.train.config import Config
from gradcache_clip.train.config_errors import (
    ConfigError,
    UnknownKeyError,
    checked,
    field_of,
)
from gradcache_clip.train.programs import PROGRAMS, program_class

DEFAULT_PROGRAM = "pairs"

_PERMISSION = "allow_url_schemes"
_MOST_BYTES, _MOST_DEPTH, _MOST_ALIASES = 2**18, 16, 16

# Arguments of one model mean nothing to another.
_ARGUMENTS_OF = {"image": "image_kwargs", "text": "text_kwargs"}


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Any:
    """Merge defaults, a YAML file and `section.key=value` overrides, and validate the result.

    `program` determines the contents of the sections; see `gradcache_clip.train.programs`. An
    override replaces the file's value, also that of a mapping such as `model.image_kwargs`; a
    longer key such as `model.image_kwargs.depth=4` changes one entry. An override of `model.image`
    (`model.text`) drops the file's `image_kwargs` (`text_kwargs`). For a string key, the text after
    `=` is taken literally and may be empty: `data.train={000..099}.tar`.
    `data.allow_url_schemes` may be given by an override only.

    Raises:
        ConfigError: an unknown key (with the nearest valid name), a value of the wrong type or out
            of range, a missing file, or one that is not a YAML mapping. The message is one line.

    Example:
        >>> load_config(None, ["train.batch_size=4096"]).train.batch_size
        4096
    """
    given = _read_yaml(path)
    _check_permissions(given, path)
    schema = _schema(given, overrides)
    _apply(given, [_parse(override, schema) for override in overrides], schema)
    try:
        return checked(schema, _resolved(given))
    except UnknownKeyError as error:
        raise _of_another_program(error, schema) from error


def _of_another_program(error: UnknownKeyError, schema: type[Config]) -> ConfigError:
    """The same error, with the programs that have the key where this one has none like it."""
    schemas = {name: program_class(name).schema for name in PROGRAMS}
    found = [name for name, other in schemas.items() if field_of(other, error.keys) is not None]
    if not found or field_of(schema, error.keys) is not None:
        return error
    key, program = ".".join(error.keys), schema.model_fields["program"].default
    return ConfigError(
        f"{key}: no such key with program={program}; leave it out, or set program={found[0]}"
    )


def _check_permissions(given: dict[str, Any], path: str | Path | None) -> None:
    """Files may come from strangers: what may be opened is for the command line to say."""
    data = given.get("data")
    got = data.pop(_PERMISSION, None) if isinstance(data, dict) else None
    if got:
        raise ConfigError(
            f"data.{_PERMISSION}: expected on the command line alone, got {got!r} in {path}; "
            f"remove it there, and pass data.{_PERMISSION}=[https] (to evaluate: "
            "--allow-url-scheme https) with the schemes that you trust"
        )


def save_config(config: Config, path: str | Path) -> None:
    """Write the resolved configuration; `load_config(path)` gives it back, without permissions."""
    from omegaconf import OmegaConf

    content = config.model_dump()
    content["data"].pop(_PERMISSION, None)
    OmegaConf.save(OmegaConf.create(content), str(path))


def _schema(given: Mapping[str, Any], overrides: Sequence[str]) -> type[Config]:
    """Return the configuration class of the program; the last override wins."""
    asked = [text.partition("=")[2] for text in overrides if text.partition("=")[0] == "program"]
    name = [given.get("program", DEFAULT_PROGRAM), *asked][-1]
    if not isinstance(name, str) or name not in PROGRAMS:
        raise ConfigError(
            f"program: expected one of {', '.join(PROGRAMS)}, got {name!r}; "
            "change it in the config or with program=NAME"
        )
    schema: type[Config] = program_class(name).schema
    return schema


def _resolved(given: Mapping[str, Any]) -> dict[str, Any]:
    """Resolve every `${section.key}`."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        found: Any = OmegaConf.to_container(OmegaConf.create(dict(given)), resolve=True)
    except OmegaConfBaseException as error:
        name = re.split(r"[\[]", str(getattr(error, "full_key", None) or "config"))[0]
        got: Any = given
        for key in name.split("."):
            got = got.get(key) if isinstance(got, Mapping) else got
        raise ConfigError(
            f"{name}: expected ${{section.key}} to name a value of this config, got {got!r} "
            f"({_one_line(error)}); correct the name or write the value out"
        ) from error
    except RecursionError as error:
        raise ConfigError(
            "config: expected ${section.key} to end at a value, got a cycle; write the value out"
        ) from error
    return dict(found)


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
        what = "is no file" if Path(path).exists() else "does not exist"
        raise ConfigError(f"config: expected a YAML file, got {path}, which {what}; check the path")
    try:
        _check_size(Path(path))
        loaded = OmegaConf.to_container(OmegaConf.load(path))
    except (YAMLError, OmegaConfBaseException, ValueError, RecursionError, OSError) as error:
        if isinstance(error, ConfigError) or getattr(error, "filename", None):
            raise
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark else ""
        raise ConfigError(
            f"{path}: expected YAML, got an error{line}: {_one_line(error)}; correct that place"
        ) from error
    if not isinstance(loaded, dict):
        raise ConfigError(
            f"{path}: expected sections with keys, got {type(loaded).__name__}; write for instance "
            "'train:' and below it, indented, 'batch_size: 4096'"
        )
    return {str(key): value for key, value in loaded.items()}


def _check_size(path: Path) -> None:
    """Raise for a file that would grow or nest without end; no configuration does."""
    import yaml

    if path.stat().st_size > _MOST_BYTES:
        raise ConfigError(
            f"{path}: expected at most {_MOST_BYTES:,} bytes of YAML, got "
            f"{path.stat().st_size:,}; is this a configuration?"
        )
    depth = aliases = 0
    for event in yaml.parse(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.events.CollectionStartEvent)
        depth -= isinstance(event, yaml.events.CollectionEndEvent)
        aliases += isinstance(event, yaml.events.AliasEvent)
        if depth > _MOST_DEPTH or aliases > _MOST_ALIASES:
            raise ConfigError(
                f"{path}: expected at most {_MOST_DEPTH} levels and {_MOST_ALIASES} aliases, got "
                "more; write the values out"
            )


def _parse(override: str, schema: type[Config]) -> tuple[list[str], Any]:
    """Split `section.key=value` into keys and value."""
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
    field = field_of(schema, keys)
    if field is not None and field.annotation is str:
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


def _apply(
    given: dict[str, Any], overrides: Sequence[tuple[list[str], Any]], schema: type[Config]
) -> None:
    """Apply overrides to `given` in order; later ones win."""
    single = [pair for keys, value in overrides for pair in _each_key(keys, value)]
    _drop_other_models_arguments(given, single, schema)
    for keys, value in single:
        section = given
        for key in keys[:-1]:
            if not isinstance(section.get(key), dict):
                section[key] = {}
            section = section[key]
        section[keys[-1]] = value


def _each_key(keys: list[str], value: Any) -> list[tuple[list[str], Any]]:
    """Split an override of a whole section, which leaves the section's other keys alone."""
    whole = len(keys) == 1 and isinstance(value, dict)
    return [([*keys, key], value[key]) for key in value] if whole else [(keys, value)]


def _drop_other_models_arguments(
    given: dict[str, Any], overrides: Sequence[tuple[list[str], Any]], schema: type[Config]
) -> None:
    before = given.get("model")
    for model, arguments in _ARGUMENTS_OF.items():
        names = [value for keys, value in overrides if keys == ["model", model]]
        field = field_of(schema, ["model", model])
        if not names or field is None or not isinstance(before, dict):
            continue
        if names[-1] != before.get(model, field.default):
            before.pop(arguments, None)


def _one_line(error: Exception) -> str:
    """Return the first line of an error of OmegaConf or YAML; the others say where it was."""
    return str(getattr(error, "problem", None) or error).splitlines()[0]
