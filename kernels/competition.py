"""Which logits compete, inside a tile: the rules that both passes of a contrast share.

Pointers to what a contrast lacks are None, and their branches vanish when a kernel is compiled.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradcache_clip.kernels.similarity import padded, products, tile_pointers

# Arguments whose divisibility no machine code may depend on: one for all shapes and addresses.
RAGGED = (
    "gradient_plane",
    "gradient_stride",
    "first_row",
    "first_column",
    "rows",
    "columns",
    "M",
    "N",
    "positive_shift",
    "slots_n",
    "slots",
    "images",
    "texts",
    "P",
    "R",
    "parts",
    "length",
    "running_plane",
    # Of the caller, who may hand over a slice.
    "logit_scale_ptr",
    "logit_bias_ptr",
    "row_labels_ptr",
    "row_ids_ptr",
    "row_groups_ptr",
    "row_guide_threshold_ptr",
    "row_label_ptr",
    "column_label_ptr",
    "row_gradient_ptr",
    "column_gradient_ptr",
    "row_weight_ptr",
    "column_weight_ptr",
)


@dataclass(frozen=True)
class Competition:
    """The rules of M rows and N columns, as the kernels take them."""

    row_labels: Tensor | None = None
    """(M,) int64. Logits of equal labels are positives."""
    column_labels: Tensor | None = None
    row_ids: Tensor | None = None
    """(M,) int64. Logits of equal ids do not compete, unless they are positives."""
    column_ids: Tensor | None = None
    row_threshold: Tensor | None = None
    """(M,) fp32 in units of log 2. Logits above it do not compete for the row."""
    column_threshold: Tensor | None = None
    row_groups: Tensor | None = None
    """(M,) int64. Logits of unequal groups do not compete, unless they are positives."""
    column_groups: Tensor | None = None
    row_bias: Tensor | None = None
    """(M,) fp32 in units of log 2, added to the logits of the row."""
    column_bias: Tensor | None = None
    row_guide: Tensor | None = None
    """(M, G) fp32, features of another model."""
    column_guide: Tensor | None = None
    row_guide_threshold: Tensor | None = None
    """(M,) fp32. Where the product of guides is above it, logits do not compete for the row."""
    column_guide_threshold: Tensor | None = None
    positive_shift: int = 0
    """Without labels the positive of row i is column (i + positive_shift) mod N."""
    both_ways: bool = True
    self_contrast: bool = False

    @property
    def labelled(self) -> bool:
        return self.row_labels is not None

    def rules(self) -> dict[str, bool]:
        """What the table of launches asks of a contrast."""
        ruled = self.self_contrast or any(each is not None for each in self._vectors)
        return {
            "plain": self.both_ways and not ruled,
            "guided": self.row_guide is not None,
            "ruled": ruled,
        }

    @property
    def described(self) -> bool:
        """Whether descriptors may load its features: not beside those of a guide."""
        return not self.self_contrast and self.row_guide is None

    def vectors(self, BLOCK_N: int) -> tuple[Tensor | None, ...]:
        """What the kernels read of each row and column, in their order."""
        rows, columns = self._vectors[::2], self._vectors[1::2]
        longer = (lengthened(each, BLOCK_N) for each in columns)
        return tuple(chain.from_iterable(zip(rows, longer, strict=True)))

    @property
    def _vectors(self) -> tuple[Tensor | None, ...]:
        """Vectors of rows and of columns in turn."""
        return (
            *(self.row_labels, self.column_labels),
            *(self.row_ids, self.column_ids),
            *(self.row_threshold, self.column_threshold),
            *(self.row_groups, self.column_groups),
            *(self.row_bias, self.column_bias),
            *(self.row_guide_threshold, self.column_guide_threshold),
        )

    def guides(self, BLOCK_D: int) -> tuple[Tensor | None, Tensor | None, int | None]:
        """Features of the guide as the kernels read them, and their width."""
        if self.row_guide is None or self.column_guide is None:
            return None, None, None
        row, column = padded(self.row_guide, BLOCK_D), padded(self.column_guide, BLOCK_D)
        return row, column, row.shape[1]


def lengthened(vector: Tensor | None, BLOCK_N: int) -> Tensor | None:
    """A vector of columns that a tile may read beyond its end: without clamps, four at a time."""
    return None if vector is None else torch.nn.functional.pad(vector, (0, BLOCK_N))


@triton.jit
def meets_diagonal(row_start, column_start, shift, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Whether a tile holds an entry (i, i + shift)."""
    distance = column_start - row_start - shift
    return (distance < BLOCK_M) & (distance > -BLOCK_N)


