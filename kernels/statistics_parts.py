"""What a tile leaves of its rows and columns, and how that is merged: shared by all statistics.

A partial is a reference r and the sum of exp2(S - r) over the tile's part of a row or column. The
reference is the maximum there, or one number for the whole tile: then one exponential serves the
row and the column. Such a sum is exact down to 2^-60; a tile that has a smaller one is flagged, and
a second launch computes it again with a reference for each row and each column.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradcache_clip.kernels.competition import RAGGED

# Columns of a merge block share a 128-byte line; its rows are the partials read at once.
_MERGE_WIDTH, _MERGE_DEPTH = 32, 64
# Tiles whose flags a program of the second launch reads.
FLAGS_PER_PROGRAM = 64
_SMALLEST_SUM = tl.constexpr(2.0**-60)


@triton.jit
def tile_reference(tile):
    """The least whole number that is no logit's lesser; 0 where nothing competes."""
    # Powers of two move sums from one whole reference to another without a rounding.
    top = tl.ceil(tl.max(tile))
    return tl.where(top == -float("inf"), 0.0, top)


@triton.jit
def sum_along(tile, AXIS: tl.constexpr, STACKED: tl.constexpr):
    """`tl.sum`, quicker over rows of warps that are stacked."""
    if STACKED and AXIS == 0:
        return tl.sum(_spread(tl.sum(_by_warp(tile), 1)), 0)
    else:
        return tl.sum(tile, AXIS)


@triton.jit
def max_along(tile, AXIS: tl.constexpr, STACKED: tl.constexpr):
    """`tl.max`, quicker over rows of warps that are stacked."""
    if STACKED and AXIS == 0:
        return tl.max(_spread(tl.max(_by_warp(tile), 1)), 0)
    else:
        return tl.max(tile, AXIS)


@triton.jit
def _by_warp(tile):
    """A tile as (warps, rows of a warp, columns)."""
    return tl.reshape(tile, (tile.shape[0] // 16, 16, tile.shape[1]))


@triton.jit
def _spread(partial):
    """The same numbers, each in one thread; what a sum leaves is in several.

    Without this step every warp adds up the partials of all warps again, column by column.
    """
    row = tl.arange(0, partial.shape[0])[:, None]
    return tl.gather(partial, row + tl.zeros(partial.shape, dtype=tl.int32), 0)


@triton.jit
def store_sums(part_ptr, plane, terms, reference, mask, AXIS: tl.constexpr, STACKED: tl.constexpr):
    """Sums of exp2(S - reference) along one axis; whether one of them is too small."""
    total = sum_along(terms, AXIS, STACKED)
    tl.store(part_ptr, tl.zeros_like(total) + reference, mask=mask)
    tl.store(part_ptr + plane, total, mask=mask)
    return tl.max(((total < _SMALLEST_SUM) & mask).to(tl.int32))


@triton.jit
def store_exact(part_ptr, plane, tile, positives, mask, AXIS: tl.constexpr, STACKED: tl.constexpr):
    """Maximum and sum of exp along one axis; with labels, positives' sum and hardest negative."""
    if positives is not None:
        positive = sum_along(tl.where(positives, tile, 0.0), AXIS, STACKED)
        hardest = max_along(tl.where(positives, -float("inf"), tile), AXIS, STACKED)
        tl.store(part_ptr + 2 * plane, positive, mask=mask)
        tl.store(part_ptr + 3 * plane, hardest, mask=mask)
    maximum = max_along(tile, AXIS, STACKED)
    # Where everything is masked the maximum is -inf, and -inf - -inf would be NaN.
    reference = tl.where(maximum == -float("inf"), 0.0, maximum)
    total = sum_along(tl.exp2(tile - tl.expand_dims(reference, AXIS)), AXIS, STACKED)
    tl.store(part_ptr, maximum, mask=mask)
    tl.store(part_ptr + plane, total, mask=mask)


@triton.jit
def store_nothing(part_ptr, plane, mask, SIZE: tl.constexpr, LABELLED: tl.constexpr):
    """What a tile leaves in which nothing competes."""
    zero = tl.zeros((SIZE,), dtype=tl.float32)
    tl.store(part_ptr, zero - float("inf"), mask=mask)
    tl.store(part_ptr + plane, zero, mask=mask)
    if LABELLED:
        tl.store(part_ptr + 2 * plane, zero, mask=mask)
        tl.store(part_ptr + 3 * plane, zero - float("inf"), mask=mask)


@triton.jit(do_not_specialize=[*RAGGED, "parts_ptr", "running_ptr"])
def merge_kernel(
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
    PLANES: tl.constexpr = 4 if LABELLED else 2
    prefix = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    inside = column < length
    plane = parts.to(tl.int64) * length
    parts_ptr += prefix * PLANES * plane
    running_ptr += prefix * PLANES * running_plane + column
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
class Running:
    """Statistics of all rows, or of all columns, and the partials of a stripe to add to them."""

    planes: Tensor
    """(prefixes, planes, size): reference in units of log 2 and sum of exp; with labels also the
    positives' sum and the hardest negative."""
    parts: Tensor

    @staticmethod
    def empty(like: Tensor, prefixes: int, size: int, parts: int, *, labelled: bool) -> Running:
        """Statistics with nothing in them, and room for so many partials of a prefix."""
        planes = like.new_zeros(prefixes, 4 if labelled else 2, size)
        planes[:, ::3] = -torch.inf
        return Running(planes, like.new_empty(planes.shape[0] * planes.shape[1] * parts))

    def merge(self, where: slice, parts: int) -> None:
        length, (prefixes, planes, size) = where.stop - where.start, self.planes.shape
        merge_kernel[(triton.cdiv(length, _MERGE_WIDTH), prefixes)](
            self.parts,
            self.planes[..., where],
            parts,
            length,
            size,
            LABELLED=planes == 4,
            WIDTH=_MERGE_WIDTH,
            DEPTH=_MERGE_DEPTH,
            enable_fp_fusion=True,
        )
