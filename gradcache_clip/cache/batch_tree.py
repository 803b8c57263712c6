"""Nested inputs: their number of rows, and the rows of one chunk.

Tensors, NumPy arrays and TensorDicts are cut along dimension 0, lists hold one sample an element,
and `Rows` (packed inputs, jagged tensors, batches of graphs) say themselves how they are cut.
Mappings, tuples and dataclasses are containers that are looked into. Numbers, strings, functions,
modules and `Shared` values reach every chunk whole. Anything else is refused: it may hold the
batch, which every chunk would then get whole.
"""

from __future__ import annotations

import dataclasses
import enum
import os
import types
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from numbers import Number
from typing import Any

import torch
from torch import Tensor, nn

from gradcache_clip.cache.batch_errors import Part, disagreement, tuple_of_samples, unknown
from gradcache_clip.cache.chunks import Chunk
from gradcache_clip.cache.nests import (
    children_of,
    is_array,
    is_dataclass,
    is_graph_batch,
    is_tensor_collection,
    map_children,
)
from gradcache_clip.cache.own_rows import map_graphs, own_rows
from gradcache_clip.cache.rows import Ragged, Rows

# Objects that merely can be called are not among them: graphs and batches of some libraries can.
_WHOLE = (
    *(type(None), str, bytes, Number, enum.Enum, os.PathLike, type, nn.Module),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Generator),
    *(types.FunctionType, types.BuiltinFunctionType, types.MethodType, partial),
)


AS_PASSED: Mapping[int, int] = {}


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
            raise ValueError(disagreement(name, first, other))
    for path, samples in whole:
        if len(samples) == rows:
            raise ValueError(tuple_of_samples(path, samples[0]))
    return rows


def parts_with_rows(
    inputs: Any, path: str, whole: list[tuple[str, tuple[Any, ...]]] | None = None, key: Any = None
) -> Iterator[Part]:
    """Yield every part that is cut into rows; add tuples without any to `whole`."""
    if isinstance(inputs, Shared):
        return
    if isinstance(inputs, Ragged):
        inputs = inputs.nest
    if _has_rows(inputs):
        own = own_rows(inputs, path)
        if own is None:
            _check_can_be_cut(inputs, path)
        yield Part(path, key, inputs if own is None else own)
        return
    if not _is_known(inputs):
        raise TypeError(unknown(path, inputs))
    if isinstance(inputs, tuple) and inputs and all(isinstance(part, str) for part in inputs):
        raise ValueError(
            f"{path}: expected a list of strings, got a tuple, which stands for several "
            "arguments; pass list(texts)"
        )
    if isinstance(inputs, tuple) and inputs and not any(map(_is_known, inputs)):
        raise TypeError(tuple_of_samples(path, inputs[0]))
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
    return _cut(inputs, lambda part: _rows_of(part, slice(start, stop)))


def pick_rows(inputs: Any, indices: Tensor) -> Any:
    """Take the rows at `indices`, in that order; tensors are copies."""
    return _cut(inputs, lambda part: _rows_of(part, indices))


def chunk_of(inputs: Any, chunk: Chunk, passed: Mapping[int, int] = AS_PASSED) -> Any:
    """Take the rows of a chunk, without the columns that it trims.

    `passed`: by id of a part that was brought into another order, the id of the one passed.
    """
    rows = chunk.rows

    def take(part: Any) -> Any:
        taken = _rows_of(part, rows)
        key = passed.get(id(part), id(part))
        columns = None if chunk.columns is None else chunk.columns.get(key)
        return taken if columns is None else taken[:, columns]

    return _cut(inputs, take)


def _cut(inputs: Any, take: Callable[[Any], Any]) -> Any:
    if _has_rows(inputs):
        return take(inputs)
    if isinstance(inputs, Shared):
        return inputs.value
    if isinstance(inputs, Ragged):
        return inputs.without_empty(_cut(inputs.nest, take))
    return map_children(inputs, lambda child: _cut(child, take))


