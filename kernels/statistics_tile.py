"""Forward of the softmax family: what a tile of logits leaves of each row and column."""

from __future__ import annotations

import triton
import triton.language as tl

from gradcache_clip.kernels.competition import (
    RAGGED,
    biased,
    competing,
    equal,
    guide_tile,
    meets_diagonal,
    without_excluded,
)
from gradcache_clip.kernels.similarity import similarity_tile, tile_position, whole
from gradcache_clip.kernels.statistics_parts import (
    store_exact,
    store_nothing,
    store_sums,
    tile_reference,
)


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
    row_groups_ptr,
    column_groups_ptr,
    row_bias_ptr,
    column_bias_ptr,
    row_guide_threshold_ptr,
    column_guide_threshold_ptr,
    row_guide_ptr,
    column_guide_ptr,
    G,
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
                row_groups_ptr,
                column_groups_ptr,
                row_bias_ptr,
                column_bias_ptr,
                row_guide_threshold_ptr,
                column_guide_threshold_ptr,
                row_guide_ptr,
                column_guide_ptr,
                G,
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
    row_groups_ptr,
    column_groups_ptr,
    row_bias_ptr,
    column_bias_ptr,
    row_guide_threshold_ptr,
    column_guide_threshold_ptr,
    row_guide_ptr,
    column_guide_ptr,
    G,
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
    tile = biased(tile, row_bias_ptr, column_bias_ptr, tl.minimum(row, M - 1), column)
    guide = tile
    if row_guide_ptr is not None:
        guide = guide_tile(
            row_guide_ptr,
            column_guide_ptr,
            row_start,
            column_start,
            M,
            N,
            G,
            BLOCK_M,
            BLOCK_N,
            BLOCK_D,
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
    tile = without_excluded(
        tile,
        row_ids_ptr,
        column_ids_ptr,
        row_groups_ptr,
        column_groups_ptr,
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
    by_row = competing(tile, guide, row_threshold_ptr, row_guide_threshold_ptr, row_clamped, 1)
    # In 16 bits columns wait until the rows are stored, or sm_80 spills; in fp32 sm_120 would then.
    EARLY: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    by_column = tile
    if EARLY:
        by_column = competing(
            tile, guide, column_threshold_ptr, column_guide_threshold_ptr, column, 0
        )
    if EXACT:
        store_exact(row_part_ptr, row_plane, by_row, positives, row < M, 1)
        if column_parts_ptr is not None:
            if not EARLY:
                by_column = competing(
                    tile, guide, column_threshold_ptr, column_guide_threshold_ptr, column, 0
                )
            store_exact(column_part_ptr, column_plane, by_column, positives, column < N, 0)
        return 0
    reference = tile_reference(tile)
    terms = tl.exp2(tile - reference)
    of_row = _where_competing(terms, by_row, row_threshold_ptr, row_guide_threshold_ptr)
    small = store_sums(row_part_ptr, row_plane, of_row, reference, row < M, 1)
    if column_parts_ptr is not None:
        if not EARLY:
            by_column = competing(
                tile, guide, column_threshold_ptr, column_guide_threshold_ptr, column, 0
            )
        of_column = _where_competing(
            terms, by_column, column_threshold_ptr, column_guide_threshold_ptr
        )
        small |= store_sums(column_part_ptr, column_plane, of_column, reference, column < N, 0)
    return small


@triton.jit
def _where_competing(terms, tile, threshold_ptr, guide_threshold_ptr):
    if threshold_ptr is not None or guide_threshold_ptr is not None:
        terms = tl.where(tile > -float("inf"), terms, 0.0)
    return terms
