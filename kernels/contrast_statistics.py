"""Forward of the softmax family: what one pass over the logits leaves of each row and column."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradcache_clip.kernels.competition import (
    RAGGED,
    Competition,
    equal,
    meets_diagonal,
    up_to,
    without_equal_ids,
)
from gradcache_clip.kernels.launch_config import (
    LaunchConfig,
    launch_config,
    launch_options,
    stripe_rows,
    tile_grid,
)
from gradcache_clip.kernels.panels import slices
from gradcache_clip.kernels.similarity import padded, similarity_tile, tile_position, whole

# Columns of a merge block share a 128-byte line; its rows are the partials read at once.
_MERGE_WIDTH, _MERGE_DEPTH = 32, 64


@triton.jit(do_not_specialize=RAGGED)
def _contrast_statistics_kernel(
    q_ptr,
    k_ptr,
    logit_scale_ptr,
    row_labels_ptr,
    column_labels_ptr,
    row_ids_ptr,
    column_ids_ptr,
    row_threshold_ptr,
    column_threshold_ptr,
    positive_ptr,
    row_parts_ptr,
    column_parts_ptr,
    first_row,
    first_column,
    rows,
    M,
    N,
    D,
    positive_shift,
    SELF: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile: partials of its rows go to (tile_n, row), of its columns to (tile_m, column).

    Of a self-contrast only what lies above the diagonal counts, for its rows and for its columns.
    """
    columns = N - first_column
    tile_m, tile_n = tile_position(rows, columns, BLOCK_M, BLOCK_N, GROUP_M)
    row_start = whole(first_row) + tile_m * BLOCK_M
    column_start = whole(first_column) + tile_n * BLOCK_N
    row = row_start + tl.arange(0, BLOCK_M)
    column = column_start + tl.arange(0, BLOCK_N)
    row_plane = tl.cdiv(columns, BLOCK_N).to(tl.int64) * rows
    row_part_ptr = row_parts_ptr + tile_n.to(tl.int64) * rows + (row - first_row)
    if column_parts_ptr is not None:
        column_plane = tl.cdiv(rows, BLOCK_M).to(tl.int64) * columns
        column_part_ptr = column_parts_ptr + tile_m.to(tl.int64) * columns + (column - first_column)
    LABELLED: tl.constexpr = row_labels_ptr is not None
    if SELF and column_start + BLOCK_N <= row_start + 1:
        _store_nothing(row_part_ptr, row_plane, row < M, BLOCK_M, LABELLED)
        _store_nothing(column_part_ptr, column_plane, column < N, BLOCK_N, LABELLED)
        return
    tile = similarity_tile(
        q_ptr,
        k_ptr,
        logit_scale_ptr,
        row_start,
        column_start,
        M,
        N,
        D,
        BLOCK_M,
        BLOCK_N,
        BLOCK_D,
        PRECISION,
    )
    if not LABELLED:
        near = meets_diagonal(row_start, column_start, positive_shift, BLOCK_M, BLOCK_N)
        if not SELF:
            near |= meets_diagonal(row_start, column_start, positive_shift - N, BLOCK_M, BLOCK_N)
        if near:
            positive_column = row + positive_shift
            if not SELF:
                positive_column = tl.where(
                    positive_column < N, positive_column, positive_column - N
                )
            positives = positive_column[:, None] == column[None, :]
            positive = tl.sum(tl.where(positives, tile, 0.0), 1)
            here = (positive_column >= column_start) & (positive_column < column_start + BLOCK_N)
            here &= (row < M) & (positive_column < N)
            tl.store(positive_ptr + row, positive, mask=here)
            if SELF:
                tl.store(positive_ptr + positive_column, positive, mask=here)
            tile = tl.where(positives, -float("inf"), tile)
    if SELF and column_start < row_start + BLOCK_M:
        tile = tl.where(column[None, :] <= row[:, None], -float("inf"), tile)
    if (row_start + BLOCK_M > M) | (column_start + BLOCK_N > N):
        tile = tl.where((row[:, None] >= M) | (column[None, :] >= N), -float("inf"), tile)
    # Rows from M on repeat the last; vectors of columns are longer than N.
    row_clamped = tl.minimum(row, M - 1)
    if row_ids_ptr is not None:
        tile = without_equal_ids(
            tile,
            row_ids_ptr,
            column_ids_ptr,
            row_labels_ptr,
            column_labels_ptr,
            row_clamped,
            column,
        )
    positives = None
    if LABELLED:
        # What is out by now, a repeated row for one, is no positive either.
        positives = equal(row_labels_ptr, column_labels_ptr, row_clamped, column)
        positives &= tile > -float("inf")
    by_row = up_to(tile, row_threshold_ptr, row_clamped, 1)
    _store_statistics(row_part_ptr, row_plane, by_row, positives, row < M, 1)
    if column_parts_ptr is not None:
        by_column = up_to(tile, column_threshold_ptr, column, 0)
        _store_statistics(column_part_ptr, column_plane, by_column, positives, column < N, 0)


