"""Forward of the softmax family: tiles of S, reduced; q and k are pointers or descriptors."""

from __future__ import annotations

import triton
import triton.language as tl

from gradcache_clip.kernels.competition import RAGGED
from gradcache_clip.kernels.similarity import (
    similarity_parts,
    similarity_tile,
    tile_position,
    whole,
)
from gradcache_clip.kernels.statistics_epilogue import store_statistics
from gradcache_clip.kernels.statistics_parts import store_nothing


@triton.jit(do_not_specialize=RAGGED)
def contrast_statistics_kernel(
    q,
    k,
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
    PARTS: tl.constexpr,
    STACKED: tl.constexpr,
):
    """One tile; or, of GROUP > 1 tiles, those with a flag, by the exact way.

    The exact way is also taken where there are no flags to set. With descriptors a program takes
    one tile after another, as many as there are programs apart, each in PARTS: the loads of the
    next begin while this one is reduced.
    """
    columns = N - first_column
    if PARTS > 1:
        WIDTH: tl.constexpr = BLOCK_N // PARTS
        tiles = tl.cdiv(rows, BLOCK_M) * tl.cdiv(columns, BLOCK_N)
        # Of the tile to reduce; the loop's own index is ahead of it, and would stay in registers.
        index = tl.program_id(0)
        for ahead in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
            tile_m, tile_n = tile_position(ahead, rows, columns, BLOCK_M, BLOCK_N, GROUP_M)
            parts = similarity_parts(
                q,
                k,
                logit_scale_ptr,
                whole(first_row) + tile_m * BLOCK_M,
                whole(first_column) + tile_n * BLOCK_N,
                D,
                BLOCK_M,
                BLOCK_N,
                BLOCK_D,
                PRECISION,
                PARTS,
            )
            tile_m, tile_n = tile_position(index, rows, columns, BLOCK_M, BLOCK_N, GROUP_M)
            row_start = whole(first_row) + tile_m * BLOCK_M
            for part in tl.static_range(0, PARTS):
                part_n = PARTS * tile_n + part
                column_start = whole(first_column) + part_n * WIDTH
                if column_start < N:
                    flag = store_statistics(
                        parts[part],
                        tile_m,
                        part_n,
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
                        SELF,
                        BLOCK_M,
                        WIDTH,
                        BLOCK_D,
                        STACKED,
                        False,
                        flags_ptr is None,
                    )
                    if flags_ptr is not None:
                        tl.store(flags_ptr + tile_m * tl.cdiv(columns, WIDTH) + part_n, flag)
            index += tl.num_programs(0)
    else:
        for offset in range(0, GROUP):
            index = tl.program_id(0) * GROUP + offset
            chosen = True
            if GROUP > 1:
                tiles = tl.cdiv(rows, BLOCK_M) * tl.cdiv(columns, BLOCK_N)
                chosen = tl.load(flags_ptr + index, mask=index < tiles, other=0) != 0
            if chosen:
                tile_m, tile_n = tile_position(index, rows, columns, BLOCK_M, BLOCK_N, GROUP_M)
                flag = _statistics_of_tile(
                    tile_m,
                    tile_n,
                    q,
                    k,
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
                    columns,
                    M,
                    N,
                    D,
                    positive_shift,
                    SELF,
                    BLOCK_M,
                    BLOCK_N,
                    BLOCK_D,
                    PRECISION,
                    STACKED,
                    flags_ptr is None or GROUP > 1,
                )
                if flags_ptr is not None and GROUP == 1:
                    tl.store(flags_ptr + index, flag)


@triton.jit
def _statistics_of_tile(
    tile_m,
    tile_n,
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
    columns,
    M,
    N,
    D,
    positive_shift,
    SELF: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    STACKED: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Products of one tile, and what they leave; see `store_statistics`.

    Of a self-contrast only what lies above the diagonal counts, for its rows and for its columns.
    """
    row_start = whole(first_row) + tile_m * BLOCK_M
    column_start = whole(first_column) + tile_n * BLOCK_N
    if SELF and column_start + BLOCK_N <= row_start + 1:
        LABELLED: tl.constexpr = row_labels_ptr is not None
        row = row_start + tl.arange(0, BLOCK_M)
        column = column_start + tl.arange(0, BLOCK_N)
        row_plane = tl.cdiv(columns, BLOCK_N).to(tl.int64) * rows
        row_part_ptr = row_parts_ptr + tile_n.to(tl.int64) * rows + (row - first_row)
        column_plane = tl.cdiv(rows, BLOCK_M).to(tl.int64) * columns
        column_part_ptr = column_parts_ptr + tile_m.to(tl.int64) * columns + (column - first_column)
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
    return store_statistics(
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
        SELF,
        BLOCK_M,
        BLOCK_N,
        BLOCK_D,
        STACKED,
        q_ptr.dtype.element_ty == tl.float32,
        EXACT,
    )
