"""The similarity matrix cut into tiles that are computed one at a time into the same memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TileShape:
    """Edges of a tile. The default keeps two fp32 buffers of 4 MB in a CPU's shared cache."""

    rows: int = 1024
    columns: int = 1024

    def on(self, device: torch.device) -> TileShape:
        """Return these edges on a CPU, and larger ones on an accelerator."""
        rows, columns = times_on(device)
        return TileShape(rows * self.rows, columns * self.columns)


def times_on(device: torch.device) -> tuple[int, int]:
    """Return how many times as high and as wide as on a CPU a tile is.

    On an accelerator launches would take longer than a tile of 4 MB. One of 64 MB is launched a
    16th as often; it is wide, as a self-contrast computes squares of its height on the diagonal.
    """
    return (1, 1) if device.type == "cpu" else (2, 8)


DEFAULT_TILE = TileShape()


class Tiles:
    """Computes tiles of S = logit_scale q k^T (M x N); each overwrites the one before."""

    def __init__(self, q: Tensor, k: Tensor, logit_scale: Tensor, shape: TileShape) -> None:
        self.q, self.k, self.logit_scale = q, k, logit_scale
        self.rows, self.columns = min(shape.rows, len(q)), min(shape.columns, len(k))
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def stripes(self) -> Iterator[slice]:
        return slices(0, len(self.q), self.rows)

    def panels(self, first_column: int = 0) -> Iterator[slice]:
        return slices(first_column, len(self.k), self.columns)

    def logits(self, stripe: slice, panel: slice) -> Tensor:
        """Return S of these rows and columns."""
        dtype = self.logit_scale.dtype
        scaled = self.q[stripe].to(dtype) * self.logit_scale
        return torch.mm(scaled, self.k[panel].to(dtype).T, out=self.buffer("S", stripe, panel))

    def buffer(
        self, name: str, stripe: slice, panel: slice, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Return memory in the shape of the tile, reused for every tile."""
        dtype = dtype or self.logit_scale.dtype
        if (name, dtype) not in self._buffers:
            size = self.rows * self.columns
            self._buffers[name, dtype] = self.logit_scale.new_empty(size, dtype=dtype)
        rows, columns = stripe.stop - stripe.start, panel.stop - panel.start
        return self._buffers[name, dtype][: rows * columns].view(rows, columns)


def slices(start: int, stop: int, step: int) -> Iterator[slice]:
    """Yield consecutive slices of at most `step` that cover range(start, stop)."""
    return (slice(first, min(first + step, stop)) for first in range(start, stop, step))


def diagonal(tile: Tensor, stripe: slice, panel: slice, shift: int = 0) -> tuple[Tensor, slice]:
    """Return the entries (i, i + shift) inside a tile (often none), and their rows."""
    entries = tile.diagonal(stripe.start + shift - panel.start)
    first = max(stripe.start, panel.start - shift)
    return entries, slice(first, first + len(entries))
