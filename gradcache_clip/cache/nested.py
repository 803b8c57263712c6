"""Nested inputs: their number of rows, and the rows of one chunk.

Tensors and NumPy arrays are cut along dimension 0, lists hold one sample an element, and mappings,
tuples and dataclasses are containers that are looked into. Anything else reaches every chunk whole.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from torch import Tensor


def count_rows(inputs: Any, name: str) -> int:
    """Number of rows that every tensor and list inside `inputs` agrees on.

    Raises:
        ValueError: nothing in `inputs` has rows, or two of its parts disagree.
    """
    parts = list(_parts_with_rows(inputs, name))
    if not parts:
        raise ValueError(
            f"{name}: expected tensors or lists with one row a sample, got a "
            f"{type(inputs).__name__} without any; pass a batch, such as a (B, ...) tensor, a dict "
            "of tensors or a list of strings"
        )
    (first, rows), *others = parts
    if rows == 0:
        raise ValueError(f"{first}: expected at least one row, got none; pass a batch")
    for path, other in others:
        if other != rows:
            raise ValueError(
                f"{name}: expected the same number of rows everywhere, got {rows} in {first} "
                f"and {other} in {path}; expand what is shared to one row a sample"
            )
    return rows


def take_rows(inputs: Any, start: int, stop: int) -> Any:
    """Rows start to stop of everything inside `inputs`; tensors come back as views."""
    if _has_rows(inputs):
        return inputs[start:stop]
    return _map_children(inputs, lambda child: take_rows(child, start, stop))


def chunk_of(inputs: Any, rows: slice | Tensor, trim: tuple[int, int] | None) -> Any:
    """The rows of one chunk; with trim=(full, kept), `kept` columns of tensors that have `full`."""
    if isinstance(rows, slice):
        taken = take_rows(inputs, rows.start, rows.stop)
    else:
        taken = pick_rows(inputs, rows)
    return taken if trim is None else map_tensors(lambda x: _narrow(x, *trim), taken)


def pick_rows(inputs: Any, indices: Tensor) -> Any:
    """Rows of everything inside `inputs` in the order of `indices`; tensors come back as copies."""
    if isinstance(inputs, list):
        return [inputs[index] for index in indices.tolist()]
    if _has_rows(inputs):
        is_tensor = isinstance(inputs, Tensor)
        return inputs[indices.to(inputs.device) if is_tensor else indices.numpy()]
    return _map_children(inputs, lambda child: pick_rows(child, indices))


def _narrow(tensor: Tensor, full: int, kept: int) -> Tensor:
    return tensor[:, :kept] if tensor.ndim > 1 and tensor.shape[1] == full else tensor


def tensors_in(inputs: Any) -> Iterator[Tensor]:
    """Every tensor inside `inputs`, those in lists included."""
    if isinstance(inputs, Tensor):
        yield inputs
        return
    children = enumerate(inputs) if isinstance(inputs, list) else _children(inputs)
    for _, child in children:
        yield from tensors_in(child)


def map_tensors(function: Callable[[Tensor], Tensor], nested: Any) -> Any:
    """`nested` with every tensor inside it, those in lists included, replaced by its image."""
    if isinstance(nested, Tensor):
        return function(nested)
    if isinstance(nested, list):
        return [map_tensors(function, child) for child in nested]
    return _map_children(nested, partial(map_tensors, function))


def _parts_with_rows(inputs: Any, path: str) -> Iterator[tuple[str, int]]:
    if _has_rows(inputs):
        yield path, len(inputs)
        return
    if isinstance(inputs, tuple) and inputs and all(isinstance(part, str) for part in inputs):
        raise ValueError(
            f"{path}: expected a list of strings, got a tuple, which stands for several "
            "arguments; pass list(texts)"
        )
    for key, child in _children(inputs):
        yield from _parts_with_rows(child, f"{path}[{key!r}]")


def _has_rows(inputs: Any) -> bool:
    """Lists, and tensors and NumPy arrays that are no scalars."""
    is_array = isinstance(inputs, Tensor) or type(inputs).__module__ == "numpy"
    return isinstance(inputs, list) or (is_array and getattr(inputs, "ndim", 0) > 0)


def _is_dataclass(inputs: Any) -> bool:
    return dataclasses.is_dataclass(inputs) and not isinstance(inputs, type)


def _children(inputs: Any) -> list[tuple[Any, Any]]:
    if isinstance(inputs, Mapping):
        return list(inputs.items())
    if isinstance(inputs, tuple):
        return list(enumerate(inputs))
    if _is_dataclass(inputs):
        return [(field.name, getattr(inputs, field.name)) for field in dataclasses.fields(inputs)]
    return []


def _map_children(inputs: Any, function: Callable[[Any], Any]) -> Any:
    if isinstance(inputs, tuple):
        children = [function(child) for child in inputs]
        return type(inputs)(*children) if hasattr(inputs, "_fields") else tuple(children)
    pairs = _children(inputs)
    if not pairs:
        return inputs
    # A shallow copy keeps the class (BatchEncoding, a frozen dataclass) and all that is not a part.
    copied = copy.copy(inputs)
    for key, child in pairs:
        if isinstance(inputs, Mapping):
            copied[key] = function(child)
        else:
            object.__setattr__(copied, key, function(child))
    return copied
