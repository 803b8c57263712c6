"""Late interaction: the forward and the backward over tiles, whoever computes the tiles.

B pairs, P image tokens, R text tokens, D feature width; I images of a stripe, J texts of a panel.

A tile holds the similarities of all tokens of I images with all tokens of J texts, and is
overwritten by the next one. Of it remain I x J scores in each direction, which are folded into row
and column softmax. The winners of the maxima would be B^2 (P + R) numbers, so the backward computes
each tile again. Its gradient has one entry for each maximum, P + R of P R for each pair:

    forward             2 B^2 P R D flops
    backward, the tile  2 B^2 P R D
    backward, the rest  4 B^2 (P + R) D as a sum over entries, 4 B^2 P R D as two dense products
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

Needs = tuple[bool, bool, bool]
Gradients = tuple["Tensor | None", "Tensor | None", "Tensor | None"]


class Tokens(NamedTuple):
    """One side, made so that maxima need no mask."""

    values: Float[Tensor, "b t d"]
    """Invalid tokens hold a copy of the first valid one of their sample, or 0 if it has none."""
    weight: Float[Tensor, "b t"]
    """Of a token in the mean or sum over its sample; 0 for invalid ones."""
    mask: Bool[Tensor, "b t"] | None


class Maxima(NamedTuple):
    """What is kept of a tile: scores, and for the backward the token that won each maximum."""

    image_to_text: Float[Tensor, "i j"] | None
    """None if one way, as `best_text_token` is."""
    text_to_image: Float[Tensor, "i j"]
    best_text_token: Int[Tensor, "i p j"] | None = None
    best_image_token: Int[Tensor, "i j r"] | None = None


class TokenTiles(Protocol):
    """Tiles of one implementation."""

    images: Tokens
    texts: Tokens
    one_way: bool
    gradient_scale: float
    """`add_gradients` adds this many times the gradient."""

    def stripes(self) -> Iterator[slice]: ...

    def panels(self) -> Iterator[slice]: ...

    def maxima(self, stripe: slice, panel: slice, *, winners: bool) -> Maxima: ...

    def add_gradients(
        self,
        pair: tuple[slice, slice],
        maxima: Maxima,
        dscores: tuple[Tensor | None, Tensor],
        dtokens: tuple[Tensor | None, Tensor | None],
    ) -> None:
        """Add to `dtokens` of the stripe's images and of the panel's texts, where not None."""


class Direction(NamedTuple):
    """Of each sample that searches: the score of its partner, and its loss. Empty if unused."""

    positive: Float[Tensor, " b"]
    loss: Float[Tensor, " b"]


class Summary(NamedTuple):
    """What the forward leaves."""

    loss: Float[Tensor, ""]
    image_to_text_accuracy: Float[Tensor, ""]
    text_to_image_accuracy: Float[Tensor, ""]
    images: Direction
    texts: Direction


def masked_tokens(
    tokens: Tensor, mask: Tensor | None, token_reduction: str, dtype: torch.dtype
) -> Tokens:
    """One side as tiles take it; copied only where there is a mask."""
    weight = torch.ones(tokens.shape[:2], dtype=dtype, device=tokens.device)
    if mask is not None:
        weight = mask.to(dtype)
        index = _first(mask)[:, None, None].expand(-1, 1, tokens.shape[2])
        first = tokens.gather(1, index).masked_fill_(~mask.any(1)[:, None, None], 0)
        tokens = tokens.where(mask[:, :, None], first)
    if token_reduction == "mean":
        weight = weight / weight.sum(1, keepdim=True).clamp_min(1)
    return Tokens(tokens.contiguous(), weight, mask)


def _first(mask: Tensor) -> Tensor:
    return mask.to(torch.uint8).argmax(1)


def _unmasked(dtokens: Tensor, mask: Tensor | None) -> Tensor:
    """Gradient of the tokens from that of `Tokens.values`, in place: copies give to the first."""
    if mask is None:
        return dtokens
    copies = (~mask & mask.any(1, keepdim=True)).to(dtokens.dtype)
    sample, first = torch.arange(len(mask), device=mask.device), _first(mask)
    given = torch.bmm(copies[:, None], dtokens)[:, 0]
    dtokens.masked_fill_(~mask[:, :, None], 0)
    dtokens[sample, first] = dtokens[sample, first] + given
    return dtokens


def summary(tiles: TokenTiles, logit_scale: Tensor) -> Summary:
    """The forward: loss and accuracies, and the vectors that the backward needs."""
    size = len(tiles.images.values)
    images, texts = _Fold(logit_scale, 0 if tiles.one_way else size), _Fold(logit_scale, size)
    image_right = torch.empty(size, dtype=torch.bool, device=logit_scale.device)
    for stripe in tiles.stripes():
        rows, columns = _stripe_scores(tiles, stripe, logit_scale)
        negatives = texts.take_positives(columns, stripe)
        texts.add(negatives, slice(0, size), dim=0)
        if rows is not None:
            negatives = images.take_positives(rows, stripe)
            images.add(negatives, stripe, dim=1)
        positive = (texts if rows is None else images).positive[stripe] * logit_scale
        image_right[stripe] = positive > negatives.amax(1)
    text_right = texts.positive * logit_scale > texts.max
    directions = images.direction(), texts.direction()
    losses = [each.loss.mean() for each in directions[tiles.one_way :]]
    dtype = logit_scale.dtype
    accuracies = image_right.to(dtype).mean(), text_right.to(dtype).mean()
    return Summary(torch.stack(losses).mean(), *accuracies, *directions)


def _stripe_scores(tiles: TokenTiles, stripe: slice, like: Tensor) -> tuple[Tensor | None, Tensor]:
    """Scores of the images of a stripe with all texts, image to text and text to image."""
    shape = stripe.stop - stripe.start, len(tiles.texts.values)
    rows, columns = None if tiles.one_way else like.new_empty(shape), like.new_empty(shape)
    for panel in tiles.panels():
        maxima = tiles.maxima(stripe, panel, winners=False)
        columns[:, panel] = maxima.text_to_image
        if rows is not None and maxima.image_to_text is not None:
            rows[:, panel] = maxima.image_to_text
    return rows, columns


class _Fold:
    """Positive scores, and (max, sum of exp) over the negative logits so far, of each sample."""

    def __init__(self, logit_scale: Tensor, size: int) -> None:
        self.logit_scale = logit_scale
        self.positive = logit_scale.new_empty(size)
        self.max = logit_scale.new_full((size,), -torch.inf)
        self.sum = logit_scale.new_zeros(size)

    def take_positives(self, scores: Tensor, stripe: slice) -> Tensor:
        """Logits with -inf in the place of the positives."""
        self.positive[stripe] = scores.diagonal(stripe.start)
        logits = scores * self.logit_scale
        logits.diagonal(stripe.start).fill_(-torch.inf)
        return logits

    def add(self, negatives: Tensor, where: slice, dim: int) -> None:
        before, total = self.max[where], self.sum[where]
        peak = torch.maximum(before, negatives.amax(dim))
        # Where there is no negative yet there is no finite maximum to subtract.
        reference = peak.masked_fill(peak == -torch.inf, 0)
        added = torch.exp(negatives - reference.unsqueeze(dim)).sum(dim)
        total.mul_(torch.exp(before - reference)).add_(added)
        before.copy_(peak)

    def direction(self) -> Direction:
        gap = self.max - self.positive * self.logit_scale + self.sum.log()
        return Direction(self.positive, torch.logaddexp(gap, torch.zeros_like(gap)))


def gradient(
    tiles: TokenTiles,
    logit_scale: Tensor,
    factor: Tensor,
    directions: tuple[Direction, Direction],
    needs: Needs,
) -> Gradients:
    """The backward. `factor` (0-dim) is the outer gradient over the number of softmax terms."""
    needs_images, needs_texts, needs_scale = needs
    images, texts, dtype = tiles.images, tiles.texts, logit_scale.dtype
    dimages = torch.empty_like(images.values) if needs_images else None
    dtexts = torch.zeros_like(texts.values, dtype=dtype) if needs_texts else None
    dlogit_scale = torch.zeros_like(logit_scale)
    unscale = factor * logit_scale / tiles.gradient_scale
    for stripe in tiles.stripes():
        rows = torch.zeros_like(images.values[stripe], dtype=dtype) if needs_images else None
        for panel in tiles.panels():
            maxima = tiles.maxima(stripe, panel, winners=needs_images or needs_texts)
            dscores = _dscores(maxima, (stripe, panel), logit_scale, directions, dlogit_scale)
            if needs_images or needs_texts:
                columns = None if dtexts is None else dtexts[panel]
                tiles.add_gradients((stripe, panel), maxima, dscores, (rows, columns))
        if dimages is not None and rows is not None:
            mask = None if images.mask is None else images.mask[stripe]
            dimages[stripe] = _unmasked(rows, mask).mul_(unscale)
    if dtexts is not None:
        dtexts = _unmasked(dtexts, texts.mask).mul_(unscale).to(texts.values.dtype)
    return dimages, dtexts, dlogit_scale.mul_(factor) if needs_scale else None


def _dscores(
    maxima: Maxima,
    pair: tuple[slice, slice],
    logit_scale: Tensor,
    directions: tuple[Direction, Direction],
    dlogit_scale: Tensor,
) -> tuple[Tensor | None, Tensor]:
    """Softmax less target of both directions; adds to the gradient of the scale on the way."""
    gradients: list[Tensor | None] = []
    for scores, direction, where, dim in zip(maxima[:2], directions, pair, (1, 0), strict=True):
        if scores is None:
            gradients.append(None)
            continue
        positive, loss = (each[where].unsqueeze(dim) for each in direction)
        softmax = torch.exp((scores * logit_scale - positive * logit_scale) - loss)
        # exp(-loss) - 1 keeps its digits where the softmax of the positive rounds to one.
        entries, pairs = _diagonal(softmax, *pair)
        entries.copy_(torch.expm1(-direction.loss[pairs]))
        # The rows of softmax less target sum to zero, so any score may be subtracted.
        dlogit_scale += (softmax * (scores - positive)).sum()
        gradients.append(softmax)
    row, column = gradients
    assert column is not None
    return row, column


def _diagonal(tile: Tensor, stripe: slice, panel: slice) -> tuple[Tensor, slice]:
    """The pairs' entries inside a tile (often none), and which pairs they are."""
    entries = tile.diagonal(stripe.start - panel.start)
    first = max(stripe.start, panel.start)
    return entries, slice(first, first + len(entries))
