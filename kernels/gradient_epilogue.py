"""Backward of the softmax family: from a tile of S to its G, which is stored."""

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
from gradcache_clip.kernels.similarity import store_tile, whole


@triton.jit
def store_gradient(
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
    SELF: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """G of a tile of S, BLOCK_M x WIDTH, and its sums over rows."""
    row = row_start + tl.arange(0, BLOCK_M)
    column = column_start + tl.arange(0, WIDTH)
    # Nobody reads G beyond rows M and columns N; vectors of columns are longer than N.
    row_clamped = tl.minimum(row, M - 1)
    tile = biased(tile, row_bias_ptr, column_bias_ptr, row_clamped, column)
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
    on_diagonal = SELF
    if SELF and gradient_ptr.dtype.element_ty != tl.float32:
        # Without this branch 16-bit kernels spill on sm_90; with it those of fp32 do elsewhere.
        on_diagonal = meets_diagonal(row_start, column_start, 0, BLOCK_M, WIDTH)
    if on_diagonal:
        tile = tl.where(row[:, None] == column[None, :], -float("inf"), tile)
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
    by_row = competing(tile, guide, row_threshold_ptr, row_guide_threshold_ptr, row_clamped, 1)
    by_column = competing(tile, guide, column_threshold_ptr, column_guide_threshold_ptr, column, 0)
    gradient = softmax_gradient(
        by_row,
        by_column,
        row_max_ptr,
        row_dsum_ptr,
        column_max_ptr,
        column_dsum_ptr,
        row_clamped,
        column,
    )
    if row_labels_ptr is not None:
        positives = equal(row_labels_ptr, column_labels_ptr, row_clamped, column)
        if SELF:
            positives &= row[:, None] != column[None, :]
        dpositive = tl.load(row_dpositive_ptr + row_clamped)[:, None]
        if column_max_ptr is not None:
            dpositive += tl.load(column_dpositive_ptr + column)[None, :]
        gradient += tl.where(positives, dpositive, 0.0)
    if row_labels_ptr is None:
        near = meets_diagonal(row_start, column_start, positive_shift, BLOCK_M, WIDTH)
        near |= meets_diagonal(row_start, column_start, positive_shift - N, BLOCK_M, WIDTH)
        if near:
            positive_column = row + positive_shift
            positive_column = tl.where(positive_column < N, positive_column, positive_column - N)
            dpositive = tl.load(row_dpositive_ptr + row_clamped)
            positives = positive_column[:, None] == column[None, :]
            gradient = tl.where(positives, dpositive[:, None], gradient)
    store_tile(gradient_ptr, gradient_stride, gradient, tile_m, tile_n)
    if column_sums_ptr is not None:
        sums = tl.sum(tl.where(row[:, None] < M, gradient, 0.0), 0)
        place = tile_m * whole(gradient_stride) + tile_n * WIDTH + tl.arange(0, WIDTH)
        tl.store(column_sums_ptr + place, sums)


@triton.jit
def softmax_gradient(
    by_row, by_column, row_max_ptr, row_dsum_ptr, column_max_ptr, column_dsum_ptr, row, column
):
    """dsum_i exp(S_ij - max_i), and of columns too where there are any."""
    gradient = _one_way(by_row, row_max_ptr + row, row_dsum_ptr + row, 1)
    if column_max_ptr is not None:
        gradient += _one_way(by_column, column_max_ptr + column, column_dsum_ptr + column, 0)
    return gradient


@triton.jit
def _one_way(tile, max_ptrs, dsum_ptrs, AXIS: tl.constexpr):
    dsum = tl.expand_dims(tl.load(dsum_ptrs), AXIS)
    maximum = tl.expand_dims(tl.load(max_ptrs), AXIS)
    return tl.exp2(tile - maximum) * dsum