@triton.jit
def equal(row_ptr, column_ptr, row, column):
    """Where the integers of a row and of a column are the same."""
    return tl.load(row_ptr + row)[:, None] == tl.load(column_ptr + column)[None, :]


@triton.jit
def biased(tile, row_bias_ptr, column_bias_ptr, row, column):
    """The logits and what is added to them for their row and their column."""
    if row_bias_ptr is not None:
        tile += tl.load(row_bias_ptr + row)[:, None]
    if column_bias_ptr is not None:
        tile += tl.load(column_bias_ptr + column)[None, :]
    return tile


@triton.jit
def without_excluded(
    tile,
    row_ids_ptr,
    column_ids_ptr,
    row_groups_ptr,
    column_groups_ptr,
    row_labels_ptr,
    column_labels_ptr,
    row,
    column,
):
    """-inf where ids are equal or groups are not, but not at positives with labels."""
    if row_ids_ptr is not None:
        excluded = equal(row_ids_ptr, column_ids_ptr, row, column)
        tile = _without(tile, excluded, row_labels_ptr, column_labels_ptr, row, column)
    if row_groups_ptr is not None:
        excluded = ~equal(row_groups_ptr, column_groups_ptr, row, column)
        tile = _without(tile, excluded, row_labels_ptr, column_labels_ptr, row, column)
    return tile


@triton.jit
def _without(tile, excluded, row_labels_ptr, column_labels_ptr, row, column):
    if row_labels_ptr is not None:
        excluded &= ~equal(row_labels_ptr, column_labels_ptr, row, column)
    return tl.where(excluded, -float("inf"), tile)


@triton.jit
def competing(tile, guide, threshold_ptr, guide_threshold_ptr, index, AXIS: tl.constexpr):
    """-inf where the logit is above the threshold of its row (AXIS 1) or of its column (AXIS 0).

    Or where the guide is above its own threshold.
    """
    by_logit = _up_to(tile, tile, threshold_ptr, index, AXIS)
    return _up_to(by_logit, guide, guide_threshold_ptr, index, AXIS)


@triton.jit
def _up_to(tile, compared, threshold_ptr, index, AXIS: tl.constexpr):
    if threshold_ptr is not None:
        threshold = tl.expand_dims(tl.load(threshold_ptr + index), AXIS)
        tile = tl.where(compared > threshold, -float("inf"), tile)
    return tile


@triton.jit
def guide_tile(
    row_guide_ptr,
    column_guide_ptr,
    first_row,
    first_column,
    M,
    N,
    G,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Products of the guide's features, of the rows and columns of a tile."""
    # Half as many numbers of four bytes: as much shared memory as the features of 16 bits.
    BLOCK_G: tl.constexpr = BLOCK_D // 2
    row_ptrs, column_ptrs = tile_pointers(
        row_guide_ptr, column_guide_ptr, first_row, first_column, M, N, G, BLOCK_M, BLOCK_N, BLOCK_G
    )
    # Exact fp32, for products of copies must not fall on either side of a threshold.
    return products(row_ptrs, column_ptrs, G, BLOCK_M, BLOCK_N, BLOCK_G, "ieee")
