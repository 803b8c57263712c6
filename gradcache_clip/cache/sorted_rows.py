"""Rows of a batch in the order of their length, and the chunks that they are cut into. B rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradcache_clip.cache.chunks import Chunk
from gradcache_clip.cache.columns import Columns


@dataclass(frozen=True, eq=False)
class SortedRows:
    """Rows from the longest to the shortest, what they cost, and the columns that they need."""

    order: Tensor
    """(B,) numbers of the rows."""
    columns: Sequence[Columns]
    """Of each mask."""
    multiple: int
    """A chunk keeps a multiple of this many columns, or all."""
    costs: Tensor | None
    """(B,) of each row; None counts the columns that a chunk keeps."""
    packed: bool
    """Whether a chunk costs the sum over its rows, and not each row as much as the dearest."""

    def chunks(self, most_rows: int, budget: int | None) -> list[Chunk]:
        """Cut off as many rows as the budget allows, again and again; one at least."""
        chunks, start = list[Chunk](), 0
        while start < len(self.order):
            rows = self.order[start : start + most_rows]
            if budget is not None:
                rows = rows[: self._fitting(rows, budget)]
            chunks.append(Chunk(rows, self._kept(rows), max(1, int(self._totals(rows)[-1]))))
            start += len(rows)
        return chunks

    def _fitting(self, rows: Tensor, budget: int) -> int:
        """Count the rows that fit together, from the first one on."""
        cheapest = float(self._costs.min() if self.packed else self._totals(rows[:1]))
        # No more than these fit, so the totals of others need not be known.
        most = len(rows) if cheapest <= 0 else min(len(rows), budget // cheapest + 1)
        totals = self._totals(rows[: int(most)])
        return max(1, int(torch.searchsorted(totals, budget, right=True)))

    def _totals(self, rows: Tensor) -> Tensor:
        """Return the costs of the first row, of the first two, of the first three, ..."""
        if self.packed:
            return self._costs[rows].cumsum(0)
        if self.costs is None:
            widths = [each.widths(rows, self.multiple) for each in self.columns]
            dearest = torch.stack(widths).sum(0)
        else:
            dearest = self.costs[rows].cummax(0).values
        return dearest * torch.arange(1, len(rows) + 1)

    @property
    def _costs(self) -> Tensor:
        assert self.costs is not None, "packed rows have costs of their own"
        return self.costs

    def _kept(self, rows: Tensor) -> dict[int, slice] | None:
        if not self.columns:
            return None
        kept = {each: each.kept(rows, self.multiple) for each in self.columns}
        return {part: columns for each, columns in kept.items() for part in each.trimmed}
