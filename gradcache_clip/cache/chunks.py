"""Chunks of a batch, and the state that each keeps between embed and replay."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradcache_clip.cache.random_state import RandomState


@dataclass
class Chunk:
    """Rows that go through an encoder at once."""

    rows: slice | Tensor
    """A range of the batch, or (after sorting) the indices of its rows."""
    trim: tuple[int, int] | None = None
    """(full, kept): tokens of a row, and how many of them this chunk needs; None keeps all."""
    trimmed: frozenset[int] = frozenset()
    """By id, the tensors of the batch of which it keeps only that many columns."""
    random_state: RandomState | None = None
    """The generators before its embed, if it drew from them and will be replayed."""
    graph: list[Tensor] | None = None
    """Its features with their graph, if that was retained: then it is never replayed."""

    def __len__(self) -> int:
        rows = self.rows
        return rows.stop - rows.start if isinstance(rows, slice) else len(rows)

    @property
    def size(self) -> int:
        """Tokens where the chunk is trimmed to its longest row, rows otherwise."""
        return len(self) * (1 if self.trim is None else self.trim[1])

    @property
    def name(self) -> str:
        """The rows, for error messages."""
        if isinstance(self.rows, Tensor):
            shown = ", ".join(map(str, self.rows[:8].tolist()))
            return f"rows {shown}" + (", ..." if len(self) > 8 else "")
        return f"rows {self.rows.start} to {self.rows.stop - 1}"


def even_chunks(rows: int, chunk_size: int, at_least: int = 1) -> list[Chunk]:
    """Cut rows into consecutive chunks, at least `at_least` of them if there are enough rows."""
    size = min(chunk_size, max(1, math.ceil(rows / at_least)))
    return [Chunk(slice(start, min(start + size, rows))) for start in range(0, rows, size)]


def merged(chunks: Sequence[Chunk]) -> Chunk:
    """Join consecutive chunks."""
    first, last = chunks[0], chunks[-1]
    trims = [chunk.trim for chunk in chunks if chunk.trim is not None]
    trim = max(trims) if len(trims) == len(chunks) else None
    if isinstance(first.rows, slice) and isinstance(last.rows, slice):
        return Chunk(slice(first.rows.start, last.rows.stop), trim, first.trimmed)
    rows = torch.cat([chunk.rows for chunk in chunks if isinstance(chunk.rows, Tensor)])
    return Chunk(rows, trim, first.trimmed)


def row_count(chunks: Sequence[Chunk]) -> int:
    """Count the rows of the batch."""
    last = chunks[-1].rows
    return last.stop if isinstance(last, slice) else sum(map(len, chunks))


def indices(chunk: Chunk) -> Tensor:
    """Return the row numbers of a chunk."""
    rows = chunk.rows
    return rows if isinstance(rows, Tensor) else torch.arange(rows.start, rows.stop)
