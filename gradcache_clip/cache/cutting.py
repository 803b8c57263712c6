"""The batch of a step, cut into the chunks of every input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gradcache_clip.cache.batch_tree import count_rows
from gradcache_clip.cache.chunks import Chunk, even_chunks
from gradcache_clip.cache.lengths import ByLength


def cut_all(
    inputs: Sequence[Any],
    sizes: Sequence[int],
    sorting: Sequence[ByLength | None],
    *,
    two_at_least: bool,
) -> list[list[Chunk]]:
    """Chunks of the given sizes; with `two_at_least` of every input, unless all have just one."""
    names = [f"input {index}" for index in range(len(inputs))]
    rows = [count_rows(given, name) for given, name in zip(inputs, names, strict=True)]

    def chunks(at_least: int) -> list[list[Chunk]]:
        return [
            even_chunks(count, size, at_least)
            if by_length is None
            else by_length.chunks(given, size, at_least, name)
            for given, size, by_length, count, name in zip(
                inputs, sizes, sorting, rows, names, strict=True
            )
        ]

    cut = chunks(1)
    # The first and the last replay under such a strategy carry a chunk of every input.
    several = two_at_least and any(len(each) > 1 for each in cut)
    return chunks(2) if several else cut
