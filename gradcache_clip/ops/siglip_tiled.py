"""The sigmoid loss tile by tile in plain PyTorch, on any device: loss and gradients in one pass.

M rows q_i, N columns k_j, D feature width; S_ij = logit_scale <q_i, k_j> + logit_bias; z_ij is 1 on
positives and -1 elsewhere. G_ij = dloss/dS_ij, times M: -z sigmoid(-z S).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from gradcache_clip.ops.tiles import DEFAULT_TILE, Tiles, TileShape, diagonal

if TYPE_CHECKING:
    from jaxtyping import Float, Int

Labels = tuple["Int[Tensor, ' m']", "Int[Tensor, ' n']"]

# Above it log(1 + exp(x)) is x to the last digit of fp64.
_SOFTPLUS_IS_LINEAR = 40.0
_SPARE = 64


class Wanted(NamedTuple):
    """What a pass computes beside the loss."""

    dq: bool
    dk: bool
    dlogit_scale: bool
    dlogit_bias: bool
    accuracy: bool

    @property
    def gradients(self) -> bool:
        return any(self[:4])


class SigmoidPass(NamedTuple):
    """The loss and its gradients, all in the dtype of the logits; None where not wanted."""

    loss: Float[Tensor, ""]
    dq: Float[Tensor, "m d"] | None
    dk: Float[Tensor, "n d"] | None
    dlogit_scale: Float[Tensor, ""] | None
    dlogit_bias: Float[Tensor, ""] | None
    row_accuracy: Float[Tensor, ""] | None
    column_accuracy: Float[Tensor, ""] | None


def siglip_tiled(
    q: Float[Tensor, "m d"],
    k: Float[Tensor, "n d"],
    logit_scale: Float[Tensor, ""],
    logit_bias: Float[Tensor, ""],
    labels: Labels | None,
    wanted: Wanted,
    *,
    shape: TileShape = DEFAULT_TILE,
) -> SigmoidPass:
    """One walk over the tiles; no tensor larger than the features or one tile."""
    tiles = Tiles(q, k, logit_scale, shape)
    positives = _Positives(tiles, labels)
    gradients = _Gradients(tiles, wanted)
    ranks = _Ranks(tiles, positives) if wanted.accuracy else None
    losses = []
    for stripe in tiles.stripes():
        gradients.begin(stripe)
        for panel in tiles.panels():
            tile = tiles.logits(stripe, panel).add_(logit_bias)
            if ranks is not None:
                ranks.fold(tile, stripe, panel)
            positives.flip(tile, stripe, panel)
            losses.append(_softplus(tile, out=tiles.buffer("scratch", stripe, panel)).sum())
            if wanted.gradients:
                positives.flip(tile.sigmoid_(), stripe, panel)
                gradients.add(tile, stripe, panel)
        gradients.end(stripe)
    accuracies = (None, None) if ranks is None else ranks.accuracies()
    return SigmoidPass(_total(losses) / len(q), *gradients.unit_gradients(), *accuracies)


def _softplus(x: Tensor, *, out: Tensor) -> Tensor:
    result: Tensor = torch.ops.aten.softplus.out(x, 1, _SOFTPLUS_IS_LINEAR, out=out)
    return result


def _total(parts: list[Tensor]) -> Tensor:
    """Sum of the sums of tiles, pairwise: one accumulator over M N terms would lose digits."""
    return torch.stack(parts).sum()


class _Positives:
    """Where the positives of a tile are: on the diagonal, or wherever labels are equal."""

    def __init__(self, tiles: Tiles, labels: Labels | None) -> None:
        self.tiles, self.labels = tiles, labels

    def flip(self, tile: Tensor, stripe: slice, panel: slice) -> None:
        """Negate the positives in place: S becomes -z S, and sigmoid(-z S) becomes G."""
        if self.labels is None:
            diagonal(tile, stripe, panel)[0].neg_()
            return
        sign = self._equal(stripe, panel, self.tiles.buffer("sign", stripe, panel))
        tile.mul_(sign.mul_(-2).add_(1))

    def mask(self, stripe: slice, panel: slice) -> Tensor:
        """Only with labels."""
        return self._equal(stripe, panel, self.tiles.buffer("mask", stripe, panel, torch.bool))

    def _equal(self, stripe: slice, panel: slice, out: Tensor) -> Tensor:
        assert self.labels is not None
        rows, columns = self.labels
        return torch.eq(rows[stripe, None], columns[panel], out=out)


class _Gradients:
    """Sums G k, G^T q and G over the tiles, as far as they are wanted."""

    def __init__(self, tiles: Tiles, wanted: Wanted) -> None:
        self.tiles, self.wanted = tiles, wanted
        self.dtype = tiles.logit_scale.dtype
        self.dq = _zeros(tiles.logit_scale, tiles.q) if wanted.dq else None
        self.dk = _zeros(tiles.logit_scale, tiles.k) if wanted.dk else None
        # <q, G k> and <k, G^T q> are the same sum, so the scale needs only one of the two products.
        self.through_q = wanted.dq or (wanted.dlogit_scale and not wanted.dk)
        self.scale_parts: list[Tensor] = []
        self.bias_parts: list[Tensor] = []

    def begin(self, stripe: slice) -> None:
        self.rows = self.tiles.q[stripe].to(self.dtype)
        if self.through_q:
            self.product = torch.zeros_like(self.rows) if self.dq is None else self.dq[stripe]

    def add(self, gradient: Tensor, stripe: slice, panel: slice) -> None:
        if self.through_q:
            self.product.addmm_(gradient, self.tiles.k[panel].to(self.dtype))
        if self.dk is not None:
            self.dk[panel].addmm_(gradient.T, self.rows)
        if self.wanted.dlogit_bias:
            self.bias_parts.append(gradient.sum())

    def end(self, stripe: slice) -> None:
        if self.wanted.dlogit_scale and self.through_q:
            self.scale_parts.append((self.rows * self.product).sum())

    def unit_gradients(self) -> tuple[Tensor | None, ...]:
        """Gradients of the loss itself: G over M, and through the scale."""
        rows = len(self.tiles.q)
        if self.wanted.dlogit_scale and self.dk is not None and not self.through_q:
            for panel in self.tiles.panels():
                self.scale_parts.append((self.tiles.k[panel] * self.dk[panel]).sum())
        for product in (self.dq, self.dk):
            if product is not None:
                product.mul_(self.tiles.logit_scale / rows)
        scale, bias = (
            _total(parts) / rows if parts else None for parts in (self.scale_parts, self.bias_parts)
        )
        return self.dq, self.dk, scale, bias


def _zeros(scale: Tensor, like: Tensor) -> Tensor:
    """Zeros in the shape of `like`, in memory that the scaled gradient of its size can take over.

    The backward lets go of one before it asks for the next, but malloc finds aligned memory only
    where there is a little more than asked for.
    """
    return scale.new_zeros(like.numel() + _SPARE)[: like.numel()].view(like.shape)


class _Ranks:
    """The largest logit of a positive and of a negative, for each row and each column."""

    def __init__(self, tiles: Tiles, positives: _Positives) -> None:
        self.tiles, self.positives = tiles, positives
        M, N = len(tiles.q), len(tiles.k)
        self.row_positive, self.row_negative, self.column_positive, self.column_negative = (
            tiles.logit_scale.new_full((size,), -torch.inf) for size in (M, M, N, N)
        )
        self.nothing = tiles.logit_scale.new_full((), -torch.inf)

    def fold(self, tile: Tensor, stripe: slice, panel: slice) -> None:
        """Take in the logits of a tile, and leave them as they were."""
        if self.positives.labels is None:
            self._fold_diagonal(tile, stripe, panel)
            return
        mask = self.positives.mask(stripe, panel)
        scratch = self.tiles.buffer("scratch", stripe, panel)
        torch.where(mask, tile, self.nothing, out=scratch)
        _raise(self.row_positive[stripe], self.column_positive[panel], scratch)
        torch.where(mask, self.nothing, tile, out=scratch)
        _raise(self.row_negative[stripe], self.column_negative[panel], scratch)

    def _fold_diagonal(self, tile: Tensor, stripe: slice, panel: slice) -> None:
        entries, pairs = diagonal(tile, stripe, panel)
        positive = entries.clone()
        self.row_positive[pairs] = positive
        self.column_positive[pairs] = positive
        entries.fill_(-torch.inf)
        _raise(self.row_negative[stripe], self.column_negative[panel], tile)
        entries.copy_(positive)

    def accuracies(self) -> tuple[Tensor, Tensor]:
        dtype = self.row_positive.dtype
        row_right = self.row_positive > self.row_negative
        column_right = self.column_positive > self.column_negative
        return row_right.to(dtype).mean(), column_right.to(dtype).mean()


def _raise(row_best: Tensor, column_best: Tensor, tile: Tensor) -> None:
    torch.maximum(row_best, tile.amax(1), out=row_best)
    torch.maximum(column_best, tile.amax(0), out=column_best)
