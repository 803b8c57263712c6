"""Forward of the softmax family: what a tile of logits leaves of each row and column."""

from __future__ import annotations

import triton
import triton.language as tl

from gradcache_clip.kernels.competition import (
    biased,
    competing,
    equal,
    guide_tile,
    meets_diagonal,
    without_excluded,
)
from gradcache_clip.kernels.statistics_parts import store_exact, store_sums, tile_reference


@triton.jit
def store_statistics(
    tile,
    tile_m,
    tile_n,
    row_start,
    column_start,
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
    columns,
    M,
    N,
    positive_shift,
    SELF: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STACKED: tl.constexpr,
    WIDE: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Partials of the rows of a tile of S, BLOCK_M x WIDTH, and of its columns.

    They go to (tile_n, row) and (tile_m, column). Returns whether the tile is to be computed
    again, by the EXACT way.
    """
    row = row_start + tl.arange(0, BLOCK_M)
    column = column_start + tl.arange(0, WIDTH)
    row_plane = tl.cdiv(columns, WIDTH).to(tl.int64) * rows
    row_part_ptr = row_parts_ptr + tile_n.to(tl.int64) * rows + (row - first_row)
    if column_parts_ptr is not None:
        column_plane = tl.cdiv(rows, BLOCK_M).to(tl.int64) * columns
        column_part_ptr = column_parts_ptr + tile_m.to(tl.int64) * columns + (column - first_column)
    LABELLED: tl.constexpr = row_labels_ptr is not None
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
            WIDTH,
            BLOCK_D,
        )
    if not LABELLED:
        near = meets_diagonal(row_start, column_start, positive_shift, BLOCK_M, WIDTH)
        if not SELF:
            near |= meets_diagonal(row_start, column_start, positive_shift - N, BLOCK_M, WIDTH)
        if near:
            positive_column = row + positive_shift
            if not SELF:
                positive_column = tl.where(
                    positive_column < N, positive_column, positive_column - N
                )
            positives = positive_column[:, None] == column[None, :]
            # Summed as one row, the other numbers would take registers that no architecture has.
            pieces = tl.reshape(tl.where(positives, tile, 0.0), (BLOCK_M, WIDTH // 8, 8))
            positive = tl.sum(tl.sum(pieces, 2), 1)
            here = (positive_column >= column_start) & (positive_column < column_start + WIDTH)
            here &= (row < M) & (positive_column < N)
            tl.store(positive_ptr + row, positive, mask=here)
            if SELF:
                tl.store(positive_ptr + positive_column, positive, mask=here)
            tile = tl.where(positives, -float("inf"), tile)
    if SELF and column_start < row_start + BLOCK_M:
        tile = tl.where(column[None, :] <= row[:, None], -float("inf"), tile)
    if (row_start + BLOCK_M > M) | (column_start + WIDTH > N):
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
    by_column = tile
    if WIDE:
        by_column = competing(
            tile, guide, column_threshold_ptr, column_guide_threshold_ptr, column, 0
        )
    if EXACT:
        store_exact(row_part_ptr, row_plane, by_row, positives, row < M, 1, STACKED)
        if column_parts_ptr is not None:
            if not WIDE:
                by_column = competing(
                    tile, guide, column_threshold_ptr, column_guide_threshold_ptr, column, 0
                )
            store_exact(column_part_ptr, column_plane, by_column, positives, column < N, 0, STACKED)
        return 0
    reference = tile_reference(tile)
    terms = tl.exp2(tile - reference)
    of_row = _where_competing(terms, by_row, row_threshold_ptr, row_guide_threshold_ptr)
    small = store_sums(row_part_ptr, row_plane, of_row, reference, row < M, 1, STACKED)
    if column_parts_ptr is not None:
        if not WIDE:
            by_column = competing(
                tile, guide, column_threshold_ptr, column_guide_threshold_ptr, column, 0
            )
        of_column = _where_competing(
            terms, by_column, column_threshold_ptr, column_guide_threshold_ptr
        )
        small |= store_sums(
            column_part_ptr, column_plane, of_column, reference, column < N, 0, STACKED
        )
    return small


@triton.jit
def _where_competing(terms, tile, threshold_ptr, guide_threshold_ptr):
    if threshold_ptr is not None or guide_threshold_ptr is not None:
        terms = tl.where(tile > -float("inf"), terms, 0.0)
    return terms
