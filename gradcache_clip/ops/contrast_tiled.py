"""The softmax family tile by tile in plain PyTorch, on any device.

M rows q_i, N columns k_j. A tile of S = logit_scale q k^T stays in the cache, serves rows and
columns at once, and is overwritten by the next one; the backward computes it again. In a
self-contrast S is symmetric: tiles below its diagonal, transposes of those above, are skipped.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradcache_clip.ops.pairing import Gradients, Needs, Pairing, SideGradient, Statistics
from gradcache_clip.ops.tile_gradient import TileGradient
from gradcache_clip.ops.tile_statistics import TileStatistics, tile_shape, walk
from gradcache_clip.ops.tiles import DEFAULT_TILE, Tiles, TileShape


def statistics_tiled(
    q: Tensor,
    k: Tensor,
    logit_scale: Tensor,
    pairing: Pairing,
    *,
    shape: TileShape | None = None,
) -> Statistics:
    """Compute the statistics in one pass; allocate nothing larger than one tile."""
    shape = tile_shape(shape or DEFAULT_TILE.on(q.device), pairing)
    tiles = Tiles(q, k, logit_scale, shape)
    statistics = TileStatistics(tiles, pairing)
    for stripe, panel in walk(tiles, pairing):
        statistics.fold(stripe, panel)
    return statistics.result()


def gradient_tiled(
    q: Tensor,
    k: Tensor,
    logit_scale: Tensor,
    pairing: Pairing,
    rows: SideGradient,
    columns: SideGradient | None,
    needs: Needs,
    column_sums: Tensor | None,
    dtype: torch.dtype,
    *,
    shape: TileShape | None = None,
) -> Gradients:
    """Compute dq and dk in `dtype`, and dlogit_scale; None where `needs` says False.

    Adds the sums of G over rows, the gradient of column_bias, to `column_sums` if there are any.
    In a self-contrast dq is the gradient through both sides, and dk is None.
    """
    shape = tile_shape(shape or DEFAULT_TILE.on(q.device), pairing)
    tiles = Tiles(q, k, logit_scale, shape)
    gradient = TileGradient(tiles, pairing, rows, columns)
    if pairing.self_contrast:
        return _self_contrast(gradient, needs, dtype)
    return _two_sided(gradient, needs, column_sums, dtype)


def _two_sided(
    gradient: TileGradient, needs: Needs, column_sums: Tensor | None, dtype: torch.dtype
) -> Gradients:
    needs_q, needs_k, needs_scale = needs
    tiles, q, k = gradient.tiles, gradient.tiles.q, gradient.tiles.k
    logit_scale, wide = tiles.logit_scale, tiles.logit_scale.dtype
    # <q, G k> and <k, G^T q> are the same sum, so the scale needs only one of the two products.
    through_q = needs_q or (needs_scale and not needs_k)
    dq = torch.empty(q.shape, dtype=dtype, device=q.device) if needs_q else None
    dk = torch.zeros(k.shape, dtype=wide, device=k.device) if needs_k else None
    dlogit_scale = torch.zeros_like(logit_scale) if needs_scale else None
    for stripe in tiles.stripes():
        rows = q[stripe].to(wide)
        product = torch.zeros_like(rows) if through_q else None
        for panel in tiles.panels():
            tile = gradient.tile(stripe, panel)
            if product is not None:
                product.addmm_(tile, k[panel].to(wide))
            if dk is not None:
                dk[panel].addmm_(tile.T, rows)
            if column_sums is not None:
                column_sums[panel] += tile.sum(0)
        if product is not None and dlogit_scale is not None:
            dlogit_scale += (rows * product).sum()
        if product is not None and dq is not None:
            torch.mul(product, logit_scale, out=dq[stripe])
    if not through_q and dk is not None and dlogit_scale is not None:
        dlogit_scale += _rowwise_sum(k, dk, tiles)
    return dq, None if dk is None else dk.mul_(logit_scale).to(dtype), dlogit_scale


def _self_contrast(gradient: TileGradient, needs: Needs, dtype: torch.dtype) -> Gradients:
    """Multiply each tile above the diagonal into its rows and, transposed, into its columns."""
    needs_q, needs_k, needs_scale = needs
    tiles, q = gradient.tiles, gradient.tiles.q
    wide = tiles.logit_scale.dtype
    dq = torch.zeros(q.shape, dtype=wide, device=q.device)
    for stripe, panel in walk(tiles, gradient.pairing):
        tile = gradient.tile(stripe, panel)
        dq[stripe].addmm_(tile, q[panel].to(wide))
        if stripe != panel:
            dq[panel].addmm_(tile.T, q[stripe].to(wide))
    # dq came from G + G^T, which meets each entry of S twice.
    dlogit_scale = _rowwise_sum(q, dq, tiles) / 2 if needs_scale else None
    needed = needs_q or needs_k
    return dq.mul_(tiles.logit_scale).to(dtype) if needed else None, None, dlogit_scale


def _rowwise_sum(features: Tensor, product: Tensor, tiles: Tiles) -> Tensor:
    """Sum features * product without a temporary of their size."""
    total = torch.zeros_like(tiles.logit_scale)
    for stripe in (slice(i, i + tiles.rows) for i in range(0, len(features), tiles.rows)):
        total += (features[stripe] * product[stripe]).sum()
    return total
