"""Nested inputs: their number of rows, and the rows of one chunk.

Tensors, NumPy arrays and TensorDicts are cut along dimension 0, lists hold one sample an element,
and mappings, tuples and dataclasses are containers that are looked into. Numbers, strings,
functions, modules and `Shared` values reach every chunk whole. Anything else is refused: it may
hold the batch, which every chunk would then get whole.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
import os
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from numbers import Number
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradcache_clip.cache.chunks import Chunk

# Objects that merely can be called are not among them: graphs and batches of some libraries can.
_WHOLE = (
    *(type(None), str, bytes, Number, enum.Enum, os.PathLike, type, nn.Module),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Generator),
    *(types.FunctionType, types.BuiltinFunctionType, types.MethodType, partial),
)


@dataclasses.dataclass(frozen=True, eq=False)
class Shared:
    """An input that every chunk gets whole: the encoder is given `value` itself.

    Nothing inside is cut or trimmed. Its tensors go to the encoder's device, and receive their
    gradients, as those of other inputs do.

    Example:
        >>> import torch
        >>> from gradcache_clip import ClipLoss, GradCache, Shared
        >>> class Nearest(torch.nn.Linear):
        ...     def forward(self, x, centres):
        ...         return super().forward(x) - torch.cdist(x, centres)
        >>> encoders = Nearest(8, 4), torch.nn.Linear(6, 4)
        >>> cache = GradCache(encoders, ClipLoss(), chunk_size=16)
        >>> centres = Shared(torch.randn(4, 8))
        >>> out = cache((torch.randn(64, 8), centres), torch.randn(64, 6))
    """

    value: Any


class Part(NamedTuple):
    """Something inside an input that is cut into rows."""

    path: str
    key: Any
    """Its name in the mapping or dataclass, or its place in the tuple, that holds it."""
    value: Any


def count_rows(inputs: Any, name: str) -> int:
    """Count the rows, on which every tensor and list inside `inputs` must agree.

    Raises:
        ValueError: nothing in `inputs` has rows, two of its parts disagree, or a tuple holds the
            samples of the batch.
        TypeError: something that may hold samples cannot be cut.
    """
    whole: list[tuple[str, tuple[Any, ...]]] = []
    parts = list(parts_with_rows(inputs, name, whole))
    if not parts:
        raise ValueError(
            f"{name}: expected tensors or lists with one row a sample, got a "
            f"{type(inputs).__name__} without any; pass a batch, such as a (B, ...) tensor, a dict "
            "of tensors or a list of strings"
        )
    first, *others = parts
    rows = len(first.value)
    if rows == 0:
        raise ValueError(f"{first.path}: expected at least one row, got none; pass a batch")
    for other in others:
        if len(other.value) != rows:
            raise ValueError(_disagreement(name, first, other))
    for path, samples in whole:
        if len(samples) == rows:
            raise ValueError(_tuple_of_samples(path, samples[0]))
    return rows


def parts_with_rows(
    inputs: Any, path: str, whole: list[tuple[str, tuple[Any, ...]]] | None = None, key: Any = None
) -> Iterator[Part]:
    """Yield every part that is cut into rows; add tuples without any to `whole`."""
    if isinstance(inputs, Shared):
        return
    if _has_rows(inputs):
        _check_can_be_cut(inputs, path)
        yield Part(path, key, inputs)
        return
    if not _is_known(inputs):
        raise TypeError(_unknown(path, inputs))
    if isinstance(inputs, tuple) and inputs and all(isinstance(part, str) for part in inputs):
        raise ValueError(
            f"{path}: expected a list of strings, got a tuple, which stands for several "
            "arguments; pass list(texts)"
        )
    if isinstance(inputs, tuple) and inputs and not any(map(_is_known, inputs)):
        raise TypeError(_tuple_of_samples(path, inputs[0]))
    found = False
    for name, child in children_of(inputs):
        found |= isinstance(child, Shared)
        for part in parts_with_rows(child, f"{path}[{name!r}]", whole, name):
            found = True
            yield part
    # As `zip(*batch)` makes them; a shape and named fields are something else.
    if whole is not None and not found and type(inputs) is tuple and inputs:
        whole.append((path, inputs))


def take_rows(inputs: Any, start: int, stop: int) -> Any:
    """Take rows start to stop of everything inside `inputs`; tensors are views."""
    return _cut(inputs, lambda part: part[start:stop])


def pick_rows(inputs: Any, indices: Tensor) -> Any:
    """Take the rows at `indices`, in that order; tensors are copies."""
    return _cut(inputs, lambda part: _picked(part, indices))


def chunk_of(inputs: Any, chunk: Chunk) -> Any:
    """Take the rows of a chunk, without the columns that it trims."""
    rows = chunk.rows

    def take(part: Any) -> Any:
        taken = part[rows] if isinstance(rows, slice) else _picked(part, rows)
        columns = None if chunk.columns is None else chunk.columns.get(id(part))
        return taken if columns is None else taken[:, columns]

    return _cut(inputs, take)


def _cut(inputs: Any, take: Callable[[Any], Any]) -> Any:
    if isinstance(inputs, Shared):
        return inputs.value
    if _has_rows(inputs):
        return take(inputs)
    return _map_children(inputs, lambda child: _cut(child, take))


def _picked(part: Any, indices: Tensor) -> Any:
    if isinstance(part, list):
        return [part[index] for index in indices.tolist()]
    if isinstance(part, Tensor):
        return part[indices.to(part.device)]
    return part[indices if is_tensor_collection(part) else indices.numpy()]


def tensors_in(inputs: Any, *, shared: bool = True) -> Iterator[Tensor]:
    """Yield every tensor inside `inputs`, in lists too; in `Shared` unless `shared` is False."""
    if isinstance(inputs, Tensor):
        yield inputs
        return
    if isinstance(inputs, Shared) and not shared:
        return
    children = inputs if isinstance(inputs, list) else [child for _, child in children_of(inputs)]
    for child in children:
        if isinstance(child, Tensor):
            yield child
        elif not isinstance(child, str):
            yield from tensors_in(child, shared=shared)


def map_tensors(
    function: Callable[[Tensor], Tensor],
    nested: Any,
    shared: Callable[[Tensor], Tensor] | None = None,
) -> Any:
    """Apply a function to every tensor inside `nested`, in lists too, and keep the structure.

    Tensors inside `Shared` are given to `shared` instead, if there is one.
    """
    if isinstance(nested, Tensor):
        return function(nested)
    if isinstance(nested, list):
        return [map_tensors(function, child, shared) for child in nested]
    if isinstance(nested, Shared):
        return Shared(map_tensors(shared or function, nested.value))
    if is_tensor_collection(nested):
        dims = min(1, nested.batch_dims)
        return nested.apply(function, batch_size=[], device=None).auto_batch_size_(dims)
    return _map_children(nested, lambda child: map_tensors(function, child, shared))


def is_tensor_collection(inputs: Any) -> bool:
    """Whether `inputs` is a TensorDict or a tensorclass."""
    library = sys.modules.get("tensordict")
    return library is not None and library.is_tensor_collection(inputs)


def _has_rows(inputs: Any) -> bool:
    """Whether it is cut into rows: a list, or an array with a first dimension."""
    if isinstance(inputs, Tensor) or _is_array(inputs):
        return inputs.ndim > 0
    return isinstance(inputs, list) or is_tensor_collection(inputs)


def _is_array(inputs: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(inputs, (numpy.ndarray, numpy.generic))


def _is_known(inputs: Any) -> bool:
    """Whether its type tells what each chunk gets."""
    return (
        isinstance(inputs, (Tensor, list, tuple, Mapping, *_WHOLE))
        or _is_dataclass(inputs)
        or _is_array(inputs)
        or is_tensor_collection(inputs)
    )


def _check_can_be_cut(part: Any, path: str) -> None:
    if isinstance(part, list):
        return
    if isinstance(part, Tensor) and part.is_nested:
        raise TypeError(
            f"{path}: expected a tensor that can be cut into rows, got a NestedTensor; pass "
            "list(x.unbind()), one sample an element"
        )
    if isinstance(part, Tensor) and part.layout is not torch.strided:
        raise TypeError(
            f"{path}: expected a tensor that can be cut into rows, got layout {part.layout}; pass "
            "x.to_dense(), or Shared(x) if every chunk needs all of it"
        )
    if not isinstance(part, Tensor) and is_tensor_collection(part) and not part.batch_dims:
        raise TypeError(
            f"{path}: expected a {type(part).__name__} whose batch_size starts with its rows, got "
            "batch_size=[]; call x.auto_batch_size_(1), or pass Shared(x)"
        )


def _disagreement(name: str, one: Part, other: Part) -> str:
    hint = hint_at_lists(one.value) or hint_at_lists(other.value)
    return (
        f"{name}: expected the same number of rows everywhere, got {len(one.value)} in {one.path} "
        f"and {len(other.value)} in {other.path}; where a sample has several rows, pass a list "
        "with one dict per sample, which the encoder collates; where every chunk needs all of x, "
        f"pass Shared(x){hint}"
    )


def hint_at_lists(value: Any) -> str:
    """Add to an error where a list of tensors may have been meant as several arguments."""
    if not isinstance(value, list) or not value or not isinstance(value[0], Tensor):
        return ""
    return ". A list holds one sample an element: pass several arguments as a tuple or dict"


def _tuple_of_samples(path: str, sample: Any) -> str:
    return (
        f"{path}: expected a list, one sample an element, got a tuple of {type(sample).__name__}, "
        "which stands for several arguments and would reach every chunk whole; pass list(x), or "
        "Shared(x) if every chunk needs all of it"
    )


def _unknown(path: str, given: Any) -> str:
    if hasattr(given, "columns"):
        remedy = 'a dict of columns, or one dict per sample, such as df.to_dict("records")'
    elif isinstance(given, (set, frozenset)):
        remedy = "a list in the order of the samples"
    elif hasattr(given, "__iter__") or hasattr(given, "__len__"):
        remedy = "list(x)"
    else:
        remedy = "a list with one element a sample"
    return (
        f"{path}: expected tensors, arrays or lists with one row a sample, got a "
        f"{type(given).__name__}, which would reach every chunk whole; pass {remedy}, or Shared(x) "
        "if every chunk needs all of it"
    )


def _is_dataclass(inputs: Any) -> bool:
    return dataclasses.is_dataclass(inputs) and not isinstance(inputs, type)


def children_of(inputs: Any) -> list[tuple[Any, Any]]:
    """List keys and parts of a mapping, tuple or dataclass; anything else has none."""
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
    pairs = children_of(inputs)
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
