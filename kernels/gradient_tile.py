"""Backward of the softmax family: tiles of G = dloss/dS; q and k are pointers or descriptors."""

from __future__ import annotations

import triton
import triton.language as tl

from gradcache_clip.kernels.competition import RAGGED
from gradcache_clip.kernels.gradient_epilogue import store_gradient
from gradcache_clip.kernels.similarity import (
    similarity_parts,
    similarity_tile,
    tile_position,
    whole,
)


@triton.jit(do_not_specialize=RAGGED)
def contrast_gradient_kernel(
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
    row_max_ptr,
    row_dsum_ptr,
    row_dpositive_ptr,
    column_max_ptr,
    column_dsum_ptr,
    column_dpositive_ptr,
    gradient_ptr,
    gradient_stride,
    column_sums_ptr,
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
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
    PARTS: tl.constexpr,
):
    """One tile of G, and its sums over rows; maxima and thresholds in units of log 2.

    With descriptors a program takes one tile after another, as many as there are programs apart:
    the loads of the next begin while this one is stored.
    """
    if PARTS > 1:
        WIDTH: tl.constexpr = BLOCK_N // PARTS
        tiles = tl.cdiv(rows, BLOCK_M) * tl.cdiv(columns, BLOCK_N)
        # Of the tile to store; the loop's own index is ahead of it, and would stay in registers.
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
            column_start = whole(first_column) + tile_n * BLOCK_N
            for part in tl.static_range(0, PARTS):
                store_gradient(
                    parts[part],
                    tile_m,
                    PARTS * tile_n + part,
                    row_start,
                    column_start + part * WIDTH,
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
                    row_max_ptr,
                    row_dsum_ptr,
                    row_dpositive_ptr,
                    column_max_ptr,
                    column_dsum_ptr,
                    column_dpositive_ptr,
                    gradient_ptr,
                    gradient_stride,
                    column_sums_ptr,
                    M,
                    N,
                    positive_shift,
                    SELF,
                    BLOCK_M,
                    WIDTH,
                    BLOCK_D,
                )
            index += tl.num_programs(0)
    else:
        tile_m, tile_n = tile_position(tl.program_id(0), rows, columns, BLOCK_M, BLOCK_N, GROUP_M)
        row_start = whole(first_row) + tile_m * BLOCK_M
        column_start = whole(first_column) + tile_n * BLOCK_N
        tile = similarity_tile(
            q,
            k,
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
        store_gradient(
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
            row_max_ptr,
            row_dsum_ptr,
            row_dpositive_ptr,
            column_max_ptr,
            column_dsum_ptr,
            column_dpositive_ptr,
            gradient_ptr,
            gradient_stride,
            column_sums_ptr,
            M,
            N,
            positive_shift,
            SELF,
            BLOCK_M,
            BLOCK_N,
            BLOCK_D,
        )
