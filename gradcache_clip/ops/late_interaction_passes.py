"""Late interaction: the forward and the backward over tiles, whoever computes the tiles.

B images and texts, P image tokens, R text tokens, D feature width; I images of a stripe, J texts of
a panel. Images beyond the texts are in no pair: hard negatives. Where image i and text i are no
pair either, there may be fewer images than texts, too.

A tile holds the similarities of all tokens of I images with all tokens of J texts, and is
overwritten by the next one. Of it remain I x J scores in each direction, which are folded into row
and column softmax. The winners of the maxima would be B^2 (P + R) numbers, so the backward computes
each tile again. Its gradient has one entry for each maximum, P + R of P R for each pair:

    forward             2 B^2 P R D flops
    backward, the tile  2 B^2 P R D
    backward, the rest  4 B^2 (P + R) D as a sum over entries, 4 B^2 P R D as two dense products
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gradcache_clip.ops.late_interaction_tiles import Maxima, TokenTiles
from gradcache_clip.ops.masks import TileMasks
from gradcache_clip.ops.pairing import Gradients, Needs, Pairing, SideGradient, Statistics
from gradcache_clip.ops.tile_statistics import RunningSoftmax


def statistics(tiles: TokenTiles, logit_scale: Tensor, pairing: Pairing) -> Statistics:
    """Run the forward: each image over the texts, and each text over the images.

    Sums are over negatives alone; without a positive its logit is 0. One way the statistics of
    images use the scores of texts that look for them.
    """
    sizes = tiles.images.samples, tiles.texts.samples
    sides = [RunningSoftmax(logit_scale, size) for size in sizes]
    positives = [logit_scale.new_zeros(size) for size in sizes]
    masks, panel = _masks(tiles, logit_scale, pairing), slice(0, tiles.texts.samples)
    for stripe in tiles.stripes():
        rows, columns = _stripe_scores(tiles, stripe, logit_scale)
        both = columns if rows is None else rows, columns
        places = (stripe, 1), (panel, 0)
        for side, positive, scores, place in zip(sides, positives, both, places, strict=True):
            logits = scores * logit_scale
            masks.add_bias(logits, stripe, panel)
            masks.exclude(logits, stripe, panel, -torch.inf)
            masks.take_positives(logits, stripe, panel, positive)
            side.fold(logits, *place, scratch=logits)
    # With one positive per sample the hardest negative is the maximum; ops return no aliases.
    images, texts = (
        (positive, side.max, side.sum, side.max.clone())
        for side, positive in zip(sides, positives, strict=True)
    )
    return Statistics(*images, *texts)


def _masks(tiles: TokenTiles, logit_scale: Tensor, pairing: Pairing) -> TileMasks:
    """Apply the rules to scores, whose rows are images."""

    def buffer(name: str, stripe: slice, panel: slice, dtype: torch.dtype) -> Tensor:
        shape = stripe.stop - stripe.start, panel.stop - panel.start
        return logit_scale.new_empty(shape, dtype=dtype)

    return TileMasks(buffer, tiles.texts.samples, pairing.transposed())


def _stripe_scores(tiles: TokenTiles, stripe: slice, like: Tensor) -> tuple[Tensor | None, Tensor]:
    """Compute the scores of a stripe of images with all texts, in both directions."""
    shape = stripe.stop - stripe.start, tiles.texts.samples
    rows, columns = None if tiles.one_way else like.new_empty(shape), like.new_empty(shape)
    for panel in tiles.text_panels():
        maxima = tiles.maxima(stripe, panel, winners=False)
        columns[:, panel] = maxima.text_to_image
        if rows is not None and maxima.image_to_text is not None:
            rows[:, panel] = maxima.image_to_text
    return rows, columns


def gradient(
    tiles: TokenTiles,
    logit_scale: Tensor,
    pairing: Pairing,
    sides: tuple[SideGradient, SideGradient],
    needs: Needs,
    dtype: torch.dtype,
) -> Gradients:
    """Run the backward from the gradients of both sides' statistics; those of tokens in `dtype`."""
    needs_images, needs_texts, needs_scale = needs
    images, texts = tiles.images, tiles.texts
    dimages = torch.zeros_like(images.given, dtype=dtype) if needs_images else None
    dtexts = texts.zeros(texts.all) if needs_texts else None
    dlogit_scale = torch.zeros_like(logit_scale)
    sides, factor = _in_units(sides)
    masks = _masks(tiles, logit_scale, pairing)
    unscale = factor * logit_scale / tiles.panels.gradient_scale
    for stripe in tiles.stripes():
        own = images.at(stripe)
        rows = images.zeros(own) if needs_images else None
        for panel in tiles.text_panels():
            maxima = tiles.maxima(stripe, panel, winners=needs_images or needs_texts)
            scores = _Scores(maxima, (stripe, panel), logit_scale, masks)
            dscores = scores.gradient(sides, dlogit_scale)
            if needs_images or needs_texts:
                columns = None if dtexts is None else dtexts[texts.at(panel)]
                tiles.add_gradients((stripe, panel), maxima, dscores, (rows, columns))
        if dimages is not None and rows is not None:
            images.put(rows.mul_(unscale), own, dimages)
    if dtexts is not None:
        dtexts = texts.of_given(dtexts.mul_(unscale), dtype)
    return dimages, dtexts, dlogit_scale.mul_(factor) if needs_scale else None


def _in_units(
    sides: tuple[SideGradient, SideGradient],
) -> tuple[tuple[SideGradient, SideGradient], Tensor]:
    """Divide the sides by a common factor that keeps gradients of scores within 16 bits."""
    largest = torch.stack([side.dpositive.abs().amax() for side in sides]).amax()
    factor = largest.where(largest > 0, 1)
    images, texts = (
        SideGradient(side.max, side.dsum / factor, side.dpositive / factor) for side in sides
    )
    return (images, texts), factor


class _Scores(NamedTuple):
    """Scores of a tile."""

    maxima: Maxima
    pair: tuple[slice, slice]
    """Which images, and which texts."""
    logit_scale: Tensor
    masks: TileMasks

    def gradient(
        self, sides: tuple[SideGradient, SideGradient], dlogit_scale: Tensor
    ) -> tuple[Tensor | None, Tensor]:
        """Return dloss/dscores of both directions; add to the gradient of the scale on the way."""
        row, column = (
            None if scores is None else self._of(scores, side, dim, dlogit_scale)
            for scores, side, dim in zip(self.maxima[:2], sides, (1, 0), strict=True)
        )
        assert column is not None
        return row, column

    def _of(self, scores: Tensor, side: SideGradient, dim: int, dlogit_scale: Tensor) -> Tensor:
        peak, dsum, _ = (each.unsqueeze(dim) for each in side.of(self.pair[1 - dim]))
        logits = scores * self.logit_scale
        self.masks.add_bias(logits, *self.pair)
        found = torch.exp(logits - peak).mul_(dsum)
        self.masks.exclude(found, *self.pair, 0.0)
        self.masks.put_positives(found, *self.pair, side.dpositive)
        # These sum to zero over a sample and what else competes, so subtracting one score from all
        # changes nothing but rounding: the largest negative.
        largest = (peak / self.logit_scale).nan_to_num(0, 0, 0)
        dlogit_scale += (found * (scores - largest)).sum()
        return found
