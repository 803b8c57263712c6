"""Forward over several prefixes of the features: one tile of products that grows with the width.

M rows q_i, N columns k_j, P prefixes. S^p_ij = a^p_i b^p_j <q_i, k_j>_p with the product over the
first entries of both; the factors a and b hold the inverse norms of the prefixes, a the scale too.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradcache_clip.kernels.competition import RAGGED, meets_diagonal
from gradcache_clip.kernels.cuts import stripe_rows, tile_grid
from gradcache_clip.kernels.launch_config import (
    LaunchConfig,
    launch_options,
    prefix_config,
)
from gradcache_clip.kernels.panels import slices
from gradcache_clip.kernels.similarity import padded, tile_pointers, tile_position
from gradcache_clip.kernels.statistics_parts import Running, store_exact


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
    ends_ptr,
    positive_shift,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile: for each prefix, partials of its rows and of its columns.

    One loop over D with the epilogue in a branch: loads go on meanwhile, and fewer registers are
    needed than by a loop for each prefix, which spills.
    """
    tile_m, tile_n = tile_position(tl.program_id(0), rows, N, BLOCK_M, BLOCK_N, GROUP_M)
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
    q_ptrs, k_ptrs = tile_pointers(
        q_ptr, k_ptr, row_start, column_start, M, N, D, BLOCK_M, BLOCK_N, BLOCK_D
    )
    tile = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    prefix = 0
    end = tl.load(ends_ptr)
    for start in range(0, D, BLOCK_D):
        tile = tl.dot(tl.load(q_ptrs), tl.load(k_ptrs), tile, input_precision=PRECISION)
        q_ptrs += BLOCK_D
        k_ptrs += BLOCK_D
        if start + BLOCK_D == end:
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
            store_exact(part_ptr, row_plane, logits, None, row < M, 1, False)
            if column_parts_ptr is not None:
                part_ptr = column_part_ptr + 2 * prefix * column_plane
                store_exact(part_ptr, column_plane, logits, None, column < N, 0, False)
            prefix += 1
            end = tl.load(ends_ptr + prefix)


@cache
def _on_device(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    # Kept, because a copy from the host waits for the device.
    return torch.tensor(numbers, dtype=torch.int32, device=device)


class Segments:
    """Features with each segment between two widths padded to whole steps of the main loop."""

    def __init__(self, widths: Sequence[int], BLOCK_D: int) -> None:
        self.BLOCK_D, self.bounds = BLOCK_D, list(zip((0, *widths[:-1]), widths, strict=True))
        lengths = (triton.cdiv(b - a, BLOCK_D) * BLOCK_D for a, b in self.bounds)
        self.ends = tuple(accumulate(lengths))
        """Where each prefix ends in padded features."""

    def ends_on(self, device: torch.device) -> Tensor:
        """The ends on the device, and one beyond all."""
        return _on_device((*self.ends, -1), device)

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
    config = config or prefix_config(q, gradient=False)
    segments, P = Segments(widths, config.BLOCK_D), len(widths)
    q, k = segments.padded(q), segments.padded(k)
    (M, D), N = q.shape, len(k)
    stripe = min(stripe_rows(config, N * P), M)
    tiles_m, tiles_n = triton.cdiv(stripe, config.BLOCK_M), triton.cdiv(N, config.BLOCK_N)
    positive = torch.empty_like(row_factor)
    rows = Running.empty(row_factor, P, M, tiles_n * stripe, labelled=False)
    columns = None
    if both_ways:
        columns = Running.empty(column_factor, P, N, tiles_m * N, labelled=False)
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
                segments.ends_on(q.device),
                positive_shift,
                **launch_options(config),
            )
            rows.merge(where, tiles_n)
            if columns is not None:
                columns.merge(slice(0, N), triton.cdiv(size, config.BLOCK_M))
    return positive, rows.planes, None if columns is None else columns.planes