def _rows_of(part: Any, rows: slice | Tensor) -> Any:
    """Take rows of a part, as the encoder is given them."""
    # By far most parts, once per chunk.
    if type(part) is Tensor and type(rows) is slice and not part.is_nested:
        return part[rows]
    if (own := own_rows(part)) is not None:
        return own.take(rows if isinstance(rows, slice) else rows.tolist()).value
    if isinstance(rows, slice):
        return part[rows]
    if isinstance(part, list):
        return [part[row] for row in rows.tolist()]
    if isinstance(part, Tensor):
        return part[rows.to(part.device)]
    return part[rows if is_tensor_collection(part) else rows.numpy()]


def reordered(inputs: Any, order: Tensor, moved: dict[int, Any]) -> Any:
    """Bring the rows of everything inside `inputs` into another order, and leave it a batch.

    `moved` receives, by id of a part, what takes its place.
    """
    if isinstance(inputs, Shared):
        return inputs
    if not _has_rows(inputs):
        return map_children(inputs, lambda child: reordered(child, order, moved))
    if id(inputs) not in moved:
        moved[id(inputs)] = _part_in_order(inputs, order)
    return moved[id(inputs)]


def _part_in_order(part: Any, order: Tensor) -> Any:
    if (own := own_rows(part)) is not None:
        return own.take(order.tolist())
    if isinstance(part, Tensor) and part.requires_grad:
        return _Reordered.apply(part, order.to(part.device))
    return _rows_of(part, order)


class _Reordered(torch.autograd.Function):
    """Rows in another order; every chunk takes a backward of its own through it."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor) -> Tensor:
        # Not saved: what is saved, the first backward frees.
        ctx.order = order
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return torch.empty_like(gradient).index_copy_(0, ctx.order, gradient), None


def repeat_rows(inputs: Any, count: int) -> Any:
    """Repeat the rows until there are `count`, and leave them a batch that can be cut.

    Tensors are new, and their numbers are not set: this is for fake ones.
    """
    if isinstance(inputs, Shared):
        return inputs
    if not _has_rows(inputs):
        return map_children(inputs, lambda child: repeat_rows(child, count))
    if (own := own_rows(inputs)) is None and isinstance(inputs, Tensor):
        return inputs.new_empty((count, *inputs.shape[1:]))
    given = len(inputs if own is None else own)
    rows = [row % given for row in range(count)]
    if own is not None:
        return own.take(rows)
    return [inputs[row] for row in rows] if isinstance(inputs, list) else inputs[rows]


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


def map_tensors(function: Callable[[Tensor], Tensor], nested: Any) -> Any:
    """Apply a function to every tensor inside `nested`, in lists too, and keep the structure."""
    if isinstance(nested, Tensor):
        return function(nested)
    if isinstance(nested, list):
        return [map_tensors(function, child) for child in nested]
    if is_tensor_collection(nested):
        dims = min(1, nested.batch_dims)
        return nested.apply(function, batch_size=[], device=None).auto_batch_size_(dims)
    if is_graph_batch(nested):
        return map_graphs(function, nested)
    return map_children(nested, lambda child: map_tensors(function, child))


def _has_rows(inputs: Any) -> bool:
    """Whether it is cut into rows: a list, or an array with a first dimension."""
    if isinstance(inputs, Tensor) or is_array(inputs):
        return inputs.ndim > 0
    return (
        isinstance(inputs, (list, Rows)) or is_tensor_collection(inputs) or is_graph_batch(inputs)
    )


def _is_known(inputs: Any) -> bool:
    """Whether its type tells what each chunk gets."""
    return (
        isinstance(inputs, (Tensor, list, tuple, Mapping, *_WHOLE))
        or is_dataclass(inputs)
        or is_array(inputs)
        or is_tensor_collection(inputs)
        or is_graph_batch(inputs)
    )


def _check_can_be_cut(part: Any, path: str) -> None:
    if isinstance(part, list):
        return
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
