"""Chunks of a batch, and the state that each keeps between embed and replay."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradcache_clip.cache.random_state import RandomState


@dataclass
class Chunk:
    """Rows that go through an encoder at once."""

    rows: slice | Tensor
    """A range of the batch as its tower holds it, or the indices of rows."""
    columns: Mapping[int, slice] | None = None
    """By id of a tensor that was passed, the columns that the chunk keeps; None keeps all."""
    cost: int | None = None
    """Tokens, or whatever else `ByLength` counts, padding included; None counts rows."""
    random_state: RandomState | None = None
    """The generators before its embed, if it drew from them and will be replayed."""
    numbers: Tensor | None = None
    """Of its rows among those that were passed, where the tower holds them in another order."""
    graph: list[Tensor] | None = None
    """Its features with their graph, if that was retained: then it is never replayed."""

    def __len__(self) -> int:
        rows = self.rows
        return rows.stop - rows.start if isinstance(rows, slice) else len(rows)

    @property
    def span(self) -> slice:
        """Its rows as a range, as those of a tower's chunks are."""
        assert isinstance(self.rows, slice), "towers hold rows in the order of their chunks"
        return self.rows

    @property
    def size(self) -> int:
        """Its cost where that is known, rows otherwise."""
        return len(self) if self.cost is None else self.cost

    @property
    def name(self) -> str:
        """The rows as they were passed, for error messages."""
        rows = self.rows if self.numbers is None else self.numbers
        if isinstance(rows, Tensor):
            shown = ", ".join(map(str, rows[:8].tolist()))
            return f"rows {shown}" + (", ..." if len(self) > 8 else "")
        return f"rows {rows.start} to {rows.stop - 1}"


def even_chunks(rows: int, chunk_size: int, at_least: int = 1) -> list[Chunk]:
    """Cut rows into consecutive chunks, at least `at_least` of them if there are enough rows."""
    size = min(chunk_size, max(1, math.ceil(rows / at_least)))
    return [Chunk(slice(start, min(start + size, rows))) for start in range(0, rows, size)]


def merged(chunks: Sequence[Chunk]) -> Chunk:
    """Join consecutive chunks."""
    rows = slice(chunks[0].span.start, chunks[-1].span.stop)
    if chunks[0].numbers is None:
        return Chunk(rows)
    numbers = torch.cat([chunk.numbers for chunk in chunks if chunk.numbers is not None])
    most = max(-(-chunk.size // len(chunk)) for chunk in chunks)
    cost = None if chunks[0].cost is None else most * len(numbers)
    return Chunk(rows, all_columns(chunks), cost, numbers=numbers)


def all_columns(chunks: Sequence[Chunk]) -> dict[int, slice] | None:
    """Keep the columns that any of the chunks keeps."""
    kept = [chunk.columns for chunk in chunks if chunk.columns is not None]
    if len(kept) < len(chunks):
        return None
    return {
        part: slice(min(each[part].start for each in kept), max(each[part].stop for each in kept))
        for part in kept[0]
    }


def row_count(chunks: Sequence[Chunk]) -> int:
    """Count the rows of the batch."""
    last = chunks[-1].rows
    return last.stop if isinstance(last, slice) else sum(map(len, chunks))


def indices(chunk: Chunk) -> Tensor:
    """Return the row numbers of a chunk."""
    rows = chunk.rows
    return rows if isinstance(rows, Tensor) else torch.arange(rows.start, rows.stop)
