"""dloss/dS of the softmax family, one tile after another."""

from __future__ import annotations

import torch
from torch import Tensor

from gradcache_clip.ops.masks import TileMasks
from gradcache_clip.ops.pairing import Pairing, SideGradient
from gradcache_clip.ops.tiles import Tiles


class TileGradient:
    """Computes G = dloss/dS, S = logit_scale <q, k>, of one tile at a time."""

    def __init__(
        self, tiles: Tiles, pairing: Pairing, rows: SideGradient, columns: SideGradient | None
    ) -> None:
        self.tiles, self.pairing = tiles, pairing
        self.rows = _finite(rows)
        self.columns = self.rows if pairing.self_contrast else columns and _finite(columns)
        self.masks = TileMasks(tiles.buffer, len(tiles.k), pairing)

    def tile(self, stripe: slice, panel: slice) -> Tensor:
        """Return G of these rows and columns; the next call overwrites it."""
        tile, scratch = self.tiles.logits(stripe, panel), self._scratch(stripe, panel)
        self.masks.add_bias(tile, stripe, panel)
        # dsum_i exp(S - max_i) + dsum_j exp(S - max_j), in two buffers; columns first, because the
        # rows overwrite S.
        if self.columns is not None:
            threshold = self.pairing.column_threshold
            _softmax(tile, panel, 0, self.columns, threshold, out=scratch)
            self._drop_guided(scratch, stripe, panel, 0)
            scratch.mul_(self.columns.dsum[panel])
        _softmax(tile, stripe, 1, self.rows, self.pairing.row_threshold, out=tile)
        self._drop_guided(tile, stripe, panel, 1)
        dsum = self.rows.dsum[stripe, None]
        if self.columns is None:
            tile.mul_(dsum)
        else:
            torch.addcmul(scratch, tile, dsum, out=tile)
        self.masks.exclude(tile, stripe, panel, 0.0)
        self._add_positives(tile, stripe, panel)
        return tile

    def _drop_guided(self, weights: Tensor, stripe: slice, panel: slice, dim: int) -> None:
        above = self.masks.above_guide(stripe, panel, dim)
        if above is not None:
            weights.masked_fill_(above, 0)

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
    """Write exp(S - max) to `out`, and 0 where S is above the threshold."""
    dropped = None if threshold is None else tile > threshold[where].unsqueeze(dim)
    torch.sub(tile, side.max[where].unsqueeze(dim), out=out).exp_()
    if dropped is not None:
        out.masked_fill_(dropped, 0)


def _finite(side: SideGradient) -> SideGradient:
    """Replace a maximum of -inf, of a row without competitors, by +inf."""
    # exp(S + inf) would overflow and give NaN with the row's dsum of 0; exp(S - inf) is 0.
    return side._replace(max=side.max.masked_fill(side.max == -torch.inf, torch.inf))
