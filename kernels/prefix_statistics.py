"""Forward over several prefixes of the features: one tile of products that grows with the width.

M rows q_i, N columns k_j, P prefixes. S^p_ij = a^p_i b^p_j <q_i, k_j>_p with the product over the
first entries of both; the factors a and b hold the inverse norms of the prefixes, a the scale too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradcache_clip.kernels.competition import RAGGED, meets_diagonal
from gradcache_clip.kernels.contrast_statistics import (
    _MERGE_DEPTH,
    _MERGE_WIDTH,
    _merge_kernel,
    _store_statistics,
)
from gradcache_clip.kernels.launch_config import (
    INTERPRETED,
    LaunchConfig,
    launch_config,
    launch_options,
    stripe_rows,
    tile_grid,
)
from gradcache_clip.kernels.panels import slices
from gradcache_clip.kernels.similarity import padded, tile_position


@triton.jit
def is_one_of(position, ENDS: tl.constexpr):
    """Whether a prefix ends at this position along D."""
    found = position == ENDS[0]
    for prefix in tl.static_range(1, len(ENDS)):
        found |= position == ENDS[prefix]
    return found


@triton.jit(do_not_specialize=RAGGED)
def _prefix_statistics_kernel(
    q_ptr,
    k_ptr,
    row_factor_ptr,
    column_factor_ptr,
    positive_ptr,
    row_parts_ptr,
    column_parts_ptr,
    first_row,
    rows,
    M,
    N,
    D,
    positive_shift,
    ENDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile: for each prefix, partials of its rows and of its columns.

    One loop over D with the epilogue in a branch: loads go on meanwhile, and fewer registers are
    needed than by a loop for each prefix.
    """
    tile_m, tile_n = tile_position(rows, N, BLOCK_M, BLOCK_N, GROUP_M)
    row_start, column_start = first_row + tile_m * BLOCK_M, tile_n * BLOCK_N
    row = row_start + tl.arange(0, BLOCK_M)
    column = column_start + tl.arange(0, BLOCK_N)
    # Clamped indices need fewer registers than masked loads.
    row_clamped, column_clamped = tl.minimum(row, M - 1), tl.minimum(column, N - 1)
    row_plane = tl.cdiv(N, BLOCK_N).to(tl.int64) * rows
    row_part_ptr = row_parts_ptr + tile_n.to(tl.int64) * rows + (row - first_row)
    if column_parts_ptr is not None:
        column_plane = tl.cdiv(rows, BLOCK_M).to(tl.int64) * N
        column_part_ptr = column_parts_ptr + tile_m.to(tl.int64) * N + column
    depth = tl.arange(0, BLOCK_D)
    q_offset = (row_clamped - row_start)[:, None] * D + depth[None, :]
    k_offset = (column_clamped - column_start)[None, :] * D + depth[:, None]
    q_ptrs = q_ptr + row_start.to(tl.int64) * D + q_offset
    k_ptrs = k_ptr + column_start.to(tl.int64) * D + k_offset
    tile = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    prefix = 0
    # Up to D, which the compiler does not know: it would unroll short loops, epilogues and all.
    for start in range(0, D, BLOCK_D):
        tile = tl.dot(tl.load(q_ptrs), tl.load(k_ptrs), tile, input_precision=PRECISION)
        q_ptrs += BLOCK_D
        k_ptrs += BLOCK_D
        if is_one_of(start + BLOCK_D, ENDS):
            row_factor = tl.load(row_factor_ptr + prefix * M + row_clamped)
            column_factor = tl.load(column_factor_ptr + prefix * N + column_clamped)
            logits = tile * row_factor[:, None] * column_factor[None, :]
            near = meets_diagonal(row_start, column_start, positive_shift, BLOCK_M, BLOCK_N)
            near |= meets_diagonal(row_start, column_start, positive_shift - N, BLOCK_M, BLOCK_N)
            if near:
                partner = row + positive_shift
                partner = tl.where(partner < N, partner, partner - N)
                positives = partner[:, None] == column[None, :]
                positive = tl.sum(tl.where(positives, logits, 0.0), 1)
                here = (partner >= column_start) & (partner < column_start + BLOCK_N) & (row < M)
                tl.store(positive_ptr + prefix * M + row, positive, mask=here)
                logits = tl.where(positives, -float("inf"), logits)
            if (row_start + BLOCK_M > M) | (column_start + BLOCK_N > N):
                outside = (row[:, None] >= M) | (column[None, :] >= N)
                logits = tl.where(outside, -float("inf"), logits)
            part_ptr = row_part_ptr + 2 * prefix * row_plane
            _store_statistics(part_ptr, row_plane, logits, None, row < M, 1)
            if column_parts_ptr is not None:
                part_ptr = column_part_ptr + 2 * prefix * column_plane
                _store_statistics(part_ptr, column_plane, logits, None, column < N, 0)
            prefix += 1


