"""Forward of the softmax family: what one pass over the logits leaves of each row and column."""

from __future__ import annotations

from dataclasses import replace

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
    second_launch,
    stripe_rows,
    tile_grid,
)
from gradcache_clip.kernels.panels import slices
from gradcache_clip.kernels.similarity import padded, similarity_tile, tile_position, whole
from gradcache_clip.kernels.statistics_parts import (
    FLAGS_PER_PROGRAM,
    Running,
    store_exact,
    store_nothing,
    store_sums,
    tile_reference,
)

# Tiles of a program in the first launch and in the second.
_GROUPS = 1, FLAGS_PER_PROGRAM


@triton.jit(do_not_specialize=RAGGED)
def contrast_statistics_kernel(
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
    flags_ptr,
    first_row,
    first_column,
    rows,
    M,
    N,
    D,
    positive_shift,
    SELF: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile; or, of GROUP > 1 tiles, those with a flag, by the exact way.

    The exact way is also taken where there are no flags to set.
    """
    for offset in range(0, GROUP):
        index = tl.program_id(0) * GROUP + offset
        chosen = True
        if GROUP > 1:
            tiles = tl.cdiv(rows, BLOCK_M) * tl.cdiv(N - first_column, BLOCK_N)
            chosen = tl.load(flags_ptr + index, mask=index < tiles, other=0) != 0
        if chosen:
            flag = _statistics_of_tile(
                index,
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
                SELF,
                BLOCK_M,
                BLOCK_N,
                BLOCK_D,
                GROUP_M,
                PRECISION,
                flags_ptr is None or GROUP > 1,
            )
            if flags_ptr is not None and GROUP == 1:
                tl.store(flags_ptr + index, flag)


@triton.jit
def _statistics_of_tile(
    index,
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
    EXACT: tl.constexpr,
):
    """One tile: partials of its rows go to (tile_n, row), of its columns to (tile_m, column).

    Returns whether it is to be computed again, by the EXACT way.
    Of a self-contrast only what lies above the diagonal counts, for its rows and for its columns.
    """
    columns = N - first_column
    tile_m, tile_n = tile_position(index, rows, columns, BLOCK_M, BLOCK_N, GROUP_M)
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
        store_nothing(row_part_ptr, row_plane, row < M, BLOCK_M, LABELLED)
        store_nothing(column_part_ptr, column_plane, column < N, BLOCK_N, LABELLED)
        return 0
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
    by_column = up_to(tile, column_threshold_ptr, column, 0)
    if EXACT:
        store_exact(row_part_ptr, row_plane, by_row, positives, row < M, 1)
        if column_parts_ptr is not None:
            store_exact(column_part_ptr, column_plane, by_column, positives, column < N, 0)
        return 0
    reference = tile_reference(tile)
    terms = tl.exp2(tile - reference)
    of_row = _where_competing(terms, by_row, row_threshold_ptr)
    small = store_sums(row_part_ptr, row_plane, of_row, reference, row < M, 1)
    if column_parts_ptr is not None:
        of_column = _where_competing(terms, by_column, column_threshold_ptr)
        small |= store_sums(column_part_ptr, column_plane, of_column, reference, column < N, 0)
    return small


@triton.jit
def _where_competing(terms, tile, threshold_ptr):
    if threshold_ptr is not None:
        terms = tl.where(tile > -float("inf"), terms, 0.0)
    return terms


def contrast_statistics(
    q: Tensor,
    k: Tensor,
    logit_scale: Tensor,
    competition: Competition,
    *,
    maxima: bool = True,
    config: LaunchConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Launch the forward: stripes of rows, each followed by its merges; no M x N tensor.

    Args:
        q: (M, D) contiguous, fp32, fp16 or bf16.
        k: (N, D), like q; q itself in a self-contrast.
        logit_scale: 0-dim, fp32, on the same device.
        competition: which logits are positives and which compete.
        maxima: whether the references are to be the maxima; with labels they always are.
        config: launch parameters; those of the table when None.

    Returns:
        positive: (M,) fp32, the positive logits; empty with labels.
        rows: (planes, M) fp32: a reference r and the sum of exp(S - r) over what competes, of the
            negatives alone without labels (-inf and 0 if there are none); with labels also the sum
            of the positive logits, and the maximum over the negatives.
        columns: (planes, N), the same for columns; None unless both ways.
        Logits and references are in units of log 2.
    """
    config = config or launch_config(q, plain=competition.plain)
    q, k = padded(q, config.BLOCK_D), padded(k, config.BLOCK_D)
    M, (N, D) = len(q), k.shape
    labelled, self_contrast = competition.labelled, competition.self_contrast
    stripe = min(stripe_rows(config, N, numbers=4 if labelled else 2), M)
    positive = logit_scale.new_empty(0 if labelled else M)
    rows, columns = _running(logit_scale, M, N, stripe, competition, config)
    flags = None
    if not (maxima or labelled):
        flags = q.new_empty(tile_grid(config, stripe, N), dtype=torch.int32)
    written = positive, rows.parts, columns and columns.parts, flags
    vectors = competition.vectors(config.BLOCK_N)
    with torch.cuda.device_of(q):
        for part in slices(M, stripe):
            height, first_column = part.stop - part.start, part.start if self_contrast else 0
            sizes = part.start, first_column, height, M, N, D, competition.positive_shift
            (tiles,) = tile_grid(config, height, N - first_column)
            for group in _GROUPS[: 1 if flags is None else 2]:
                options = launch_options(config if group == 1 else second_launch(config))
                contrast_statistics_kernel[(triton.cdiv(tiles, group),)](
                    *(q, k, logit_scale, *vectors, *written, *sizes),
                    SELF=self_contrast,
                    GROUP=group,
                    **options,
                )
            rows.merge(part, triton.cdiv(N - first_column, config.BLOCK_N))
            if columns is not None:
                columns.merge(slice(first_column, N), triton.cdiv(height, config.BLOCK_M))
    both = columns is not None and not self_contrast
    return positive, rows.planes[0], columns.planes[0] if both else None


def _running(
    logit_scale: Tensor, M: int, N: int, stripe: int, rules: Competition, config: LaunchConfig
) -> tuple[Running, Running | None]:
    """Statistics of rows and columns with nothing in them; of a self-contrast they are the same."""
    row_parts = triton.cdiv(N, config.BLOCK_N) * stripe
    column_parts = triton.cdiv(stripe, config.BLOCK_M) * N
    rows = Running.empty(logit_scale, 1, M, row_parts, labelled=rules.labelled)
    if not rules.both_ways and not rules.self_contrast:
        return rows, None
    columns = Running.empty(logit_scale, 1, N, column_parts, labelled=rules.labelled)
    return rows, replace(columns, planes=rows.planes) if rules.self_contrast else columns
