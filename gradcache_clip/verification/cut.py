"""Cut a batch for the steps of a verification: small chunks, and the same rows in another order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gradcache_clip.cache.batch_tree import count_rows
from gradcache_clip.cache.checks import module_for_each, one_for_each
from gradcache_clip.cache.chunks import Chunk, indices, row_count
from gradcache_clip.cache.prepare import divided
from gradcache_clip.cache.settings import Settings

# Over a single chunk nothing could go wrong.
_AT_LEAST_CHUNKS = 4

Cut = list[list[Chunk]]
"""The chunks of every input."""


def reversed_rows(cut: Cut) -> Cut:
    """The whole batch, last row first: the same sums in another order."""
    return [[Chunk(torch.arange(row_count(chunks) - 1, -1, -1))] for chunks in cut]


def reversed_chunks(cut: Cut) -> Cut:
    """The last chunk first."""
    return [chunks[::-1] for chunks in cut]


def with_small_chunks(plan: Settings, inputs: Sequence[Any]) -> Settings:
    """Cut each input into several chunks, and keep one graph at most."""
    module_for_each(plan.encoders, len(inputs))
    inputs = divided(plan, inputs)
    rows = [count_rows(given, f"input {index}") for index, given in enumerate(inputs)]
    wished = rows if plan.chunk_size == "auto" else plan.chunk_size
    sizes = one_for_each(wished, len(inputs), "chunk_size")
    sorting = one_for_each(plan.sort_by_length, len(inputs), "sort_by_length")
    return replace(
        plan,
        chunk_size=tuple(map(min, sizes, map(_small_size, rows))),
        sort_by_length=[each and each.with_budget(None) for each in sorting],
        memory_budget=None,
    )


def _small_size(rows: int) -> int:
    size = max(1, -(-rows // _AT_LEAST_CHUNKS))
    # Batch norm refuses a last chunk of one row.
    return size + 1 if size > 1 and rows % size == 1 else size


def in_order(feature: Tensor, chunks: Sequence[Chunk]) -> Tensor:
    if all(isinstance(chunk.rows, slice) for chunk in chunks):
        starts = [chunk.rows.start for chunk in chunks if isinstance(chunk.rows, slice)]
        if starts == sorted(starts):
            return feature
    order = torch.cat([indices(chunk) for chunk in chunks])
    return feature[order.argsort().to(feature.device)]
