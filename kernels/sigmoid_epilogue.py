"""The sigmoid loss: from a tile of S to its part of the loss and to G, which is stored.

M rows q_i, N columns k_j, S_ij = logit_scale <q_i, k_j> + logit_bias; z_ij is 1 on positives and -1
elsewhere, and G_ij = -z sigmoid(-z S) is M dloss/dS_ij.
"""

import triton
import triton.language as tl

from gradcache_clip.kernels.similarity import LOG2_E, store_tile
from gradcache_clip.kernels.statistics_parts import max_along

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


@triton.jit
def store_sigmoid(
    similarity,
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
    LABELS: tl.constexpr,
    EDGE: tl.constexpr,
    SUMS: tl.constexpr,
    GRADIENT: tl.constexpr,
    BEST: tl.constexpr,
    GRADIENT_SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WIDTH: tl.constexpr,
    STACKED: tl.constexpr,
):
    """Sums of the loss, of G and of G <q, k> over a tile; G itself; the largest <q, k>.

    The sums go to (0, slot), (1, slot) and (2, slot) of `sums`; the largest <q, k> of positives to
    (0, slot_n, row) and (0, tile_m, column) of `row_best` and `column_best`, those of negatives to
    (1, ...). Only tiles that are EDGE or LABELS hold positives.
    """
    SIGNED: tl.constexpr = EDGE or LABELS
    # Logits in units of log 2.
    scale, bias = tl.load(logit_scale_ptr), tl.load(logit_bias_ptr) * LOG2_E
    row = row_start + tl.arange(0, BLOCK_M)
    column = column_start + tl.arange(0, WIDTH)
    if LABELS:
        row_label = tl.load(row_label_ptr + tl.minimum(row, M - 1))
        column_label = tl.load(column_label_ptr + tl.minimum(column, N - 1))
        positive = row_label[:, None] == column_label[None, :]
    else:
        positive = (row + positive_shift)[:, None] == column[None, :]
    inside = (row < row_end)[:, None] & (column < column_end)[None, :]
    if BEST:
        # The slots of positives hold -inf already.
        slots_m = tl.cdiv(rows, BLOCK_M)
        row_slot = row_best_ptr + slot * rows + tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        column_slot = column_best_ptr + tile_m * columns + tile_n * WIDTH + tl.arange(0, WIDTH)
        best = similarity
        if SIGNED:
            best = tl.where(positive, similarity, -float("inf"))
            if EDGE:
                best = tl.where(inside, best, -float("inf"))
            tl.store(row_slot, tl.max(best, 1), mask=row < row_end)
            tl.store(column_slot, max_along(best, 0, STACKED), mask=column < column_end)
            best = tl.where(positive, -float("inf"), similarity)
            if EDGE:
                best = tl.where(inside, best, -float("inf"))
        # Rows first, sm_90 spills.
        tl.store(
            column_slot + slots_m * columns, max_along(best, 0, STACKED), mask=column < column_end
        )
        tl.store(row_slot + slots_n * rows, tl.max(best, 1), mask=row < row_end)
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
