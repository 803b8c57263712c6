"""Running statistics of the softmax family, one tile after another.

M rows, N columns. Tiles of S come from all features, or from a prefix of them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gradcache_clip.ops.masks import TileMasks
from gradcache_clip.ops.pairing import Pairing, Statistics
from gradcache_clip.ops.tiles import Tiles, TileShape


def tile_shape(shape: TileShape, pairing: Pairing) -> TileShape:
    """Make tiles square in a self-contrast, so that each below the diagonal mirrors one above."""
    edge = min(shape.rows, shape.columns)
    return TileShape(edge, edge) if pairing.self_contrast else shape


def walk(tiles: Tiles, pairing: Pairing) -> Iterator[tuple[slice, slice]]:
    """Yield rows and columns of each tile to compute."""
    for stripe in tiles.stripes():
        for panel in tiles.panels(stripe.start if pairing.self_contrast else 0):
            yield stripe, panel


class TileStatistics:
    """Statistics of all rows and columns over the tiles so far."""

    def __init__(self, tiles: Tiles, pairing: Pairing) -> None:
        self.tiles, self.pairing = tiles, pairing
        self.masks = TileMasks(tiles.buffer, len(tiles.k), pairing)
        labelled, logit_scale = self.masks.labelled, tiles.logit_scale
        self.rows = _Side(logit_scale, len(tiles.q), labelled)
        self.columns = self.rows
        if not pairing.self_contrast:
            self.columns = _Side(logit_scale, len(tiles.k), labelled)
        self.positive = logit_scale.new_empty(len(tiles.q))

    def fold(self, stripe: slice, panel: slice) -> None:
        """Compute the tile of these rows and columns, and add it to the statistics."""
        tile = self.tiles.logits(stripe, panel)
        sides = self._sides(stripe, panel)
        self.masks.add_bias(tile, stripe, panel)
        self.masks.exclude(tile, stripe, panel, -torch.inf)
        if not self.masks.labelled:
            self.masks.take_positives(tile, stripe, panel, self.positive)
        for side, where, dim, threshold in sides:
            scratch = self.tiles.buffer("scratch", stripe, panel)
            limit = None if threshold is None else threshold[where].unsqueeze(dim)
            above = self.masks.above_guide(stripe, panel, dim)
            side.fold(_up_to(limit, above, tile, scratch), where, dim, scratch)
        if self.masks.labelled:
            self._fold_labelled(tile, stripe, panel, sides)

    def _sides(self, stripe: slice, panel: slice) -> _TileSides:
        """Return its rows and, unless they are none or the same, its columns."""
        pairing = self.pairing
        sides: _TileSides = [(self.rows, stripe, 1, pairing.row_threshold)]
        if pairing.both_ways or (pairing.self_contrast and stripe != panel):
            sides.append((self.columns, panel, 0, pairing.column_threshold))
        return sides

    def _fold_labelled(self, tile: Tensor, stripe: slice, panel: slice, sides: _TileSides) -> None:
        """Add the positive logits and the hardest negatives; leaves only negatives in the tile."""
        positives = self.masks.positives(stripe, panel)
        scratch = self.tiles.buffer("scratch", stripe, panel)
        torch.where(positives, tile, tile.new_zeros(()), out=scratch)
        tile.masked_fill_(positives, -torch.inf)
        for side, where, dim, _ in sides:
            side.positive[where] += scratch.sum(dim)
            torch.maximum(side.hardest[where], tile.amax(dim), out=side.hardest[where])

    def result(self) -> Statistics:
        """Return the statistics over all tiles."""
        rows, columns, empty = self.rows, self.columns, self.positive.new_empty(0)
        positive = rows.positive if self.masks.labelled else self.positive
        row = positive, rows.max, rows.sum, rows.hardest
        if not self.pairing.both_ways:
            return Statistics(*row, empty, empty.clone(), empty.clone(), empty.clone())
        return Statistics(*row, columns.positive, columns.max, columns.sum, columns.hardest)


def _up_to(limit: Tensor | None, above: Tensor | None, tile: Tensor, scratch: Tensor) -> Tensor:
    """Return the tile with -inf above the limit, and where `above` says so."""
    if limit is not None:
        beyond = tile > limit
        above = beyond if above is None else beyond.logical_or_(above)
    if above is None:
        return tile
    return torch.where(above, tile.new_full((), -torch.inf), tile, out=scratch)


class RunningSoftmax:
    """Running (max, sum of exp) of all rows (dim=1), or of all columns (dim=0), of a matrix."""

    def __init__(self, like: Tensor, size: int) -> None:
        self.max = like.new_full((size,), -torch.inf)
        self.sum = like.new_zeros(size)

    def fold(self, tile: Tensor, where: slice, dim: int, scratch: Tensor) -> None:
        """Add a tile: an online softmax."""
        before, total = self.max[where], self.sum[where]
        peak = torch.maximum(before, tile.amax(dim))
        # A tile whose entries of a row are all masked has no finite maximum to subtract.
        reference = peak.masked_fill(peak == -torch.inf, 0)
        torch.sub(tile, reference.unsqueeze(dim), out=scratch).exp_()
        total.mul_(torch.exp(before - reference)).add_(scratch.sum(dim))
        before.copy_(peak)


class _Side(RunningSoftmax):
    """With labels also the sum of the positive logits and the hardest negative."""

    def __init__(self, like: Tensor, size: int, labelled: bool) -> None:
        super().__init__(like, size)
        self.positive = like.new_zeros(size if labelled else 0)
        self.hardest = like.new_full((size if labelled else 0,), -torch.inf)


_TileSides = list[tuple[_Side, slice, int, "Tensor | None"]]
