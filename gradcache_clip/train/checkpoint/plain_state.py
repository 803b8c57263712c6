"""The state of a run as JSON and tensors: nothing in it can name code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_TENSOR = "$tensor"


def split_state(value: Any, tensors: dict[str, Tensor], name: str = "state") -> Any:
    """The same nest for JSON, with the name of each tensor in its place.

    Args:
        value: dicts with text as keys, lists, tuples (which become lists), tensors, numbers, text,
            booleans and None.
        tensors: gets the tensors.
        name: where `value` is.

    Raises:
        ValueError: anything else, with its place.
    """
    if isinstance(value, Tensor):
        _check_dense(value, name)
        tensors[name] = value.detach()
        return {_TENSOR: name}
    if isinstance(value, Mapping):
        for key in value:
            _check_key(key, name)
        return {k: split_state(each, tensors, f"{name}[{k!r}]") for k, each in value.items()}
    if type(value) in (list, tuple):
        return [split_state(e, tensors, f"{name}[{place}]") for place, e in enumerate(value)]
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise ValueError(
        f"{name}: expected tensors, numbers, text, None, lists or dicts, got {describe(value)}; "
        "convert it (an array with torch.from_numpy, a NumPy number with .item()): checkpoints "
        "hold no pickled objects"
    )


def _check_key(key: Any, name: str) -> None:
    if type(key) is not str or key.startswith("$"):
        raise ValueError(
            f"a key of {name}: expected text that starts with no $, got {key!r} "
            f"({describe(key)}); rename it"
        )


def _check_dense(value: Tensor, name: str) -> None:
    if value.layout != torch.strided or value.is_meta:
        raise ValueError(
            f"{name}: expected a dense tensor with data, got {describe(value)}; make it dense"
        )


def joined_state(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `split_state` was given."""
    if isinstance(value, list):
        return [joined_state(each, tensors) for each in value]
    if isinstance(value, dict):
        if value.keys() == {_TENSOR}:
            return tensors[value[_TENSOR]]
        return {key: joined_state(each, tensors) for key, each in value.items()}
    return value


def describe(value: Any) -> str:
    kind = type(value)
    if isinstance(value, Tensor):
        return f"a {kind.__name__} with layout {value.layout} on {value.device}"
    return f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")
