"""Turns pydantic's errors into one line: key, expected, got, remedy."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

Model = TypeVar("Model", bound=BaseModel)

_EXPECTED_TYPE: dict[Any, str] = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "text",
    list[int]: "a list of integers such as [1, 5, 10]",
    list[str]: "a list such as [a, b]",
    dict[str, Any]: "a mapping such as {depth: 4}",
}
_BOUNDS = {
    "greater_than": ("more than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
}
_RENAMED = {
    "data.views": "program",
    "distributed.engine": "distributed.strategy",
    "evaluation.neighbours": "evaluation.knn_k",
    "train.inputs": "train.batch_device",
    "train.negatives": "train.grad_cache",
}


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names the key and the remedy."""


class UnknownKeyError(ConfigError):
    """A key that the configuration does not have: `keys` are its parts."""

    def __init__(self, message: str, keys: Sequence[str]) -> None:
        super().__init__(message)
        self.keys = keys


def checked(schema: type[Model], values: Mapping[str, Any]) -> Model:
    """Build and validate a configuration.

    Raises:
        ConfigError: an unknown key, or a value of the wrong type or out of range.
    """
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise _explained(schema, values, error.errors()[0]) from error


def classes_of(schema: type[BaseModel], section: str) -> list[type[BaseModel]]:
    """Return the possible classes of a section: several if one of its keys chooses."""
    field = schema.model_fields.get(section)
    return [] if field is None else [*_classes_in(field.annotation)]


def field_of(schema: type[BaseModel], keys: Sequence[str]) -> FieldInfo | None:
    """Return the declaration of `section.key`, or of a longer key; None if there is none."""
    first, *rest = keys
    field = schema.model_fields.get(first)
    if field is None or not rest:
        return field
    found = (field_of(kind, rest) for kind in _classes_in(field.annotation))
    return next((each for each in found if each is not None), None)


def _classes_in(annotation: Any) -> Iterator[type[BaseModel]]:
    origin = get_origin(annotation)
    if origin in (Annotated, Union, types.UnionType):
        for part in get_args(annotation):
            yield from _classes_in(part)
    # In Python 3.10 dict[str, Any] passes for a type.
    elif origin is None and isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation


def _explained(schema: type[BaseModel], values: Mapping[str, Any], error: Any) -> ConfigError:
    cause = error.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):
        return cause
    keys = _keys_of(schema, error["loc"])
    name = ".".join(keys)
    if error["type"] == "extra_forbidden":
        message = f"{name}: no such key{_hint_for_unknown_key(schema, keys, values)}"
        return UnknownKeyError(message, keys)
    if error["type"] in ("model_type", "model_attributes_type"):
        got = type(error["input"]).__name__
        return ConfigError(
            f"{name}: expected keys with values, got {got}; indent them below the section's name"
        )
    if error["type"] == "union_tag_invalid":
        name = f"{name}.{'architecture' if name == 'model' else 'name'}"
        got, expected = error["ctx"]["tag"], error["ctx"]["expected_tags"].replace("'", "")
        return _change(name, f"one of {expected}", got)
    return _change(name, _expected(field_of(schema, keys), error), error["input"])


def _change(name: str, expected: str, got: Any) -> ConfigError:
    return ConfigError(
        f"{name}: expected {expected}, got {got!r}; change it in the config or with {name}=VALUE"
    )


def _keys_of(schema: type[BaseModel], location: Sequence[Any]) -> list[str]:
    """Return the keys of an error's location, without pydantic's class names and list indices."""
    section, *rest = location
    if len(classes_of(schema, section)) > 1:
        rest = rest[1:]
    keys = [str(section), *(part for part in rest if isinstance(part, str))]
    # Inside a free-form mapping, such as image_kwargs, name the mapping.
    while len(keys) > 2 and field_of(schema, keys[:-1]) is not None:
        inner = field_of(schema, keys[:-1])
        if inner is not None and [*_classes_in(inner.annotation)]:
            break
        keys.pop()
    return keys


def _expected(field: FieldInfo | None, error: Any) -> str:
    kind, context = error["type"], error.get("ctx", {})
    if kind in _BOUNDS:
        words, bound = _BOUNDS[kind]
        limit = context[bound]
        return f"{words} {limit:,}" if isinstance(limit, int) else f"{words} {limit:g}"
    if kind == "string_too_short":
        return "some text"
    if kind == "literal_error":
        return "one of " + context["expected"].replace(" or ", ", ").replace("'", "")
    if isinstance(error["input"], str) and "\0" in error["input"]:
        return "text without null bytes"
    declared: Any = field.annotation if field else None
    return _EXPECTED_TYPE.get(declared, "another value")


def _hint_for_unknown_key(
    schema: type[BaseModel], keys: Sequence[str], values: Mapping[str, Any]
) -> str:
    """Say which key was meant, or under which setting the key does not exist."""
    name = ".".join(keys)
    if name in _RENAMED:
        return f"; it is called {_RENAMED[name]} now, see docs/training.md"
    if field_of(schema, keys) is not None:
        section = values[keys[0]]
        decides = "architecture" if keys[0] == "model" else "name"
        return f" with {keys[0]}.{decides}={section.get(decides, 'the default')}; leave it out"
    return f"; {_hint(schema, keys)}"


def _hint(schema: type[BaseModel], keys: Sequence[str]) -> str:
    section, dot, rest = keys[0].partition(".")
    if dot and field_of(schema, [section, rest]) is not None:
        return f"a file nests its keys: write {rest!r} indented below '{section}:'"
    parents = list(keys[:-1])
    here = [".".join([*parents, name]) for name in _names(schema, parents)]
    deeper = [] if parents else [f"{s}.{name}" for s in here for name in _names(schema, [s])]
    last = {name: name.rpartition(".")[2] for name in (*here, *deeper)}
    near = difflib.get_close_matches(keys[-1], last.values(), n=1, cutoff=0.5)
    if near:
        return f"did you mean {next(name for name in last if last[name] == near[0])}?"
    return f"keys are {', '.join(last[name] for name in here)}"


def _names(schema: type[BaseModel], parents: Sequence[str]) -> list[str]:
    """Return the keys of a section, over all its possible classes."""
    if not parents:
        return [*schema.model_fields]
    field = field_of(schema, parents)
    classes = [] if field is None else [*_classes_in(field.annotation)]
    return [*dict.fromkeys(name for kind in classes for name in kind.model_fields)]
