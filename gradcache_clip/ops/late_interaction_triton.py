"""Late interaction through the Triton kernels, which are imported on first use only.

P image tokens, R text tokens, D feature width; I images and J texts of a tile.

One kernel computes the similarities of a tile and reduces them to maxima before anything is
written; another writes the gradient of a tile, mostly zeros, into a workspace in the dtype of the
tokens, and two vendor products read it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gradcache_clip.ops.late_interaction_passes import Maxima
from gradcache_clip.ops.token_sides import Tokens

if TYPE_CHECKING:
    from gradcache_clip.kernels.late_interaction import TokenPanels


class TritonTiles:
    """Tiles as large as the workspace of the launch table allows."""

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
        weights = self.images.weight[pair[0]], self.texts.weight[pair[1]]
        winners = maxima.best_text_token, maxima.best_image_token
        dsimilarity = self._panels.dsimilarity(winners, dscores, weights)
        dimages, dtexts = dtokens
        if dimages is not None:
            self._panels.add_product(dimages, dsimilarity, self.texts.values[pair[1]])
        if dtexts is not None:
            self._panels.add_product(dtexts, dsimilarity.T, self.images.values[pair[0]])


def _guard(side: Tokens) -> Tensor:
    """Return 0 for each sample, NaN where one of its tokens is not finite."""
    return side.values.sum((1, 2), dtype=torch.float32).mul_(0)
