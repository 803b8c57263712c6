"""The kernel of the sigmoid loss: a tile of S becomes its part of the loss and G, at once.

M rows q_i, N columns k_j, S_ij = logit_scale <q_i, k_j> + logit_bias; z_ij is 1 on positives and -1
elsewhere, and G_ij = -z sigmoid(-z S) is M dloss/dS_ij.
"""

import triton
import triton.language as tl

from gradcache_clip.kernels.competition import RAGGED
from gradcache_clip.kernels.similarity import (
    LOG2_E,
    similarity_tile,
    store_tile,
    tile_position,
    whole,
)

LOG_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _log1p(u):
    """log(1 + u) for 0 <= u <= 1, to 2e-7 of itself: log(1 + u) / u by a polynomial.

    log2(1 + u) would lose the digits of a small u, and nearly all terms of the loss are small.
    """
    p = 0.00536482278 * u - 0.0300657861
    p = p * u + 0.0792045255
    p = p * u - 0.137538015
    p = p * u + 0.191536545
    p = p * u - 0.248571636
    p = p * u + 0.333213226
    p = p * u - 0.49999648
    return u * (p * u + 1.0)


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


@triton.jit
def _sums_and_gradient(
    similarity,
    scale,
    bias,
    positive,
    inside,
    SIGNED: tl.constexpr,
    EDGE: tl.constexpr,
    SUMS: tl.constexpr,
):
    """Sums of the loss, of G and of G <q, k> over a tile, and G; <q, k> in units of log 2."""
    if SIGNED:
        similarity = tl.where(positive, -similarity, similarity)
        bias = tl.where(positive, -bias, bias)
    # -z S; where it is -inf neither the loss nor G gets anything.
    tile = similarity * scale + bias
    if EDGE:
        tile = tl.where(inside, tile, -float("inf"))
    small = _log1p(tl.exp2(-tl.abs(tile)))
    loss = tl.maximum(tile, 0.0) * LOG_2 + small
    if not SUMS:
        return tl.sum(loss), 0.0, 0.0, loss
    # sigmoid(x) = exp(x - softplus(x)), and x - softplus(x) = min(x, 0) - log1p(exp(-|x|)).
    sigmoid = tl.exp2(tl.minimum(tile, 0.0) - small * LOG2_E)
    gradient = tl.where(positive, -sigmoid, sigmoid) if SIGNED else sigmoid
    return tl.sum(loss), tl.sum(gradient), tl.sum(sigmoid * similarity), gradient


@triton.jit(do_not_specialize=RAGGED)
def sigmoid_kernel(
    q_ptr,
    k_ptr,
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
):
    """One tile: sums of the loss, of G and of G <q, k>; G itself; the largest <q, k>.

    The sums go to (0, slot), (1, slot) and (2, slot) of `sums`, where a tile has PARTS slots; the
    largest <q, k> of positives to (0, slot_n, row) and (0, tile_m, column) of `row_best` and
    `column_best`, those of negatives to (1, ...).

    Without labels there are two launches. Most tiles hold negatives only, and nothing is compared
    (not EDGE); those of the diagonal and of ragged ends are left to the other (EDGE), which takes
    each in PARTS: masks need registers. The positive of row i is column i + positive_shift, where
    the shift is 0, or so large that there is none.
    """
    SIGNED: tl.constexpr = EDGE or LABELS
    row_end, column_end = first_row + rows, first_column + columns
    if EDGE:
        tile_m, tile_n, exists = _edge_position(
            first_row, first_column, rows, columns, BLOCK_M, BLOCK_N, PARTS, LABELS
        )
        if not exists:
            return
    else:
        tile_m, tile_n = tile_position(tl.program_id(0), rows, columns, BLOCK_M, BLOCK_N, GROUP_M)
    row_start = whole(first_row) + tile_m * BLOCK_M
    column_start = whole(first_column) + tile_n * BLOCK_N
    edge = _is_edge(
        row_start, column_start, row_end, column_end, positive_shift, BLOCK_M, BLOCK_N, LABELS
    )
    if not EDGE and edge:
        return
    similarity = similarity_tile(
        q_ptr,
        k_ptr,
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
    # Logits in units of log 2.
    scale, bias = tl.load(logit_scale_ptr), tl.load(logit_bias_ptr) * LOG2_E
    row = row_start + tl.arange(0, BLOCK_M)
    column = column_start + tl.arange(0, BLOCK_N)
    if LABELS:
        row_label = tl.load(row_label_ptr + tl.minimum(row, M - 1))
        column_label = tl.load(column_label_ptr + tl.minimum(column, N - 1))
        positive = row_label[:, None] == column_label[None, :]
    else:
        positive = (row + positive_shift)[:, None] == column[None, :]
    inside = (row < row_end)[:, None] & (column < column_end)[None, :]
    # A tile that is not cut takes the first of its slots.
    slot = tile_n if EDGE else tile_n * PARTS
    if BEST:
        # The slots of positives hold -inf already.
        slots_m = tl.cdiv(rows, BLOCK_M)
        row_slot = row_best_ptr + slot * rows + tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        column_slot = column_best_ptr + tile_m * columns + tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        best = similarity
        if SIGNED:
            best = tl.where(positive, similarity, -float("inf"))
            if EDGE:
                best = tl.where(inside, best, -float("inf"))
            tl.store(row_slot, tl.max(best, 1), mask=row < row_end)
            tl.store(column_slot, tl.max(best, 0), mask=column < column_end)
            best = tl.where(positive, -float("inf"), similarity)
            if EDGE:
                best = tl.where(inside, best, -float("inf"))
        tl.store(row_slot + slots_n * rows, tl.max(best, 1), mask=row < row_end)
        tl.store(column_slot + slots_m * columns, tl.max(best, 0), mask=column < column_end)
    loss, gradient_sum, scale_sum, gradient = _sums_and_gradient(
        similarity, scale, bias, positive, inside, SIGNED, EDGE, SUMS
    )
    sums_ptr += tile_m * slots_n + slot
    tl.store(sums_ptr, loss)
    if SUMS:
        tl.store(sums_ptr + slots, gradient_sum)
        tl.store(sums_ptr + 2 * slots, scale_sum)
    if GRADIENT:
        store_tile(gradient_ptr, gradient_stride, gradient * GRADIENT_SCALE, tile_m, tile_n)