@triton.jit
def _store_statistics(part_ptr, plane, tile, positives, mask, AXIS: tl.constexpr):
    """Maximum and sum of exp along one axis; with labels, positives' sum and hardest negative."""
    if positives is not None:
        positive = tl.sum(tl.where(positives, tile, 0.0), AXIS)
        hardest = tl.max(tl.where(positives, -float("inf"), tile), AXIS)
        tl.store(part_ptr + 2 * plane, positive, mask=mask)
        tl.store(part_ptr + 3 * plane, hardest, mask=mask)
    maximum = tl.max(tile, AXIS)
    # Where everything is masked the maximum is -inf, and -inf - -inf would be NaN.
    reference = tl.where(maximum == -float("inf"), 0.0, maximum)
    total = tl.sum(tl.exp2(tile - tl.expand_dims(reference, AXIS)), AXIS)
    tl.store(part_ptr, maximum, mask=mask)
    tl.store(part_ptr + plane, total, mask=mask)


@triton.jit
def _store_nothing(part_ptr, plane, mask, SIZE: tl.constexpr, LABELLED: tl.constexpr):
    """What a tile leaves in which nothing competes."""
    zero = tl.zeros((SIZE,), dtype=tl.float32)
    tl.store(part_ptr, zero - float("inf"), mask=mask)
    tl.store(part_ptr + plane, zero, mask=mask)
    if LABELLED:
        tl.store(part_ptr + 2 * plane, zero, mask=mask)
        tl.store(part_ptr + 3 * plane, zero - float("inf"), mask=mask)


