"""The sigmoid loss tile by tile in plain PyTorch, on any device: loss and gradients in one pass.

M rows q_i, N columns k_j, D feature width; S_ij = logit_scale <q_i, k_j> + logit_bias; z_ij is 1 on
positives and -1 elsewhere. A pass sums over all i and j; the gradient of its sum is
G_ij = dloss/dS_ij = -z sigmoid(-z S).
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
    """Flags: what a pass computes beside the loss."""

    dq: bool
    dk: bool
    dlogit_scale: bool
    dlogit_bias: bool
    accuracy: bool

    @property
    def gradients(self) -> bool:
        return any(self[:4])


class SigmoidPass(NamedTuple):
    """Sums over M x N entries, all in the dtype of the logits; None where not wanted."""

    loss: Float[Tensor, ""]
    dq: Float[Tensor, "m d"] | None
    """G k, without the scale."""
    dk: Float[Tensor, "n d"] | None
    """G^T q, without the scale."""
    dlogit_scale: Float[Tensor, ""] | None
    dlogit_bias: Float[Tensor, ""] | None
    row_best: Float[Tensor, "2 m"] | None
    """The largest logit of a positive, and of a negative, or a monotone function of them."""
    column_best: Float[Tensor, "2 n"] | None

    def mean(self, logit_scale: Tensor, rows: int) -> SigmoidPass:
        """Divide loss and gradients by `rows`; in place for the gradients of features."""
        for product in (self.dq, self.dk):
            if product is not None:
                product.mul_(logit_scale / rows)
        scale, bias = (None if each is None else each / rows for each in self[3:5])
        return self._replace(loss=self.loss / rows, dlogit_scale=scale, dlogit_bias=bias)


def siglip_tiled(
    q: Float[Tensor, "m d"],
    k: Float[Tensor, "n d"],
    logit_scale: Float[Tensor, ""],
    logit_bias: Float[Tensor, ""],
    labels: Labels | None,
    wanted: Wanted,
    *,
    paired: bool = True,
    shape: TileShape | None = None,
) -> SigmoidPass:
    """Walk once over the tiles; allocate nothing larger than the features or one tile.

    Without labels the positives are those of the diagonal if `paired`, or none.
    """
    tiles = Tiles(q, k, logit_scale, shape or DEFAULT_TILE.on(q.device))
    positives = _Positives(tiles, labels, paired)
    gradients = _Gradients(tiles, wanted)
    best = _Best(tiles, positives) if wanted.accuracy else None
    losses = []
    for stripe in tiles.stripes():
        gradients.begin(stripe)
        for panel in tiles.panels():
            tile = tiles.logits(stripe, panel).add_(logit_bias)
            if best is not None:
                best.fold(tile, stripe, panel)
            positives.flip(tile, stripe, panel)
            losses.append(_softplus(tile, out=tiles.buffer("scratch", stripe, panel)).sum())
            if wanted.gradients:
                positives.flip(tile.sigmoid_(), stripe, panel)
                gradients.add(tile, stripe, panel)
        gradients.end(stripe)
    largest = (None, None) if best is None else (best.rows, best.columns)
    return SigmoidPass(_total(losses), *gradients.totals(), *largest)


def _softplus(x: Tensor, *, out: Tensor) -> Tensor:
    result: Tensor = torch.ops.aten.softplus.out(x, 1, _SOFTPLUS_IS_LINEAR, out=out)
    return result


def _total(parts: list[Tensor]) -> Tensor:
    """Sum the sums of tiles pairwise: one accumulator over M N terms would lose digits."""
    return torch.stack(parts).sum()


class _Positives:
    """Finds the positives of a tile: where labels are equal, on the diagonal, or nowhere."""

    def __init__(self, tiles: Tiles, labels: Labels | None, paired: bool) -> None:
        self.tiles, self.labels, self.paired = tiles, labels, paired

    def flip(self, tile: Tensor, stripe: slice, panel: slice) -> None:
        """Negate the positives in place: S becomes -z S, and sigmoid(-z S) becomes G."""
        if self.labels is not None:
            sign = self._equal(stripe, panel, self.tiles.buffer("sign", stripe, panel))
            tile.mul_(sign.mul_(-2).add_(1))
        elif self.paired:
            diagonal(tile, stripe, panel)[0].neg_()

    def mask(self, stripe: slice, panel: slice) -> Tensor:
        """Mask the positives; only with labels."""
        return self._equal(stripe, panel, self.tiles.buffer("mask", stripe, panel, torch.bool))

    def _equal(self, stripe: slice, panel: slice, out: Tensor) -> Tensor:
        assert self.labels is not None
        rows, columns = self.labels
        return torch.eq(rows[stripe, None], columns[panel], out=out)


class _Gradients:
    """Sums G k, G^T q and G over the tiles, where wanted."""

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

    def totals(self) -> tuple[Tensor | None, ...]:
        """Return both products, and the sums of G <q, k> and of G."""
        if self.wanted.dlogit_scale and self.dk is not None and not self.through_q:
            for panel in self.tiles.panels():
                self.scale_parts.append((self.tiles.k[panel] * self.dk[panel]).sum())
        scale, bias = (
            _total(parts) if parts else None for parts in (self.scale_parts, self.bias_parts)
        )
        return self.dq, self.dk, scale, bias


def _zeros(scale: Tensor, like: Tensor) -> Tensor:
    """Return zeros in the shape of `like`, in memory that a gradient of its size can reuse."""
    # The backward frees one before it allocates the next, but malloc finds aligned memory in the
    # hole only if that is a little larger.
    return scale.new_zeros(like.numel() + _SPARE)[: like.numel()].view(like.shape)


class _Best:
    """Keeps the largest logit of a positive and of a negative, for each row and each column."""

    def __init__(self, tiles: Tiles, positives: _Positives) -> None:
        self.tiles, self.positives = tiles, positives
        self.rows, self.columns = (
            tiles.logit_scale.new_full((2, len(side)), -torch.inf) for side in (tiles.q, tiles.k)
        )
        self.nothing = tiles.logit_scale.new_full((), -torch.inf)

    def fold(self, tile: Tensor, stripe: slice, panel: slice) -> None:
        """Add the logits of a tile, and leave them as they were."""
        if self.positives.labels is not None:
            self._fold_labelled(tile, stripe, panel)
        elif self.positives.paired:
            self._fold_diagonal(tile, stripe, panel)
        else:
            self._raise(1, tile, stripe, panel)

    def _fold_labelled(self, tile: Tensor, stripe: slice, panel: slice) -> None:
        mask = self.positives.mask(stripe, panel)
        scratch = self.tiles.buffer("scratch", stripe, panel)
        torch.where(mask, tile, self.nothing, out=scratch)
        self._raise(0, scratch, stripe, panel)
        torch.where(mask, self.nothing, tile, out=scratch)
        self._raise(1, scratch, stripe, panel)

    def _fold_diagonal(self, tile: Tensor, stripe: slice, panel: slice) -> None:
        entries, pairs = diagonal(tile, stripe, panel)
        positive = entries.clone()
        self.rows[0, pairs] = positive
        self.columns[0, pairs] = positive
        entries.fill_(-torch.inf)
        self._raise(1, tile, stripe, panel)
        entries.copy_(positive)

    def _raise(self, which: int, tile: Tensor, stripe: slice, panel: slice) -> None:
        row_best, column_best = self.rows[which, stripe], self.columns[which, panel]
        torch.maximum(row_best, tile.amax(1), out=row_best)
        torch.maximum(column_best, tile.amax(0), out=column_best)
