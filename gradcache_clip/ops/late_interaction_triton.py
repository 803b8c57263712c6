"""Late interaction through the Triton kernels, which are imported on first use only.

One kernel computes the similarities of a tile and reduces them to maxima before anything is
written; another writes the gradient of a tile, mostly zeros, into a workspace in the dtype of the
tokens, and two vendor products read it.
"""

from __future__ import annotations

from math import isqrt

from torch import Tensor

from gradcache_clip.ops.late_interaction_tiles import Maxima
from gradcache_clip.ops.token_pieces import Pieces, Run


class TritonPanels:
    """Tiles as large as the workspace of the launch table allows."""

    ignores_nan = True

    def __init__(self, images: Pieces, texts: Pieces, *, one_way: bool) -> None:
        from gradcache_clip.kernels.late_interaction import TokenPanels

        self.images, self.texts = images, texts
        self._values = images.values(images.all), texts.values(texts.all)
        self._panels = TokenPanels(*self._values, both_ways=not one_way, samples=texts.samples)
        self.shape, self.gradient_scale = self._panels.shape, self._panels.gradient_scale
        self.maxima = self._panels.maxima

    @staticmethod
    def piece_limits(tokens: Tensor) -> tuple[tuple[int, int], tuple[int, int]]:
        from gradcache_clip.kernels.late_interaction import piece_limits

        return piece_limits(tokens)

    def texts_at_once(self, images: int, texts: int) -> int:
        return max(1, isqrt(self.shape[0] * self.shape[1] // (images * texts)))

    def add_gradients(
        self,
        runs: tuple[Run, Run],
        maxima: Maxima,
        dscores: tuple[Tensor | None, Tensor],
        dtokens: tuple[Tensor | None, Tensor | None],
    ) -> None:
        images, texts = runs
        row, column = (
            None if each is None else texts.spread(images.spread(each, 0), 1) for each in dscores
        )
        assert column is not None
        text_token, image_token = maxima.best_text_token, maxima.best_image_token
        assert image_token is not None
        winners = (
            None if text_token is None else texts.in_pieces(text_token, 2, self._panels.R),
            images.in_pieces(image_token, 0, self._panels.P),
        )
        weights = self.images.weight[images.pieces], self.texts.weight[texts.pieces]
        dsimilarity = self._panels.dsimilarity(winners, (row, column), weights)
        dimages, dtexts = dtokens
        if dimages is not None:
            self._panels.add_product(dimages, dsimilarity, self._values[1][texts.pieces])
        if dtexts is not None:
            self._panels.add_product(dtexts, dsimilarity.T, self._values[0][images.pieces])