@triton.jit(do_not_specialize=[*RAGGED, "parts_ptr", "running_ptr"])
def _merge_kernel(
    parts_ptr,
    running_ptr,
    parts,
    length,
    running_plane,
    LABELLED: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Fold the partials (planes x parts x length) into the running statistics, in a fixed order."""
    column = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    inside = column < length
    plane = parts.to(tl.int64) * length
    running_ptr += column
    running_max = tl.load(running_ptr, mask=inside, other=-float("inf"))
    running_sum = tl.load(running_ptr + running_plane, mask=inside, other=0.0)
    if LABELLED:
        positive = tl.load(running_ptr + 2 * running_plane, mask=inside, other=0.0)
        hardest = tl.load(running_ptr + 3 * running_plane, mask=inside, other=-float("inf"))
    for start in range(0, parts, DEPTH):
        part = start + tl.arange(0, DEPTH)
        offset = part[:, None].to(tl.int64) * length + column[None, :]
        mask = (part[:, None] < parts) & inside[None, :]
        part_max = tl.load(parts_ptr + offset, mask=mask, other=-float("inf"))
        part_sum = tl.load(parts_ptr + plane + offset, mask=mask, other=0.0)
        new_max = tl.maximum(running_max, tl.max(part_max, 0))
        reference = tl.where(new_max == -float("inf"), 0.0, new_max)
        running_sum = running_sum * tl.exp2(running_max - reference)
        running_sum += tl.sum(part_sum * tl.exp2(part_max - reference[None, :]), 0)
        running_max = new_max
        if LABELLED:
            part_positive = tl.load(parts_ptr + 2 * plane + offset, mask=mask, other=0.0)
            part_hardest = tl.load(parts_ptr + 3 * plane + offset, mask=mask, other=-float("inf"))
            positive += tl.sum(part_positive, 0)
            hardest = tl.maximum(hardest, tl.max(part_hardest, 0))
    tl.store(running_ptr, running_max, mask=inside)
    tl.store(running_ptr + running_plane, running_sum, mask=inside)
    if LABELLED:
        tl.store(running_ptr + 2 * running_plane, positive, mask=inside)
        tl.store(running_ptr + 3 * running_plane, hardest, mask=inside)


@dataclass(frozen=True)
class _Running:
    """Statistics of all rows, or of all columns, and the partials of a stripe to add to them.

    Planes: maximum in units of log 2, sum of exp; with labels the positives' sum, hardest negative.
    """

    planes: Tensor
    parts: Tensor

    @staticmethod
    def empty(logit_scale: Tensor, size: int, labelled: bool) -> Tensor:
        planes = logit_scale.new_zeros(4 if labelled else 2, size)
        planes[::3] = -torch.inf
        return planes

    def merge(self, where: slice, parts: int) -> None:
        length = where.stop - where.start
        _merge_kernel[(triton.cdiv(length, _MERGE_WIDTH),)](
            self.parts,
            self.planes[:, where],
            parts,
            length,
            self.planes.shape[1],
            LABELLED=len(self.planes) == 4,
            WIDTH=_MERGE_WIDTH,
            DEPTH=_MERGE_DEPTH,
            enable_fp_fusion=True,
        )


def contrast_statistics(
    q: Tensor,
    k: Tensor,
    logit_scale: Tensor,
    competition: Competition,
    *,
    config: LaunchConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Launch the forward: stripes of rows, each followed by its merges; no M x N tensor.

    Args:
        q: (M, D) contiguous, fp32, fp16 or bf16.
        k: (N, D), like q; q itself in a self-contrast.
        logit_scale: 0-dim, fp32, on the same device.
        competition: which logits are positives and which compete.
        config: launch parameters; those of the table when None.

    Returns:
        positive: (M,) fp32, the positive logits; empty with labels.
        rows: (planes, M) fp32: maximum over what competes and sum of exp(S - maximum), of the
            negatives alone without labels (-inf and 0 if there are none); with labels also the sum
            of the positive logits, and the maximum over the negatives.
        columns: (planes, N), the same for columns; None unless both ways.
        Logits and maxima are in units of log 2.
    """
    config = config or launch_config(q, plain=competition.plain)
    q, k = padded(q, config.BLOCK_D), padded(k, config.BLOCK_D)
    M, (N, D) = len(q), k.shape
    labelled, self_contrast = competition.labelled, competition.self_contrast
    stripe = min(stripe_rows(config, N, numbers=4 if labelled else 2), M)
    positive = logit_scale.new_empty(0 if labelled else M)
    rows, columns = _running(logit_scale, M, N, stripe, competition, config)
    vectors = competition.vectors(config.BLOCK_N)
    with torch.cuda.device_of(q):
        for part in slices(M, stripe):
            height, first_column = part.stop - part.start, part.start if self_contrast else 0
            _contrast_statistics_kernel[tile_grid(config, height, N - first_column)](
                q,
                k,
                logit_scale,
                *vectors,
                positive,
                rows.parts,
                columns and columns.parts,
                part.start,
                first_column,
                height,
                M,
                N,
                D,
                competition.positive_shift,
                SELF=self_contrast,
                **launch_options(config),
            )
            rows.merge(part, triton.cdiv(N - first_column, config.BLOCK_N))
            if columns is not None:
                columns.merge(slice(first_column, N), triton.cdiv(height, config.BLOCK_M))
    return positive, rows.planes, columns.planes if columns and not self_contrast else None


def _running(
    logit_scale: Tensor, M: int, N: int, stripe: int, rules: Competition, config: LaunchConfig
) -> tuple[_Running, _Running | None]:
    """Statistics of rows and columns with nothing in them; of a self-contrast they are the same."""
    rows = _Running.empty(logit_scale, M, rules.labelled)
    numbers = len(rows)
    row_parts = logit_scale.new_empty(numbers * triton.cdiv(N, config.BLOCK_N) * stripe)
    column_parts = logit_scale.new_empty(numbers * triton.cdiv(stripe, config.BLOCK_M) * N)
    if rules.self_contrast:
        return _Running(rows, row_parts), _Running(rows, column_parts)
    if not rules.both_ways:
        return _Running(rows, row_parts), None
    columns = _Running.empty(logit_scale, N, rules.labelled)
    return _Running(rows, row_parts), _Running(columns, column_parts)
