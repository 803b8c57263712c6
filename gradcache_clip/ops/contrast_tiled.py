"""The softmax family tile by tile in plain PyTorch, on any device.

M rows q_i, N columns k_j. A tile of S = logit_scale q k^T stays in the cache, serves rows and
columns at once, and is overwritten by the next one. The backward computes it again. A self-contrast
has a symmetric S: tiles below its diagonal are never computed, for each is another one transposed.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gradcache_clip.ops.masks import TileMasks
from gradcache_clip.ops.pairing import Pairing, SideGradient, Statistics
from gradcache_clip.ops.tiles import DEFAULT_TILE, Tiles, TileShape

Needs = tuple[bool, bool, bool]
Gradients = tuple["Tensor | None", "Tensor | None", "Tensor | None"]


def statistics_tiled(
    q: Tensor,
    k: Tensor,
    logit_scale: Tensor,
    pairing: Pairing,
    *,
    shape: TileShape = DEFAULT_TILE,
) -> Statistics:
    """Statistics in one pass; nothing larger than one tile is allocated."""
    tiles = _tiles(q, k, logit_scale, shape, pairing)
    masks = TileMasks(tiles, pairing)
    rows = _Side(logit_scale, len(q), masks.labelled)
    columns = rows if pairing.self_contrast else _Side(logit_scale, len(k), masks.labelled)
    positive = logit_scale.new_empty(len(q))
    for stripe, panel in _walk(tiles, pairing):
        tile = tiles.logits(stripe, panel)
        sides = _sides(stripe, panel, rows, columns, pairing)
        masks.exclude(tile, stripe, panel, -torch.inf)
        if not masks.labelled:
            masks.take_positives(tile, stripe, panel, positive)
        for side, where, dim, threshold in sides:
            side.fold(tile, tiles.buffer("scratch", stripe, panel), where, dim, threshold)
        if masks.labelled:
            _fold_labelled(tile, masks, stripe, panel, sides)
    return _statistics(positive, rows, columns, pairing)


def _tiles(q: Tensor, k: Tensor, logit_scale: Tensor, shape: TileShape, pairing: Pairing) -> Tiles:
    if pairing.self_contrast:
        # Only square tiles have their mirror images below the diagonal.
        shape = TileShape(min(shape.rows, shape.columns), min(shape.rows, shape.columns))
    return Tiles(q, k, logit_scale, shape)


def _walk(tiles: Tiles, pairing: Pairing) -> Iterator[tuple[slice, slice]]:
    for stripe in tiles.stripes():
        for panel in tiles.panels(stripe.start if pairing.self_contrast else 0):
            yield stripe, panel


class _Side:
    """Running statistics of all rows (dim=1) or of all columns (dim=0)."""

    def __init__(self, logit_scale: Tensor, size: int, labelled: bool) -> None:
        self.max = logit_scale.new_full((size,), -torch.inf)
        self.sum = logit_scale.new_zeros(size)
        self.positive = logit_scale.new_zeros(size if labelled else 0)
        self.rival = logit_scale.new_full((size if labelled else 0,), -torch.inf)

    def fold(
        self, tile: Tensor, scratch: Tensor, where: slice, dim: int, threshold: Tensor | None
    ) -> None:
        """Add a tile to the running (max, sum of exp)."""
        if threshold is not None:
            limit = threshold[where].unsqueeze(dim)
            tile = torch.where(tile > limit, tile.new_full((), -torch.inf), tile, out=scratch)
        before, total = self.max[where], self.sum[where]
        peak = torch.maximum(before, tile.amax(dim))
        # A tile whose entries of a row are all masked has no finite maximum to subtract.
        reference = peak.masked_fill(peak == -torch.inf, 0)
        torch.sub(tile, reference.unsqueeze(dim), out=scratch).exp_()
        total.mul_(torch.exp(before - reference)).add_(scratch.sum(dim))
        before.copy_(peak)


_TileSides = list[tuple[_Side, slice, int, "Tensor | None"]]


def _sides(
    stripe: slice, panel: slice, rows: _Side, columns: _Side, pairing: Pairing
) -> _TileSides:
    """What a tile is added to: its rows, and its columns unless they are none or the same."""
    sides: _TileSides = [(rows, stripe, 1, pairing.row_threshold)]
    if pairing.both_ways or (pairing.self_contrast and stripe != panel):
        sides.append((columns, panel, 0, pairing.column_threshold))
    return sides


def _fold_labelled(
    tile: Tensor, masks: TileMasks, stripe: slice, panel: slice, sides: _TileSides
) -> None:
    """Add the positive logits and the rivals of a tile; leaves only negatives in it."""
    positives = masks.positives(stripe, panel)
    scratch = masks.tiles.buffer("scratch", stripe, panel)
    torch.where(positives, tile, tile.new_zeros(()), out=scratch)
    tile.masked_fill_(positives, -torch.inf)
    for side, where, dim, _ in sides:
        side.positive[where] += scratch.sum(dim)
        torch.maximum(side.rival[where], tile.amax(dim), out=side.rival[where])


def _statistics(positive: Tensor, rows: _Side, columns: _Side, pairing: Pairing) -> Statistics:
    empty = positive.new_empty(0)
    row = (
        rows.positive if pairing.row_labels is not None else positive,
        rows.max,
        rows.sum,
        rows.rival,
    )
    if not pairing.both_ways:
        return Statistics(*row, empty, empty.clone(), empty.clone(), empty.clone())
    return Statistics(*row, columns.positive, columns.max, columns.sum, columns.rival)


def gradient_tiled(
    q: Tensor,
    k: Tensor,
    logit_scale: Tensor,
    pairing: Pairing,
    rows: SideGradient,
    columns: SideGradient | None,
    needs: Needs,
    *,
    shape: TileShape = DEFAULT_TILE,
) -> Gradients:
    """dq, dk and dlogit_scale in a second pass; None where `needs` says False.

    Of a self-contrast dq is the gradient through both sides, and dk is None.
    """
    tiles = _tiles(q, k, logit_scale, shape, pairing)
    gradient = _TileGradient(tiles, pairing, rows, columns)
    if pairing.self_contrast:
        return _self_contrast(gradient, needs)
    return _two_sided(gradient, needs)


def _two_sided(gradient: _TileGradient, needs: Needs) -> Gradients:
    needs_q, needs_k, needs_scale = needs
    tiles, q, k = gradient.tiles, gradient.tiles.q, gradient.tiles.k
    logit_scale, dtype = tiles.logit_scale, tiles.logit_scale.dtype
    # <q, G k> and <k, G^T q> are the same sum, so the scale needs only one of the two products.
    through_q = needs_q or not needs_k
    dq = torch.empty_like(q, memory_format=torch.contiguous_format) if needs_q else None
    dk = torch.zeros(k.shape, dtype=dtype, device=k.device) if needs_k else None
    dlogit_scale = torch.zeros_like(logit_scale) if needs_scale else None
    for stripe in tiles.stripes():
        rows = q[stripe].to(dtype)
        product = torch.zeros_like(rows) if through_q else None
        for panel in tiles.panels():
            tile = gradient.tile(stripe, panel)
            if product is not None:
                product.addmm_(tile, k[panel].to(dtype))
            if dk is not None:
                dk[panel].addmm_(tile.T, rows)
        if product is not None and dlogit_scale is not None:
            dlogit_scale += (rows * product).sum()
        if product is not None and dq is not None:
            torch.mul(product, logit_scale, out=dq[stripe])
    if not through_q and dk is not None and dlogit_scale is not None:
        dlogit_scale += _rowwise_sum(k, dk, tiles)
    return dq, None if dk is None else dk.mul_(logit_scale).to(k.dtype), dlogit_scale


def _self_contrast(gradient: _TileGradient, needs: Needs) -> Gradients:
    """Each tile above the diagonal serves its rows, and transposed its columns."""
    needs_q, needs_k, needs_scale = needs
    tiles, q = gradient.tiles, gradient.tiles.q
    dtype = tiles.logit_scale.dtype
    dq = torch.zeros(q.shape, dtype=dtype, device=q.device)
    for stripe, panel in _walk(tiles, gradient.pairing):
        tile = gradient.tile(stripe, panel)
        dq[stripe].addmm_(tile, q[panel].to(dtype))
        if stripe != panel:
            dq[panel].addmm_(tile.T, q[stripe].to(dtype))
    # G + G^T meets S twice.
    dlogit_scale = _rowwise_sum(q, dq, tiles) / 2 if needs_scale else None
    needed = needs_q or needs_k
    return dq.mul_(tiles.logit_scale).to(q.dtype) if needed else None, None, dlogit_scale


def _rowwise_sum(features: Tensor, product: Tensor, tiles: Tiles) -> Tensor:
    """Sum of features * product without a temporary of their size."""
    total = torch.zeros_like(tiles.logit_scale)
    for stripe in (slice(i, i + tiles.rows) for i in range(0, len(features), tiles.rows)):
        total += (features[stripe] * product[stripe]).sum()
    return total


class _TileGradient:
    """dloss/dS of a tile, over logit_scale <q, k>."""

    def __init__(
        self, tiles: Tiles, pairing: Pairing, rows: SideGradient, columns: SideGradient | None
    ) -> None:
        self.tiles, self.pairing = tiles, pairing
        self.rows = _finite(rows)
        self.columns = self.rows if pairing.self_contrast else columns and _finite(columns)
        self.masks = TileMasks(tiles, pairing)

    def tile(self, stripe: slice, panel: slice) -> Tensor:
        """G of these rows and columns; overwritten by the next call."""
        tile, scratch = self.tiles.logits(stripe, panel), self._scratch(stripe, panel)
        if self.columns is not None:
            threshold = self.pairing.column_threshold
            _softmax(tile, panel, 0, self.columns, threshold, out=scratch)
            scratch.mul_(self.columns.dsum[panel])
        _softmax(tile, stripe, 1, self.rows, self.pairing.row_threshold, out=tile)
        dsum = self.rows.dsum[stripe, None]
        if self.columns is None:
            tile.mul_(dsum)
        else:
            torch.addcmul(scratch, tile, dsum, out=tile)
        self.masks.exclude(tile, stripe, panel, 0.0)
        self._add_positives(tile, stripe, panel)
        return tile

    def _add_positives(self, tile: Tensor, stripe: slice, panel: slice) -> None:
        if not self.masks.labelled:
            self.masks.put_positives(tile, stripe, panel, self.rows.dpositive)
            return
        scratch = self._scratch(stripe, panel).copy_(self.rows.dpositive[stripe, None])
        if self.columns is not None:
            scratch.add_(self.columns.dpositive[panel])
        tile.add_(scratch.mul_(self.masks.positives(stripe, panel)))

    def _scratch(self, stripe: slice, panel: slice) -> Tensor:
        return self.tiles.buffer("scratch", stripe, panel)


def _softmax(
    tile: Tensor, where: slice, dim: int, side: SideGradient, threshold: Tensor | None, out: Tensor
) -> None:
    """exp(S - max), and 0 above the threshold."""
    dropped = None if threshold is None else tile > threshold[where].unsqueeze(dim)
    torch.sub(tile, side.max[where].unsqueeze(dim), out=out).exp_()
    if dropped is not None:
        out.masked_fill_(dropped, 0)


def _finite(side: SideGradient) -> SideGradient:
    """Where a row has nothing to sum, exp(S - inf) is 0 and no overflow meets its zero dsum."""
    return side._replace(max=side.max.masked_fill(side.max == -torch.inf, torch.inf))
