"""Forward of the CLIP loss: positive logits, and (max, sum of exp) of the negatives, both ways."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradcache_clip.kernels.launch_config import (
    LaunchConfig,
    launch_config,
    launch_options,
    stripe_rows,
    tile_grid,
)
from gradcache_clip.kernels.similarity import padded, similarity_tile, tile_position

# Columns of a merge block share a 128-byte line; its rows are the partials read at once.
_MERGE_WIDTH, _MERGE_DEPTH = 32, 64


@triton.jit
def _clip_statistics_kernel(
    q_ptr,
    k_ptr,
    logit_scale_ptr,
    positive_ptr,
    row_max_ptr,
    row_sum_ptr,
    column_max_ptr,
    column_sum_ptr,
    first_row,
    rows,
    N,
    D,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile: partials of its rows go to (tile_n, row), of its columns to (tile_m, column)."""
    tile_m, tile_n = tile_position(rows, N, BLOCK_M, BLOCK_N, GROUP_M)
    row_start = first_row + tile_m * BLOCK_M
    column_start = tile_n * BLOCK_N
    tile = similarity_tile(
        q_ptr,
        k_ptr,
        logit_scale_ptr,
        row_start,
        column_start,
        N,
        D,
        BLOCK_M,
        BLOCK_N,
        BLOCK_D,
        PRECISION,
    )
    row = row_start + tl.arange(0, BLOCK_M)
    column = column_start + tl.arange(0, BLOCK_N)
    if (row_start < column_start + BLOCK_N) & (column_start < row_start + BLOCK_M):
        diagonal = row[:, None] == column[None, :]
        positive = tl.sum(tl.where(diagonal, tile, 0.0), 1)
        here = (row >= column_start) & (row < column_start + BLOCK_N) & (row < N)
        tl.store(positive_ptr + row, positive, mask=here)
        tile = tl.where(diagonal, -float("inf"), tile)
    if (row_start + BLOCK_M > N) | (column_start + BLOCK_N > N):
        tile = tl.where((row[:, None] >= N) | (column[None, :] >= N), -float("inf"), tile)
    row_max = tl.max(tile, 1)
    column_max = tl.max(tile, 0)
    # Where everything is masked the maximum is -inf, and -inf - -inf would be NaN.
    row_reference = tl.where(row_max == -float("inf"), 0.0, row_max)
    column_reference = tl.where(column_max == -float("inf"), 0.0, column_max)
    row_sum = tl.sum(tl.exp2(tile - row_reference[:, None]), 1)
    column_sum = tl.sum(tl.exp2(tile - column_reference[None, :]), 0)

    row_part = tile_n.to(tl.int64) * rows + tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    tl.store(row_max_ptr + row_part, row_max, mask=row < N)
    tl.store(row_sum_ptr + row_part, row_sum, mask=row < N)
    column_part = tile_m.to(tl.int64) * N + column
    tl.store(column_max_ptr + column_part, column_max, mask=column < N)
    tl.store(column_sum_ptr + column_part, column_sum, mask=column < N)


@triton.jit
def _merge_kernel(
    part_max_ptr,
    part_sum_ptr,
    max_ptr,
    sum_ptr,
    parts,
    length,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Fold the partials (parts x length) into the running (max, sum), in a fixed order."""
    column = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    inside = column < length
    running_max = tl.load(max_ptr + column, mask=inside, other=-float("inf"))
    running_sum = tl.load(sum_ptr + column, mask=inside, other=0.0)
    for start in range(0, parts, DEPTH):
        part = start + tl.arange(0, DEPTH)
        offset = part[:, None].to(tl.int64) * length + column[None, :]
        mask = (part[:, None] < parts) & inside[None, :]
        part_max = tl.load(part_max_ptr + offset, mask=mask, other=-float("inf"))
        part_sum = tl.load(part_sum_ptr + offset, mask=mask, other=0.0)
        new_max = tl.maximum(running_max, tl.max(part_max, 0))
        reference = tl.where(new_max == -float("inf"), 0.0, new_max)
        running_sum = running_sum * tl.exp2(running_max - reference)
        running_sum += tl.sum(part_sum * tl.exp2(part_max - reference[None, :]), 0)
        running_max = new_max
    tl.store(max_ptr + column, running_max, mask=inside)
    tl.store(sum_ptr + column, running_sum, mask=inside)


@dataclass(frozen=True)
class _Running:
    """Maximum (in units of log 2) and sum of exp for each row or column, and partials to add."""

    max: Tensor
    sum: Tensor
    part_max: Tensor
    part_sum: Tensor

    @staticmethod
    def empty(positive: Tensor, size: int, parts: int) -> _Running:
        return _Running(
            max=positive.new_full((size,), -torch.inf),
            sum=positive.new_zeros(size),
            part_max=positive.new_empty(parts),
            part_sum=positive.new_empty(parts),
        )

    def merge(self, where: slice, parts: int) -> None:
        length = where.stop - where.start
        _merge_kernel[(triton.cdiv(length, _MERGE_WIDTH),)](
            self.part_max,
            self.part_sum,
            self.max[where],
            self.sum[where],
            parts,
            length,
            WIDTH=_MERGE_WIDTH,
            DEPTH=_MERGE_DEPTH,
            enable_fp_fusion=True,
        )


def clip_statistics(
    q: Tensor, k: Tensor, logit_scale: Tensor, *, config: LaunchConfig | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launch the forward: stripes of rows, each followed by two merges; no B x B tensor.

    Args:
        q: (B, D) contiguous, fp32, fp16 or bf16.
        k: like q.
        logit_scale: 0-dim, fp32, on the same device.
        config: launch parameters; those of the table when None.

    Returns:
        positive_logit, row_max, row_sum, column_max, column_sum: (B,) fp32. The last four are the
        maximum over the negatives and the sum of exp(S - maximum) over them; -inf and 0 if B = 1.
        Logit and maxima are in units of log 2.
    """
    config = config or launch_config(q)
    q, k = padded(q, config.BLOCK_D), padded(k, config.BLOCK_D)
    N, D = q.shape
    stripe = min(stripe_rows(config, N), N)
    tiles_m, tiles_n = triton.cdiv(stripe, config.BLOCK_M), triton.cdiv(N, config.BLOCK_N)
    positive = torch.empty(N, dtype=torch.float32, device=q.device)
    rows = _Running.empty(positive, N, tiles_n * stripe)
    columns = _Running.empty(positive, N, tiles_m * N)
    with torch.cuda.device_of(q):
        for start in range(0, N, stripe):
            size = min(stripe, N - start)
            _clip_statistics_kernel[tile_grid(config, size, N)](
                q,
                k,
                logit_scale,
                positive,
                rows.part_max,
                rows.part_sum,
                columns.part_max,
                columns.part_sum,
                start,
                size,
                N,
                D,
                **launch_options(config),
            )
            rows.merge(slice(start, start + size), tiles_n)
            columns.merge(slice(0, N), triton.cdiv(size, config.BLOCK_M))
    return positive, rows.max, rows.sum, columns.max, columns.sum
