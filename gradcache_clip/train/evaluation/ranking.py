"""Ranks of correct candidates, computed tile by tile; all retrieval metrics derive from them.

Q queries, C candidates, D feature width; a sample has one vector, or one per token.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gradcache_clip.train.evaluation.features import (
    Features,
    TokenFeatures,
    longest_of,
    scores_of,
    width_of,
)

if TYPE_CHECKING:
    from jaxtyping import Int

# Sums of the same products in different order differ by a few units in the last place.
ROUNDING = 8 * torch.finfo(torch.float32).eps


@torch.no_grad()
def ranks_of_best_right(
    queries: Features,
    query_ids: Int[Tensor, " q"],
    candidates: Features,
    candidate_ids: Int[Tensor, " c"],
    *,
    tile: int,
) -> Int[Tensor, " q"]:
    """Return 1 + the number of wrong candidates that score at least as high as the best right one.

    A candidate is right if its id equals the query's. "At least as high" allows for fp32 rounding
    (about 1e-6 times both norms), so equal features tie whatever tile they are in. A query without
    a right candidate ranks C + 1.

    Computes the score matrix twice, for the best right scores and for the counts, in blocks of
    tile x tile.
    """
    with exact_fp32(queries.device):
        longest = max(float(longest_of(block.float()).max()) for block in candidates.split(tile))
        parts = [
            _ranks(rows.float(), ids, candidates, candidate_ids, tile, longest)
            for rows, ids in zip(queries.split(tile), query_ids.split(tile), strict=True)
        ]
    return torch.cat(parts)


def _ranks(
    queries: Features,
    ids: Tensor,
    candidates: Features,
    candidate_ids: Tensor,
    tile: int,
    longest: float,
) -> Tensor:
    best = torch.full((len(queries),), -torch.inf, device=queries.device)
    for scores, right in _tiles(queries, ids, candidates, candidate_ids, tile):
        best = torch.maximum(best, scores.masked_fill_(~right, -torch.inf).amax(1))
    threshold = (best - ROUNDING * longest * longest_of(queries))[:, None]
    ranks = torch.ones_like(ids)
    for scores, right in _tiles(queries, ids, candidates, candidate_ids, tile):
        ranks += ((scores >= threshold) & ~right).sum(1)
    return ranks


def _tiles(
    queries: Features, ids: Tensor, candidates: Features, candidate_ids: Tensor, tile: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield scores of the queries with each block of candidates, and which are right."""
    for block, block_ids in zip(candidates.split(tile), candidate_ids.split(tile), strict=True):
        yield scores_of(queries, block), ids[:, None] == block_ids[None, :]


@contextmanager
def exact_fp32(device: torch.device) -> Iterator[None]:
    """Compute matrix products in true fp32, regardless of autocast and TF32 settings."""
    backends: list[Any] = [torch.backends.cuda.matmul]
    backends.append(getattr(torch.backends.mkldnn, "matmul", None))
    switches = [backend for backend in backends if hasattr(backend, "fp32_precision")]
    before = [backend.fp32_precision for backend in switches]
    # torch before 2.9 has one switch for all backends.
    legacy = None if switches else torch.get_float32_matmul_precision()
    try:
        for backend in switches:
            backend.fp32_precision = "ieee"
        if legacy:
            torch.set_float32_matmul_precision("highest")
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, precision in zip(switches, before, strict=True):
            backend.fp32_precision = precision
        if legacy:
            torch.set_float32_matmul_precision(legacy)


def chance_of_hit(query_ids: Int[Tensor, " q"], candidate_ids: Int[Tensor, " c"], k: int) -> float:
    """Return the mean probability that k random candidates include a right one.

    With r right ones among C:  1 - binomial(C - r, k) / binomial(C, k).
    """
    values, inverse = torch.unique(query_ids, return_inverse=True)
    position = torch.searchsorted(values, candidate_ids).clamp_(max=len(values) - 1)
    position = position[values[position] == candidate_ids]
    right = torch.bincount(position, minlength=len(values))[inverse]
    counts, times = torch.unique(right, return_counts=True)
    missed = [
        queries * _chance_of_miss(len(candidate_ids), count, k)
        for count, queries in zip(counts.tolist(), times.tolist(), strict=True)
    ]
    return 1 - math.fsum(missed) / len(query_ids)


def _chance_of_miss(total: int, right: int, k: int) -> float:
    drawn = min(k, total)
    return math.comb(total - right, drawn) / math.comb(total, drawn)


def recall_of(ranks: Int[Tensor, " q"], ks: Sequence[int]) -> dict[int, float]:
    """Return k -> share of ranks of k or better."""
    check_depths(ks)
    return {k: float((ranks <= k).double().mean()) for k in ks}


def check_depths(ks: Sequence[int]) -> None:
    if not ks or min(ks) < 1:
        raise ValueError(f"ks: expected depths of 1 or more, got {tuple(ks)}; pass e.g. ks=(1, 5)")


def check_features(name: str, features: Features, tile: int) -> None:
    """Raise ValueError for wrong dimensions, no rows, NaN or infinity; checks tile by tile."""
    if tile < 1:
        raise ValueError(f"tile: expected a positive integer, got {tile}; pass e.g. tile=1024")
    if isinstance(features, TokenFeatures):
        features = features.vectors.flatten(1)
    if features.ndim != 2 or features.shape[1] == 0 or not features.is_floating_point():
        raise ValueError(
            f"{name}: expected a floating-point tensor of shape (rows, width), got "
            f"{tuple(features.shape)} of {features.dtype}; pass one row per sample"
        )
    if len(features) == 0:
        raise ValueError(f"{name}: expected at least one row, got none; the set is empty")
    for start, block in zip(range(0, len(features), tile), features.split(tile), strict=True):
        lowest, highest = block.aminmax(dim=1)
        finite = lowest.isfinite() & highest.isfinite()
        if not finite.all():
            row = start + int((~finite).nonzero()[0])
            raise ValueError(
                f"{name}: expected finite numbers, got NaN or infinity in row {row}; the encoder "
                "diverged or the input is broken: lower the learning rate or inspect that sample"
            )


def check_sizes(name: str, features: Features, other_name: str, other: Features) -> None:
    if isinstance(features, TokenFeatures) != isinstance(other, TokenFeatures):
        raise ValueError(
            f"{other_name}: expected {type(features).__name__} as {name}, got "
            f"{type(other).__name__}; pass the outputs of one model"
        )
    width, other_width = width_of(features), width_of(other)
    if width != other_width or features.device != other.device:
        raise ValueError(
            f"{other_name}: expected width {width} on {features.device} as "
            f"{name}, got width {other_width} on {other.device}; pass the outputs of one model"
        )


def check_ids(name: str, ids: Tensor, rows: Features, *, below: int | None = None) -> None:
    if ids.shape != (len(rows),) or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(
            f"{name}: expected {len(rows)} integers, one per row, got shape {tuple(ids.shape)} of "
            f"{ids.dtype}; pass e.g. torch.arange({len(rows)})"
        )
    if below is not None and not 0 <= int(ids.min()) <= int(ids.max()) < below:
        raise ValueError(
            f"{name}: expected indices from 0 to {below - 1}, got {int(ids.min())} to "
            f"{int(ids.max())}; pass the row of each class, counted from 0"
        )
