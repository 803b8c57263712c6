"""Rows of a batch in the order of their length, and the chunks that they are cut into. B rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradcache_clip.cache.batch_tree import reordered
from gradcache_clip.cache.chunks import Chunk
from gradcache_clip.cache.columns import Columns


class InOrder(NamedTuple):
    """A batch whose rows stand in the order of its chunks, which are ranges of it."""

    inputs: Any
    chunks: list[Chunk]
    order: Tensor | None
    """(B,) numbers of the rows as they were passed; None if they stand as they were."""
    passed: dict[int, int]
    """By id of a part, the id of the one passed in whose place it stands."""


def in_order(inputs: Any, chunks: list[Chunk]) -> InOrder:
    numbers = [chunk.rows for chunk in chunks if isinstance(chunk.rows, Tensor)]
    if not numbers:
        return InOrder(inputs, chunks, None, {})
    order, moved, cut, start = torch.cat(numbers), dict[int, Any](), list[Chunk](), 0
    whole = reordered(inputs, order, moved)
    for chunk, rows in zip(chunks, numbers, strict=True):
        cut.append(replace(chunk, rows=slice(start, start + len(rows)), numbers=rows))
        start += len(rows)
    return InOrder(whole, cut, order, {id(part): passed for passed, part in moved.items()})


@dataclass(frozen=True, eq=False)
class SortedRows:
    """Rows from the longest to the shortest, what they cost, and the columns that they need."""

    order: Tensor
    """(B,) numbers of the rows."""
    columns: Sequence[Columns]
    """Of each mask, in that order."""
    multiple: int
    """A chunk keeps a multiple of this many columns, or all."""
    costs: Tensor | None
    """(B,) of each row, in that order; None counts the columns that a chunk keeps."""
    packed: bool
    """Whether a chunk costs the sum over its rows, and not each row as much as the dearest."""

    def chunks(self, most_rows: int, budget: int | None) -> list[Chunk]:
        """Cut off as many rows as the budget allows, again and again; one at least."""
        chunks, start = list[Chunk](), 0
        while start < len(self.order):
            rows = slice(start, min(start + most_rows, len(self.order)))
            if budget is not None:
                rows = slice(start, start + self._fitting(rows, budget))
            cost = max(1, int(self._totals(rows)[-1]))
            chunks.append(Chunk(self.order[rows], self._kept(rows), cost))
            start = rows.stop
        return chunks

    def _fitting(self, rows: slice, budget: int) -> int:
        """Count the rows that fit together, from the first one on."""
        count, first = rows.stop - rows.start, slice(rows.start, rows.start + 1)
        cheapest = float(self._costs.min() if self.packed else self._totals(first))
        # No more than these fit, so the totals of others need not be known.
        most = count if cheapest <= 0 else min(count, int(budget // cheapest) + 1)
        totals = self._totals(slice(rows.start, rows.start + most))
        return max(1, int(torch.searchsorted(totals, budget, right=True)))

    def _totals(self, rows: slice) -> Tensor:
        """Return the costs of the first row, of the first two, of the first three, ..."""
        if self.packed:
            return self._costs[rows].cumsum(0)
        if self.costs is None:
            widths = [each.widths(rows, self.multiple) for each in self.columns]
            dearest = torch.stack(widths).sum(0)
        else:
            dearest = self.costs[rows].cummax(0).values
        return dearest * torch.arange(1, len(dearest) + 1)

    @property
    def _costs(self) -> Tensor:
        assert self.costs is not None, "packed rows have costs of their own"
        return self.costs

    def _kept(self, rows: slice) -> dict[int, slice] | None:
        if not self.columns:
            return None
        kept = {each: each.kept(rows, self.multiple) for each in self.columns}
        return {part: columns for each, columns in kept.items() for part in each.trimmed}
