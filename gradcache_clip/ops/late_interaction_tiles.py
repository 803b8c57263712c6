"""Late interaction: a tile of pieces reduced to scores of samples, whoever computes the pieces.

I images and J texts of a tile, of i and j pieces with P and R tokens, D feature width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple, Protocol

from torch import Tensor

from gradcache_clip.ops.token_pieces import Pieces, Run

if TYPE_CHECKING:
    from jaxtyping import Float, Int


class Maxima(NamedTuple):
    """The scores of a tile, and for the backward the token that won each maximum."""

    image_to_text: Float[Tensor, "I J"] | None
    """None if one way, as `best_text_token` is."""
    text_to_image: Float[Tensor, "I J"]
    best_text_token: Int[Tensor, "i p J"] | None = None
    best_image_token: Int[Tensor, "I j r"] | None = None
    """Winners as `Run.best` numbers them: within the run, or the piece where none is split."""


class Panels(Protocol):
    """Similarities of all tokens of some pieces, one tile at a time."""

    shape: tuple[int, int]
    """How many pieces of images and of texts a tile may take."""
    gradient_scale: float
    """`add_gradients` adds the gradient times this factor."""
    ignores_nan: bool
    """Whether a maximum passes over NaN."""

    def texts_at_once(self, images: int, texts: int) -> int:
        """Return how many texts, of so many pieces, meet the own images of all in one tile."""

    def maxima(
        self, stripe: slice, panel: slice, *, with_index: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor | None]:
        """Return maxima over text tokens (i, P, j) and over image tokens (i, j, R), and who won.

        Both are None one way for the first, the winners without `with_index`.
        """

    def add_gradients(
        self,
        runs: tuple[Run, Run],
        maxima: Maxima,
        dscores: tuple[Tensor | None, Tensor],
        dtokens: tuple[Tensor | None, Tensor | None],
    ) -> None:
        """Add to `dtokens` of the pieces of both runs, where not None."""


class TokenTiles:
    """All pairs of images and texts, tile by tile."""

    def __init__(self, images: Pieces, texts: Pieces, panels: Panels, *, one_way: bool) -> None:
        self.images, self.texts, self.panels, self.one_way = images, texts, panels, one_way
        # A NaN or infinite token must reach every score.
        self._guards = (images.guard(), texts.guard()) if panels.ignores_nan else None

    def stripes(self) -> Iterator[slice]:
        return self.images.cut(slice(0, self.images.samples), self.panels.shape[0])

    def text_panels(self) -> Iterator[slice]:
        return self.texts.cut(slice(0, self.texts.samples), self.panels.shape[1])

    def pairs(self) -> Iterator[tuple[slice, slice]]:
        """Yield a group of texts with the images that are their own, images first.

        Each text of a group is compared with the images of all: for g texts that is g times the
        products in 1/g of the tiles.
        """
        each = self.images.samples // self.texts.samples
        group = self.panels.texts_at_once(each * self.images.most, self.texts.most)
        pieces = self.panels.shape[0] * self.panels.shape[1] // (group * self.texts.most)
        for first in range(0, self.texts.samples, group):
            texts = slice(first, min(first + group, self.texts.samples))
            for own in self.images.cut(slice(first * each, texts.stop * each), pieces):
                yield own, texts

    def maxima(self, stripe: slice, panel: slice, *, winners: bool) -> Maxima:
        images, texts = self.images.run(stripe), self.texts.run(panel)
        best_text, text_token, best_image, image_token = self.panels.maxima(
            images.pieces, texts.pieces, with_index=winners
        )
        guard = self._guard(stripe, panel)
        best_image, image_token = images.best(best_image, image_token, 0)
        looking = (best_image * self.texts.weight[texts.pieces]).sum(2)
        text_to_image = texts.total(looking) + guard
        if best_text is None:
            return Maxima(None, text_to_image, None, image_token)
        best_text, text_token = texts.best(best_text, text_token, 2)
        looking = (best_text * self.images.weight[images.pieces][:, :, None]).sum(1)
        image_to_text = images.total(looking.T).T + guard
        return Maxima(image_to_text, text_to_image, text_token, image_token)

    def _guard(self, stripe: slice, panel: slice) -> Tensor | int:
        if self._guards is None:
            return 0
        return self._guards[0][stripe, None] + self._guards[1][panel]

    def add_gradients(
        self,
        pair: tuple[slice, slice],
        maxima: Maxima,
        dscores: tuple[Tensor | None, Tensor],
        dtokens: tuple[Tensor | None, Tensor | None],
    ) -> None:
        """Add to `dtokens` of the stripe's images and of the panel's texts, where not None."""
        runs = self.images.run(pair[0]), self.texts.run(pair[1])
        self.panels.add_gradients(runs, maxima, dscores, dtokens)
