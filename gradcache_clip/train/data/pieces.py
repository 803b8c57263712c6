"""Pieces of batches, as workers send them, and filling a batch with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from gradcache_clip.train.data.broken import BrokenReport

Columns = Mapping[str, Tensor | list[Any]]
"""Fields of a batch, each with one entry per row."""


@dataclass(frozen=True)
class Piece:
    """Neighbouring rows of a batch, which a worker sends at once.

    Args:
        columns: of the rows that can be used.
        seen: samples that were read for them, broken ones included.
        broken: what was skipped.
        unfilled: rows for which no sample could be read.
        finished: shards of a stream that end here.
    """

    columns: Columns
    seen: int
    broken: Sequence[BrokenReport] = ()
    unfilled: int = 0
    finished: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))


class Filling:
    """Fills the columns of a batch in place, so that none is ever held twice.

    Copying also frees each piece's shared memory at once; thousands would exhaust file handles.
    """

    def __init__(self, rows: int) -> None:
        self.rows, self.filled = rows, 0
        self.columns: dict[str, Any] = {}

    @property
    def is_full(self) -> bool:
        return self.filled == self.rows

    def take(self, piece: Piece, start: int) -> int:
        """Copy rows of a piece from one on; returns the first that found no place."""
        stop = min(len(piece), start + self.rows - self.filled)
        for name, column in piece.columns.items():
            if isinstance(column, Tensor):
                if name not in self.columns:
                    self.columns[name] = column.new_empty(self.rows, *column.shape[1:])
                end = self.filled + stop - start
                self.columns[name][self.filled : end] = column[start:stop]
            else:
                self.columns.setdefault(name, []).extend(column[start:stop])
        self.filled += stop - start
        return stop
