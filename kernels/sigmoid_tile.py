"""The kernel of the sigmoid loss: a tile of S becomes its part of the loss and G, at once."""

import triton
import triton.language as tl

from gradcache_clip.kernels.competition import RAGGED
from gradcache_clip.kernels.sigmoid_epilogue import store_sigmoid
from gradcache_clip.kernels.similarity import (
    similarity_parts,
    similarity_tile,
    tile_position,
    whole,
)


@triton.jit
def _is_edge(
    row,
    column,
    row_end,
    column_end,
    positive_shift,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LABELS: tl.constexpr,
):
    """Whether the tile that starts here reaches beyond, or holds positives of the diagonal."""
    edge = (row + BLOCK_M > row_end) | (column + BLOCK_N > column_end)
    if not LABELS:
        partner = row + positive_shift
        edge |= (partner < column + BLOCK_N) & (column < partner + BLOCK_M)
    return edge


@triton.jit
def _edge_position(
    first_row,
    first_column,
    rows,
    columns,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PARTS: tl.constexpr,
    LABELS: tl.constexpr,
):
    """Tile row and tile column of this program of the EDGE launch, and whether there is one.

    Tiles are BLOCK_M x TILE_N, and PARTS programs share one. The programs go along the last tile
    row, then down the last tile column, then, without labels, down the diagonal.
    """
    TILE_N: tl.constexpr = BLOCK_N * PARTS
    WIDTH: tl.constexpr = (BLOCK_M + TILE_N - 1) // TILE_N
    tiles_m, tiles_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, TILE_N)
    index, part = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    row_ragged, column_ragged = rows % BLOCK_M != 0, columns % TILE_N != 0
    if index < tiles_n:
        tile_m, tile_n = tiles_m - 1, index
        exists = row_ragged
    elif index < tiles_n + tiles_m:
        tile_m, tile_n = index - tiles_n, tiles_n - 1
        exists = column_ragged & ((tile_m < tiles_m - 1) | (rows % BLOCK_M == 0))
    else:
        tile_m = (index - tiles_n - tiles_m) // WIDTH
        offset = first_row + tile_m * BLOCK_M - first_column
        offset += (index - tiles_n - tiles_m) % WIDTH * TILE_N
        tile_n = offset // TILE_N
        exists = (offset >= 0) & (tile_n < tiles_n)
        # What is ragged has had its turn.
        exists &= ((tile_m < tiles_m - 1) | (rows % BLOCK_M == 0)) & (
            (tile_n < tiles_n - 1) | (columns % TILE_N == 0)
        )
    tile_n = tile_n * PARTS + part
    return tile_m, tile_n, exists & (tile_n * BLOCK_N < columns)


@triton.jit(do_not_specialize=RAGGED)
def sigmoid_kernel(
    q,
    k,
    logit_scale_ptr,
    logit_bias_ptr,
    sign_ptr,
    row_label_ptr,
    column_label_ptr,
    sums_ptr,
    gradient_ptr,
    row_best_ptr,
    column_best_ptr,
    gradient_stride,
    first_row,
    first_column,
    rows,
    columns,
    M,
    N,
    D,
    positive_shift,
    slots_n,
    slots,
    LABELS: tl.constexpr,
    EDGE: tl.constexpr,
    SUMS: tl.constexpr,
    GRADIENT: tl.constexpr,
    BEST: tl.constexpr,
    PARTS: tl.constexpr,
    GRADIENT_SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    STACKED: tl.constexpr,
):
    """One tile; see `store_sigmoid`, of whose sums a tile has PARTS slots.

    Without labels there are two launches. Most tiles hold negatives only, and nothing is compared
    (not EDGE); those of the diagonal and of ragged ends are left to the other (EDGE), which takes
    each in PARTS: masks need registers. The positive of row i is column i + positive_shift, where
    the shift is 0, or so large that there is none.

    With descriptors a program takes one tile after another, as many as there are programs apart,
    each in PARTS: the loads of the next begin while this one is stored.
    """
    row_end, column_end = first_row + rows, first_column + columns
    if DESCRIPTORS:
        WIDTH: tl.constexpr = BLOCK_N // PARTS
        tiles = tl.cdiv(rows, BLOCK_M) * tl.cdiv(columns, BLOCK_N)
        # Of the tile to store; the loop's own index is ahead of it, and would stay in registers.
        index = tl.program_id(0)
        for ahead in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
            tile_m, tile_n = tile_position(ahead, rows, columns, BLOCK_M, BLOCK_N, GROUP_M)
            parts = similarity_parts(
                q,
                k,
                sign_ptr,
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
            edge = _is_edge(
                row_start,
                column_start,
                row_end,
                column_end,
                positive_shift,
                BLOCK_M,
                BLOCK_N,
                LABELS,
            )
            if not edge:
                for part in tl.static_range(0, PARTS):
                    store_sigmoid(
                        parts[part],
                        tile_m,
                        PARTS * tile_n + part,
                        PARTS * tile_n + part,
                        row_start,
                        column_start + part * WIDTH,
                        logit_scale_ptr,
                        logit_bias_ptr,
                        row_label_ptr,
                        column_label_ptr,
                        sums_ptr,
                        gradient_ptr,
                        row_best_ptr,
                        column_best_ptr,
                        gradient_stride,
                        row_end,
                        column_end,
                        rows,
                        columns,
                        M,
                        N,
                        positive_shift,
                        slots_n,
                        slots,
                        LABELS,
                        EDGE,
                        SUMS,
                        GRADIENT,
                        BEST,
                        GRADIENT_SCALE,
                        BLOCK_M,
                        WIDTH,
                        STACKED,
                    )
            index += tl.num_programs(0)
    else:
        if EDGE:
            tile_m, tile_n, exists = _edge_position(
                first_row, first_column, rows, columns, BLOCK_M, BLOCK_N, PARTS, LABELS
            )
            if not exists:
                return
        else:
            tile_m, tile_n = tile_position(
                tl.program_id(0), rows, columns, BLOCK_M, BLOCK_N, GROUP_M
            )
        row_start = whole(first_row) + tile_m * BLOCK_M
        column_start = whole(first_column) + tile_n * BLOCK_N
        edge = _is_edge(
            row_start, column_start, row_end, column_end, positive_shift, BLOCK_M, BLOCK_N, LABELS
        )
        if not EDGE and edge:
            return
        tile = similarity_tile(
            q,
            k,
            sign_ptr,
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
        # A tile that is not cut takes the first of its slots.
        slot = tile_n if EDGE else tile_n * PARTS
        store_sigmoid(
            tile,
            tile_m,
            tile_n,
            slot,
            row_start,
            column_start,
            logit_scale_ptr,
            logit_bias_ptr,
            row_label_ptr,
            column_label_ptr,
            sums_ptr,
            gradient_ptr,
            row_best_ptr,
            column_best_ptr,
            gradient_stride,
            row_end,
            column_end,
            rows,
            columns,
            M,
            N,
            positive_shift,
            slots_n,
            slots,
            LABELS,
            EDGE,
            SUMS,
            GRADIENT,
            BEST,
            GRADIENT_SCALE,
            BLOCK_M,
            BLOCK_N,
            STACKED,
        )
