"""Late interaction through the Triton kernels, which are imported on first use only.

P image tokens, R text tokens, D feature width; I images and J texts of a tile.

One kernel computes the similarities of a tile and reduces them to maxima before anything is
written; another writes the gradient of a tile, mostly zeros, into a workspace in the dtype of the
tokens, and two vendor products read it.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import isqrt
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gradcache_clip.ops.late_interaction_passes import Maxima
from gradcache_clip.ops.token_pieces import Pieces
from gradcache_clip.ops.token_sides import PackedSide, Tokens

if TYPE_CHECKING:
    from gradcache_clip.kernels.late_interaction import TokenPanels


class TritonTiles:
    """Tiles as large as the workspace of the launch table allows."""

    images: Tokens | Pieces
    texts: Tokens | Pieces
    one_way: bool

    def __init__(self, images: Tokens, texts: Tokens, *, one_way: bool) -> None:
        from gradcache_clip.kernels.late_interaction import TokenPanels

        self.images, self.texts, self.one_way = images, texts, one_way
        self._panels: TokenPanels = TokenPanels(images.values, texts.values, both_ways=not one_way)
        self.gradient_scale = self._panels.gradient_scale
        # Maxima on the device ignore NaN; a NaN or infinite token must reach every score.
        self._guards = [_guard(side) for side in (images, texts)]

    def stripes(self) -> Iterator[slice]:
        return self._panels.stripes()

    def panels(self) -> Iterator[slice]:
        return self._panels.panels()

    def maxima(self, stripe: slice, panel: slice, *, winners: bool) -> Maxima:
        best_text, text_token, best_image, image_token = self._panels.maxima(
            stripe, panel, with_index=winners
        )
        guard = self._guards[0][stripe, None] + self._guards[1][panel]
        text_to_image = (best_image * self.texts.weight[panel]).sum(2) + guard
        if best_text is None:
            return Maxima(None, text_to_image, None, image_token)
        image_to_text = (best_text * self.images.weight[stripe][:, :, None]).sum(1) + guard
        return Maxima(image_to_text, text_to_image, text_token, image_token)

    def add_gradients(
        self,
        pair: tuple[slice, slice],
        maxima: Maxima,
        dscores: tuple[Tensor | None, Tensor],
        dtokens: tuple[Tensor | None, Tensor | None],
    ) -> None:
        winners = maxima.best_text_token, maxima.best_image_token
        weights = self.images.weight[pair[0]], self.texts.weight[pair[1]]
        dsimilarity = self._panels.dsimilarity(winners, dscores, weights)
        dimages, dtexts = dtokens
        if dimages is not None:
            self._panels.add_product(dimages, dsimilarity, self.texts.values[pair[1]])
        if dtexts is not None:
            self._panels.add_product(dtexts, dsimilarity.T, self.images.values[pair[0]])


class PieceTiles(TritonTiles):
    """Tiles of packed tokens, cut into pieces that are samples to the kernels."""

    images: Pieces
    texts: Pieces

    def __init__(self, images: PackedSide, texts: PackedSide, *, one_way: bool) -> None:
        from gradcache_clip.kernels.late_interaction import TokenPanels, piece_lengths

        lengths = piece_lengths(images.values, *(_lengths(side) for side in (images, texts)))
        self.images, self.texts = map(Pieces.of, (images, texts), lengths)
        self.one_way, both = one_way, (self.images.values, self.texts.values)
        self._panels = TokenPanels(*both, both_ways=not one_way, samples=texts.samples)
        self.gradient_scale = self._panels.gradient_scale
        self._guards = [_guard_of_packed(side) for side in (images, texts)]
        pairs = zip((self.images, self.texts), self._panels.shape, strict=True)
        self._cuts = [list(side.cut(slice(0, side.samples), most)) for side, most in pairs]

    def stripes(self) -> Iterator[slice]:
        return iter(self._cuts[0])

    def panels(self) -> Iterator[slice]:
        return iter(self._cuts[1])

    def pairs(self) -> Iterator[tuple[slice, slice]]:
        """Yield a group of texts with the images that are their own, images first.

        Each text of a group is compared with the images of all: for g texts that is g times the
        products in 1/g of the launches. The workspace bounds g.
        """
        each, most = self.images.samples // self.texts.samples, self._panels.shape
        pieces = most[0] * most[1] // self.texts.most
        group = max(1, isqrt(pieces // (each * self.images.most)))
        for first in range(0, self.texts.samples, group):
            texts = slice(first, min(first + group, self.texts.samples))
            for own in self.images.cut(slice(first * each, texts.stop * each), pieces // group):
                yield own, texts

    def maxima(self, stripe: slice, panel: slice, *, winners: bool) -> Maxima:
        images, texts = self.images.run(stripe), self.texts.run(panel)
        best_text, text_token, best_image, image_token = self._panels.maxima(
            images.pieces, texts.pieces, with_index=winners
        )
        guard = self._guards[0][stripe, None] + self._guards[1][panel]
        best_image, image_token = images.best(best_image, image_token, 0)
        looking = (best_image * self.texts.weight[texts.pieces]).sum(2)
        text_to_image = texts.total(looking) + guard
        if best_text is None:
            return Maxima(None, text_to_image, None, image_token)
        best_text, text_token = texts.best(best_text, text_token, 2)
        looking = (best_text * self.images.weight[images.pieces][:, :, None]).sum(1)
        image_to_text = images.total(looking.T).T + guard
        return Maxima(image_to_text, text_to_image, text_token, image_token)

    def add_gradients(
        self,
        pair: tuple[slice, slice],
        maxima: Maxima,
        dscores: tuple[Tensor | None, Tensor],
        dtokens: tuple[Tensor | None, Tensor | None],
    ) -> None:
        images, texts = self.images.run(pair[0]), self.texts.run(pair[1])
        row, column = (
            None
            if each is None
            else each.index_select(0, images.sample).index_select(1, texts.sample)
            for each in dscores
        )
        assert column is not None
        pieces = images.pieces, texts.pieces
        super().add_gradients(pieces, maxima, (row, column), dtokens)


def _guard(side: Tokens) -> Tensor:
    """Return 0 for each sample, NaN where one of its tokens is not finite."""
    return side.values.sum((1, 2), dtype=torch.float32).mul_(0)


def _guard_of_packed(side: PackedSide) -> Tensor:
    each = side.values.sum(1, dtype=torch.float32).mul_(0)
    return each.new_zeros(side.samples).index_add_(0, side.sample, each)


def _lengths(side: PackedSide) -> list[int]:
    """Return how many tokens of each sample may be found, and how many others there are."""
    return [n for span in side.spans for n in (span.found - span.start, span.stop - span.found)]
