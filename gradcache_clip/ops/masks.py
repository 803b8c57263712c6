"""Applies the rules of a contrast inside one tile."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from gradcache_clip.ops.pairing import Pairing
from gradcache_clip.ops.tiles import diagonal

Buffer = Callable[[str, slice, slice, torch.dtype], Tensor]
"""From a name, rows, columns and a dtype to memory in the shape of the tile."""


class TileMasks:
    """Finds positives and excluded logits of a tile from the labels and ids of its edges."""

    def __init__(self, buffer: Buffer, columns: int, pairing: Pairing) -> None:
        self._buffer, self.pairing = buffer, pairing
        self.labelled = pairing.row_labels is not None
        shift = pairing.positive_shift
        # (i + shift) mod N lies on two diagonals.
        self._shifts = (shift, shift - columns) if shift > 0 else (shift,)

    def exclude(self, tile: Tensor, stripe: slice, panel: slice, value: float) -> None:
        """Write `value` where a logit is out of the competition. May overwrite positives."""
        pairing = self.pairing
        if pairing.row_ids is not None and pairing.column_ids is not None:
            mask = self._equal("ids", pairing.row_ids, pairing.column_ids, stripe, panel)
            self._leave_out(mask, tile, stripe, panel, value)
        if pairing.row_groups is not None and pairing.column_groups is not None:
            same = self._equal("ids", pairing.row_groups, pairing.column_groups, stripe, panel)
            self._leave_out(same.logical_not_(), tile, stripe, panel, value)
        if pairing.self_contrast:
            diagonal(tile, stripe, panel)[0].fill_(value)

    def add_bias(self, tile: Tensor, stripe: slice, panel: slice) -> None:
        """Add the constants of rows and columns to the logits of a tile."""
        if self.pairing.row_bias is not None:
            tile.add_(self.pairing.row_bias[stripe, None])
        if self.pairing.column_bias is not None:
            tile.add_(self.pairing.column_bias[panel])

    def above_guide(self, stripe: slice, panel: slice, dim: int) -> Tensor | None:
        """Mask the logits whose guide is above the threshold of its row (1) or its column (0)."""
        pairing = self.pairing
        limit, where = pairing.row_guide_threshold, stripe
        if dim == 0:
            limit, where = pairing.column_guide_threshold, panel
        if limit is None or pairing.row_guide is None or pairing.column_guide is None:
            return None
        left, right = pairing.row_guide[:, stripe], pairing.column_guide[:, panel]
        guide = torch.mm(left.T, right, out=self._buffer("guide", stripe, panel, left.dtype))
        mask = self._buffer("guided", stripe, panel, torch.bool)
        return torch.gt(guide, limit[where].unsqueeze(dim), out=mask)

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

    def _leave_out(
        self, mask: Tensor, tile: Tensor, stripe: slice, panel: slice, value: float
    ) -> None:
        """Write `value` where the mask is True, but for positives, which always compete."""
        if self.labelled:
            mask &= ~self.positives(stripe, panel)
        for entries, _, _ in () if self.labelled else self._diagonals(mask, stripe, panel):
            entries.fill_(False)
        tile.masked_fill_(mask, value)

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
        mask = self._buffer(name, stripe, panel, torch.bool)
        return torch.eq(rows[stripe, None], columns[None, panel], out=mask)
