"""The CLIP loss tile by tile in plain PyTorch, on any device.

B pairs, D feature width. A tile of S = logit_scale q k^T is computed into a buffer that stays in
the cache, serves the row and the column softmax at once, and is overwritten by the next one. The
backward computes it again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gradcache_clip.ops.clip_autograd import ClipFunction, ClipPasses, Gradients, Needs
from gradcache_clip.ops.clip_terms import ClipStatistics, SoftmaxTerms

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True)
class TileShape:
    """Edges of a tile. The default keeps two fp32 buffers of 4 MB in a shared cache."""

    rows: int = 1024
    columns: int = 1024


_DEFAULT_TILE = TileShape()


def clip_tiled(
    q: Float[Tensor, "b d"],
    k: Float[Tensor, "b d"],
    logit_scale: Float[Tensor, ""],
    *,
    tile: TileShape = _DEFAULT_TILE,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, row accuracy and column accuracy; no tensor larger than B x D or one tile."""
    passes = ClipPasses(partial(_statistics, tile=tile), partial(_gradient, tile=tile))
    return ClipFunction.apply(q, k, logit_scale, passes)


def _statistics(q: Tensor, k: Tensor, logit_scale: Tensor, *, tile: TileShape) -> ClipStatistics:
    tiles = _Tiles(q, k, logit_scale, tile)
    positive = logit_scale.new_empty(len(q))
    row_max, column_max = (logit_scale.new_full((len(q),), -torch.inf) for _ in range(2))
    row_sum, column_sum = (logit_scale.new_zeros(len(q)) for _ in range(2))
    for stripe in tiles.stripes():
        for panel in tiles.panels():
            logits = tiles.logits(stripe, panel)
            diagonal, pairs = _diagonal(logits, stripe, panel)
            positive[pairs] = diagonal
            diagonal.fill_(-torch.inf)
            scratch = tiles.scratch(stripe, panel)
            _fold(logits, scratch, row_max[stripe], row_sum[stripe], dim=1)
            _fold(logits, scratch, column_max[panel], column_sum[panel], dim=0)
    return ClipStatistics(1.0, positive, row_max, row_sum, column_max, column_sum)


def _fold(tile: Tensor, scratch: Tensor, peak: Tensor, total: Tensor, *, dim: int) -> None:
    """Add a tile to the running (max, sum of exp) of its rows (dim=1) or columns (dim=0)."""
    new_peak = torch.maximum(peak, tile.amax(dim))
    # A tile that holds nothing but a masked diagonal has no finite maximum to subtract.
    reference = new_peak.masked_fill(new_peak == -torch.inf, 0)
    torch.sub(tile, reference.unsqueeze(dim), out=scratch).exp_()
    total.mul_(torch.exp(peak - reference)).add_(scratch.sum(dim))
    peak.copy_(new_peak)


def _gradient(
    q: Tensor,
    k: Tensor,
    logit_scale: Tensor,
    terms: SoftmaxTerms,
    factor: Tensor,
    needs: Needs,
    *,
    tile: TileShape,
) -> Gradients:
    needs_q, needs_k, needs_scale = needs
    tiles, dtype = _Tiles(q, k, logit_scale, tile), logit_scale.dtype
    # <q, G k> and <k, G^T q> are the same sum, so the scale needs only one of the two products.
    through_q = needs_q or not needs_k
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device) if needs_q else None
    dk = torch.zeros(k.shape, dtype=dtype, device=k.device) if needs_k else None
    dlogit_scale = torch.zeros_like(logit_scale) if needs_scale else None
    for stripe in tiles.stripes():
        rows = q[stripe].to(dtype)
        product = torch.zeros_like(rows) if through_q else None
        for panel in tiles.panels():
            gradient = tiles.gradient(stripe, panel, terms)
            if product is not None:
                product.addmm_(gradient, k[panel].to(dtype))
            if dk is not None:
                dk[panel].addmm_(gradient.T, rows)
        if product is not None and dlogit_scale is not None:
            dlogit_scale += (rows * product).sum()
        if product is not None and dq is not None:
            torch.mul(product, factor * logit_scale, out=dq[stripe])
    if not through_q and dk is not None and dlogit_scale is not None:
        dlogit_scale += (k * dk).sum()
    if dk is not None:
        dk = dk.mul_(factor * logit_scale).to(k.dtype)
    return dq, dk, None if dlogit_scale is None else dlogit_scale * factor


class _Tiles:
    """Cuts S into tiles, and computes one at a time into a buffer."""

    def __init__(self, q: Tensor, k: Tensor, logit_scale: Tensor, tile: TileShape) -> None:
        self.q, self.k, self.logit_scale = q, k, logit_scale
        self.rows, self.columns = min(tile.rows, len(q)), min(tile.columns, len(q))
        self._buffer = logit_scale.new_empty(self.rows * self.columns)
        self._scratch = torch.empty_like(self._buffer)

    def stripes(self) -> Iterator[slice]:
        return _slices(len(self.q), self.rows)

    def panels(self) -> Iterator[slice]:
        return _slices(len(self.q), self.columns)

    def scratch(self, stripe: slice, panel: slice) -> Tensor:
        """A second buffer in the shape of the tile."""
        return _shaped(self._scratch, stripe, panel)

    def logits(self, stripe: slice, panel: slice) -> Tensor:
        """S of these rows and columns; overwritten by the next call."""
        dtype = self.logit_scale.dtype
        tile = _shaped(self._buffer, stripe, panel)
        scaled = self.q[stripe].to(dtype) * self.logit_scale
        return torch.mm(scaled, self.k[panel].to(dtype).T, out=tile)

    def gradient(self, stripe: slice, panel: slice, terms: SoftmaxTerms) -> Tensor:
        """P_row + P_column - 2 I of these rows and columns; overwritten by the next call."""
        tile, scratch = self.logits(stripe, panel), self.scratch(stripe, panel)
        tile.sub_(terms.shift)
        torch.sub(tile, terms.column_lse[panel], out=scratch).exp_()
        tile.sub_(terms.row_lse[stripe, None]).exp_().add_(scratch)
        diagonal, pairs = _diagonal(tile, stripe, panel)
        diagonal.copy_(terms.positive_gradient[pairs])
        return tile


def _slices(size: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, size)) for start in range(0, size, step))


def _shaped(buffer: Tensor, stripe: slice, panel: slice) -> Tensor:
    rows, columns = stripe.stop - stripe.start, panel.stop - panel.start
    return buffer[: rows * columns].view(rows, columns)


def _diagonal(tile: Tensor, stripe: slice, panel: slice) -> tuple[Tensor, slice]:
    """The part of the matrix's diagonal inside a tile (often empty) and the pairs it belongs to."""
    diagonal = tile.diagonal(stripe.start - panel.start)
    first = max(stripe.start, panel.start)
    return diagonal, slice(first, first + len(diagonal))