def prefix_config(config: LaunchConfig, dtype: torch.dtype) -> LaunchConfig:
    """Half the usual tile: beside a tile of S the products that go on stay in registers."""
    if INTERPRETED:
        return config
    if dtype == torch.float32:
        return replace(config, BLOCK_M=64, BLOCK_N=64, BLOCK_D=16, num_warps=8)
    return replace(config, BLOCK_M=128, BLOCK_N=64, BLOCK_D=32, num_warps=8)


class Segments:
    """Features with each segment between two widths padded to whole steps of the main loop."""

    def __init__(self, widths: Sequence[int], BLOCK_D: int) -> None:
        self.BLOCK_D, self.bounds = BLOCK_D, list(zip((0, *widths[:-1]), widths, strict=True))
        lengths = (triton.cdiv(b - a, BLOCK_D) * BLOCK_D for a, b in self.bounds)
        self.ends = tuple(accumulate(lengths))
        """Where each prefix ends in padded features."""

    def padded(self, features: Tensor) -> Tensor:
        """One copy, or none where every segment is whole already."""
        stop = self.bounds[-1][1]
        if self.ends[-1] == stop:
            return features[:, :stop].contiguous()
        return torch.cat([padded(features[:, a:b], self.BLOCK_D) for a, b in self.bounds], 1)


def prefix_statistics(
    q: Tensor,
    k: Tensor,
    row_factor: Tensor,
    column_factor: Tensor,
    widths: Sequence[int],
    positive_shift: int,
    both_ways: bool,
    *,
    config: LaunchConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Launch the forward: stripes of rows, each followed by the merges; no M x N tensor.

    Args:
        q: (M, D), fp32, fp16 or bf16.
        k: (N, D), like q.
        row_factor: (P, M) fp32, contiguous; S comes out in units of log 2.
        column_factor: (P, N) fp32, contiguous.
        widths: P increasing widths, the last at most D.
        positive_shift: the positive of row i is column (i + positive_shift) mod N.
        both_ways: whether columns are wanted.
        config: launch parameters; those of `prefix_config` when None.

    Returns:
        Positive logits (P, M); maximum over the negatives and sum of exp(S - maximum) over them of
        each row (P, 2, M) and of each column (P, 2, N) or None. Logits in units of log 2.
    """
    config = config or prefix_config(launch_config(q), q.dtype)
    segments, P = Segments(widths, config.BLOCK_D), len(widths)
    q, k = segments.padded(q), segments.padded(k)
    (M, D), N = q.shape, len(k)
    stripe = min(stripe_rows(config, N * P), M)
    tiles_m, tiles_n = triton.cdiv(stripe, config.BLOCK_M), triton.cdiv(N, config.BLOCK_N)
    positive = torch.empty_like(row_factor)
    rows = _Running(row_factor, tiles_n * stripe)
    columns = _Running(column_factor, tiles_m * N) if both_ways else None
    with torch.cuda.device_of(q):
        for where in slices(M, stripe):
            size = where.stop - where.start
            _prefix_statistics_kernel[tile_grid(config, size, N)](
                q,
                k,
                row_factor,
                column_factor,
                positive,
                rows.parts,
                None if columns is None else columns.parts,
                where.start,
                size,
                M,
                N,
                D,
                positive_shift,
                ENDS=segments.ends,
                **launch_options(config),
            )
            rows.merge(where, tiles_n)
            if columns is not None:
                columns.merge(slice(0, N), triton.cdiv(size, config.BLOCK_M))
    return positive, rows.running, None if columns is None else columns.running


class _Running:
    """Maximum and sum of exp of each row or column of each prefix, and partials to add."""

    def __init__(self, factor: Tensor, parts: int) -> None:
        P, size = factor.shape
        self.running = factor.new_zeros(P, 2, size)
        self.running[:, 0] = -torch.inf
        self.parts = factor.new_empty(2 * P * parts)

    def merge(self, where: slice, parts: int) -> None:
        length = where.stop - where.start
        for prefix, running in enumerate(self.running):
            _merge_kernel[(triton.cdiv(length, _MERGE_WIDTH),)](
                self.parts[2 * prefix * parts * length :],
                running[:, where],
                parts,
                length,
                running.shape[1],
                LABELLED=False,
                WIDTH=_MERGE_WIDTH,
                DEPTH=_MERGE_DEPTH,
                enable_fp_fusion=True,
            )
