"""Statistics and gradients of several prefixes in one pass over the tiles, in plain PyTorch.

M rows q_i, N columns k_j, widths d_1 < ... < d_P; segment t of the features are the entries from
d_{t-1} to d_t. S^p_ij = logit_scale r^p_i c^p_j <q_i, k_j>_p with the product over the first d_p
entries, and r, c the inverse norms of these. A tile of products grows from one width to the next:
all prefixes together cost the flops of the widest. With W^p_ij = r^p_i G^p_ij c^p_j and u^p_i the
sum of G^p S^p / logit_scale over a row,

    dq_i[segment t] = logit_scale sum_{p >= t} (W^p_i k[segment t] - (r^p_i)^2 u^p_i q_i[segment t])

and dk likewise: tiles of W^p are summed before they are multiplied, again at the flops of the
widest. That takes a buffer of one tile for each prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from gradcache_clip.ops.pairing import Gradients, Needs, Pairing, SideGradient, Statistics
from gradcache_clip.ops.tile_gradient import TileGradient
from gradcache_clip.ops.tile_statistics import TileStatistics, tile_shape, walk
from gradcache_clip.ops.tiles import Tiles, TileShape
from gradcache_clip.ops.unit import SMALLEST_NORM, inverse_norms, segments

# Half the usual edge leaves room for one buffer per prefix.
PREFIX_TILE = TileShape(rows=512, columns=512)


def prefix_statistics_tiled(
    q: Tensor,
    k: Tensor,
    logit_scale: Tensor,
    pairings: Sequence[Pairing],
    widths: Sequence[int],
    *,
    shape: TileShape | None = None,
) -> list[Statistics]:
    """Compute the statistics of every prefix; allocate nothing larger than one tile."""
    shape = tile_shape(shape or PREFIX_TILE.on(q.device), pairings[0])
    products = _Products(Tiles(q, k, logit_scale, shape), widths)
    prefixes = [
        TileStatistics(tiles, pairing)
        for tiles, pairing in zip(products.prefixes(), pairings, strict=True)
    ]
    for stripe, panel in walk(products.tiles, pairings[0]):
        for prefix in prefixes:
            prefix.fold(stripe, panel)
    return [prefix.result() for prefix in prefixes]


class _Products:
    """Accumulates a tile of <q_i, k_j> from prefix to prefix; holds the factors that make it S."""

    def __init__(self, tiles: Tiles, widths: Sequence[int]) -> None:
        self.tiles, self.segments = tiles, segments(widths)
        dtype = tiles.logit_scale.dtype
        self.row_factor = inverse_norms(tiles.q, widths, dtype)
        self.column_factor = inverse_norms(tiles.k, widths, dtype)

    def prefixes(self, *, separate: bool = False) -> list[_PrefixTiles]:
        """Return the tiles of each prefix, to be computed in this order; `separate` keeps all."""
        return [_PrefixTiles(self, index, separate) for index in range(len(self.segments))]

    def extended(self, index: int, stripe: slice, panel: slice) -> Tensor:
        """Add segment `index` to the products; the buffer holds those over the prefix before."""
        segment, dtype = self.segments[index], self.tiles.logit_scale.dtype
        product = self.tiles.buffer("product", stripe, panel)
        left, right = self.tiles.q[stripe, segment], self.tiles.k[panel, segment]
        return product.addmm_(left.to(dtype), right.to(dtype).T, beta=min(index, 1))


class _PrefixTiles(Tiles):
    """Tiles of S of one prefix; all prefixes share one set of buffers."""

    def __init__(self, products: _Products, index: int, separate: bool) -> None:
        tiles = products.tiles
        super().__init__(tiles.q, tiles.k, tiles.logit_scale, TileShape(tiles.rows, tiles.columns))
        self._buffers = tiles._buffers
        self.products, self.index = products, index
        self.name = f"S{index}" if separate else "S"
        self.row_factor = products.row_factor[index]
        self.column_factor = products.column_factor[index]

    def logits(self, stripe: slice, panel: slice) -> Tensor:
        product = self.products.extended(self.index, stripe, panel)
        rows = (self.row_factor[stripe] * self.logit_scale)[:, None]
        tile = torch.mul(product, rows, out=self.buffer(self.name, stripe, panel))
        return tile.mul_(self.column_factor[panel])


def prefix_gradient_tiled(
    q: Tensor,
    k: Tensor,
    logit_scale: Tensor,
    pairings: Sequence[Pairing],
    widths: Sequence[int],
    rows: Sequence[SideGradient],
    columns: Sequence[SideGradient | None],
    needs: Needs,
    column_sums: Tensor | None,
    dtype: torch.dtype,
    *,
    shape: TileShape | None = None,
) -> Gradients:
    """Compute dq and dk in `dtype`, and dlogit_scale; None where `needs` says False.

    Adds the sums of all G^p over rows, the gradient of column_bias, to `column_sums` if there are
    any. In a self-contrast dq is the gradient through both sides, and dk is None.
    """
    shape = tile_shape(shape or PREFIX_TILE.on(q.device), pairings[0])
    products = _Products(Tiles(q, k, logit_scale, shape), widths)
    weighted = _WeightedTiles(products, pairings, rows, columns, column_sums)
    if pairings[0].self_contrast:
        return _self_contrast(weighted, needs, dtype)
    return _two_sided(weighted, needs, dtype)


def _two_sided(weighted: _WeightedTiles, needs: Needs, dtype: torch.dtype) -> Gradients:
    needs_q, needs_k, needs_scale = needs
    tiles, logit_scale = weighted.tiles, weighted.tiles.logit_scale
    q, k, wide = tiles.q, tiles.k, logit_scale.dtype
    dq = torch.empty(q.shape, dtype=dtype, device=q.device) if needs_q else None
    dk = torch.zeros(k.shape, dtype=wide, device=k.device) if needs_k else None
    for stripe in tiles.stripes():
        product = logit_scale.new_zeros(q[stripe].shape) if needs_q else None
        for panel in tiles.panels():
            for segment, tile in weighted.add(stripe, panel, multiply=needs_q or needs_k):
                if product is not None:
                    product[:, segment].addmm_(tile, k[panel, segment].to(wide))
                if dk is not None:
                    dk[panel, segment].addmm_(tile.T, q[stripe, segment].to(wide))
        if dq is not None and product is not None:
            weighted.project_rows(product, stripe)
            torch.mul(product, logit_scale, out=dq[stripe])
    if dk is not None:
        for panel in tiles.panels():
            weighted.project_columns(dk[panel], panel)
        dk = dk.mul_(logit_scale).to(dtype)
    return dq, dk, weighted.row_sums.sum() if needs_scale else None


def _self_contrast(weighted: _WeightedTiles, needs: Needs, dtype: torch.dtype) -> Gradients:
    """Multiply each tile above the diagonal into its rows and, transposed, into its columns."""
    tiles, logit_scale = weighted.tiles, weighted.tiles.logit_scale
    q, wide = tiles.q, logit_scale.dtype
    needed = needs[0] or needs[1]
    dq = torch.zeros(q.shape, dtype=wide, device=q.device)
    for stripe, panel in walk(tiles, weighted.pairings[0]):
        for segment, tile in weighted.add(stripe, panel, multiply=needed):
            dq[stripe, segment].addmm_(tile, q[panel, segment].to(wide))
            if stripe != panel:
                dq[panel, segment].addmm_(tile.T, q[stripe, segment].to(wide))
    for stripe in tiles.stripes():
        weighted.project_rows(dq[stripe], stripe)
    # dq came from G + G^T, which meets each entry of S twice.
    dlogit_scale = weighted.row_sums.sum() / 2 if needs[2] else None
    return dq.mul_(logit_scale).to(dtype) if needed else None, None, dlogit_scale


class _WeightedTiles:
    """Sums W^p = r G^p c over prefixes, and G^p S^p over rows and columns.

    Where asked, also G^p over rows and prefixes.
    """

    def __init__(
        self,
        products: _Products,
        pairings: Sequence[Pairing],
        rows: Sequence[SideGradient],
        columns: Sequence[SideGradient | None],
        unweighted_sums: Tensor | None,
    ) -> None:
        self.products, self.tiles, self.pairings = products, products.tiles, pairings
        self.unweighted_sums = unweighted_sums
        prefixes = products.prefixes(separate=True)
        self.gradients = [
            TileGradient(*each) for each in zip(prefixes, pairings, rows, columns, strict=True)
        ]
        self.row_sums = torch.zeros_like(products.row_factor)
        self.column_sums = self.row_sums
        if not pairings[0].self_contrast:
            self.column_sums = torch.zeros_like(products.column_factor)

    def add(self, stripe: slice, panel: slice, *, multiply: bool) -> list[tuple[slice, Tensor]]:
        """Return each segment with its sum of W^p; nothing unless they are multiplied."""
        tiles = [self._weighted(index, stripe, panel) for index in range(len(self.gradients))]
        if not multiply:
            return []
        for shorter, longer in zip(tiles[-2::-1], tiles[:0:-1], strict=True):
            shorter.add_(longer)
        return list(zip(self.products.segments, tiles, strict=True))

    def _weighted(self, index: int, stripe: slice, panel: slice) -> Tensor:
        tile = self.gradients[index].tile(stripe, panel)
        if self.unweighted_sums is not None:
            self.unweighted_sums[panel] += tile.sum(0)
        tile.mul_(self.products.row_factor[index, stripe, None])
        tile.mul_(self.products.column_factor[index, panel])
        product = self.tiles.buffer("product", stripe, panel)
        scratch = torch.mul(tile, product, out=self.tiles.buffer("scratch", stripe, panel))
        self.row_sums[index, stripe] += scratch.sum(1)
        if self.column_sums is not self.row_sums or stripe != panel:
            self.column_sums[index, panel] += scratch.sum(0)
        return tile

    def project_rows(self, gradient: Tensor, stripe: slice) -> None:
        """Remove the part along each prefix from the gradient of these rows."""
        weights = _along(self.row_sums, self.products.row_factor, stripe)
        self._project(gradient, weights, self.tiles.q[stripe])

    def project_columns(self, gradient: Tensor, panel: slice) -> None:
        """Remove the part along each prefix from the gradient of these columns."""
        weights = _along(self.column_sums, self.products.column_factor, panel)
        self._project(gradient, weights, self.tiles.k[panel])

    def _project(self, gradient: Tensor, weights: Tensor, features: Tensor) -> None:
        for segment, weight in zip(self.products.segments, weights, strict=True):
            wide = features[:, segment].to(gradient.dtype)
            gradient[:, segment].addcmul_(wide, weight[:, None], value=-1)


def _along(sums: Tensor, factor: Tensor, where: slice) -> Tensor:
    """Sum r^2 u over the prefixes that contain each segment."""
    factor = factor[:, where]
    # A clamped norm is a constant: it adds nothing.
    free = factor < 1 / SMALLEST_NORM
    weights = list((sums[:, where] * factor.square()).where(free, 0))
    # On CUDA a float cumsum is not deterministic, and prefixes are few.
    return torch.stack(list(accumulate(reversed(weights)))[::-1])
