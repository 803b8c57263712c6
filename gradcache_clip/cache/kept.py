"""Tensors with a copy of their values, to compare and to restore."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from gradcache_clip.cache.nests import children_of
from gradcache_clip.cache.rows import Entries, Ragged


class Kept:
    """A tensor and a copy of its values."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.before = tensor, tensor.detach().clone()

    @property
    def changed(self) -> bool:
        return not bit_equal(self.tensor.detach(), self.before)

    @torch.no_grad()
    def put_back(self) -> None:
        # Written only where something changed: an expanded input cannot be written to.
        if self.changed:
            self.tensor.detach().resize_(self.before.shape).copy_(self.before)


def bit_equal(one: Tensor, other: Tensor) -> bool:
    """Whether shape, dtype, device and every bit are equal; NaN equals NaN."""
    if one.shape != other.shape or one.dtype != other.dtype or one.device != other.device:
        return False
    return torch.equal(*(x.detach().reshape(-1).view(torch.uint8) for x in (one, other)))


def named_tensors(inputs: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors and writeable NumPy arrays inside `inputs`, each with its place."""
    if isinstance(inputs, Tensor):
        if not inputs.is_inference() and inputs.layout is torch.strided:
            yield path, inputs
        return
    if type(inputs).__module__ == "numpy":
        if inputs.dtype.kind in "biufc" and inputs.ndim and inputs.flags.writeable:
            yield path, torch.from_numpy(inputs)
        return
    if isinstance(inputs, (Ragged, Entries)):
        yield from named_tensors(inputs.nest if isinstance(inputs, Ragged) else inputs.values, path)
        return
    children: Iterable[Any] = enumerate(inputs) if isinstance(inputs, list) else children_of(inputs)
    for key, child in children:
        yield from named_tensors(child, f"{path}[{key!r}]")
