"""Applies the rules of a contrast inside one tile."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gradcache_clip.ops.pairing import Pairing
from gradcache_clip.ops.tiles import Tiles, diagonal


class TileMasks:
    """Finds positives and excluded logits of a tile from the labels and ids of its edges."""

    def __init__(self, tiles: Tiles, pairing: Pairing) -> None:
        self.tiles, self.pairing = tiles, pairing
        self.labelled = pairing.row_labels is not None
        shift, columns = pairing.positive_shift, len(tiles.k)
        # (i + shift) mod N lies on two diagonals.
        self._shifts = (shift, shift - columns) if shift > 0 else (shift,)

    def exclude(self, tile: Tensor, stripe: slice, panel: slice, value: float) -> None:
        """Write `value` where a logit is out of the competition. May overwrite positives."""
        pairing = self.pairing
        if pairing.row_ids is not None and pairing.column_ids is not None:
            mask = self._equal("ids", pairing.row_ids, pairing.column_ids, stripe, panel)
            # Positives compete even where ids are equal.
            if self.labelled:
                mask &= ~self.positives(stripe, panel)
            else:
                self._fill_positives(mask, stripe, panel)
            tile.masked_fill_(mask, value)
        if pairing.self_contrast:
            diagonal(tile, stripe, panel)[0].fill_(value)

    def positives(self, stripe: slice, panel: slice) -> Tensor:
        """With labels: mask equal ones, but not the row itself in a self-contrast."""
        rows, columns = self.pairing.row_labels, self.pairing.column_labels
        assert rows is not None and columns is not None
        mask = self._equal("labels", rows, columns, stripe, panel)
        if self.pairing.self_contrast:
            diagonal(mask, stripe, panel)[0].fill_(False)
        return mask

    def take_positives(self, tile: Tensor, stripe: slice, panel: slice, positive: Tensor) -> None:
        """Without labels: move the positive logits out of a tile, and leave -inf there."""
        for entries, rows, partners in self._diagonals(tile, stripe, panel):
            positive[rows] = entries
            if self.pairing.self_contrast:
                positive[partners] = entries
            entries.fill_(-torch.inf)

    def put_positives(self, tile: Tensor, stripe: slice, panel: slice, dpositive: Tensor) -> None:
        """Without labels: write the gradients of the positive logits into a tile."""
        for entries, rows, partners in self._diagonals(tile, stripe, panel):
            entries.copy_(dpositive[rows])
            if self.pairing.self_contrast:
                entries.add_(dpositive[partners])

    def _fill_positives(self, mask: Tensor, stripe: slice, panel: slice) -> None:
        for entries, _, _ in self._diagonals(mask, stripe, panel):
            entries.fill_(False)

    def _diagonals(
        self, tile: Tensor, stripe: slice, panel: slice
    ) -> Iterator[tuple[Tensor, slice, slice]]:
        """Yield the positive entries of a tile, their rows and their columns."""
        for shift in self._shifts:
            entries, rows = diagonal(tile, stripe, panel, shift)
            if len(entries) > 0:
                yield entries, rows, slice(rows.start + shift, rows.stop + shift)

    def _equal(
        self, name: str, rows: Tensor, columns: Tensor, stripe: slice, panel: slice
    ) -> Tensor:
        mask = self.tiles.buffer(name, stripe, panel, torch.bool)
        return torch.eq(rows[stripe, None], columns[None, panel], out=mask)
