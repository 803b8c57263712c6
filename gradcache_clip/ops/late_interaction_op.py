"""Late interaction as a differentiable op, which torch.compile takes as it is.

B pairs, P image tokens, R text tokens, D feature width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gradcache_clip.ops.implementations import autocast_disabled
from gradcache_clip.ops.late_interaction_passes import gradient, statistics
from gradcache_clip.ops.late_interaction_tiled import TorchPanels
from gradcache_clip.ops.late_interaction_tiles import TokenTiles
from gradcache_clip.ops.late_interaction_triton import TritonPanels
from gradcache_clip.ops.pairing import Gradients, Needs, Pairing, SideGradient, Statistics
from gradcache_clip.ops.statistics_op import register
from gradcache_clip.ops.token_pieces import Pieces, TokenReduction


class TokenRules(NamedTuple):
    """The rules of a contrast of images and texts, as `Pairing` has those of a contrast of rows."""

    image_mask: Tensor | None
    """(B, P) bool, True for tokens that count; all when None."""
    text_mask: Tensor | None
    one_way: bool
    token_reduction: TokenReduction
    pairing: Pairing = Pairing()
    """Which images (columns) compete for which texts (rows), and the reverse."""
    texts_first: bool = False
    """Whether the texts are the rows."""
    both_ways: bool = True
    """Images and texts both have statistics, also where only one side has a loss."""
    self_contrast: bool = False
    image_spans: Tensor | None = None
    """(3, B) integers, for both sides or none. The tokens (B, L, D) lie one after the other; those
    of an image start at the first number, may be found up to the second and count up to the third,
    where the mask says so."""
    text_spans: Tensor | None = None

    def packed(self) -> tuple[list[Tensor | None], list[int]]:
        """Return masks, vectors and numbers, as an op of torch.library takes them."""
        vectors, numbers = self.pairing.packed()
        masks = self.image_mask, self.text_mask, self.image_spans, self.text_spans
        flags = int(self.one_way), int(self.token_reduction == "mean")
        return [*masks, *vectors], [*flags, *numbers]

    @staticmethod
    def unpacked(masks: Sequence[Tensor | None], numbers: Sequence[int]) -> TokenRules:
        """Invert `packed`."""
        image_mask, text_mask, image_spans, text_spans, *vectors = masks
        pairing = Pairing.unpacked(vectors, numbers[2:])
        rules = TokenRules(image_mask, text_mask, bool(numbers[0]), "mean" if numbers[1] else "sum")
        return rules._replace(image_spans=image_spans, text_spans=text_spans, pairing=pairing)

    def of_block(self, images: slice, texts: slice) -> TokenRules:
        """Keep these images and texts."""
        masks = zip((self.image_mask, self.text_mask), (images, texts), strict=True)
        of_images, of_texts = (None if mask is None else mask[where] for mask, where in masks)
        pairing = self.pairing.of_block(texts, images)
        block = self._replace(image_mask=of_images, text_mask=of_texts, pairing=pairing)
        if self.image_spans is None or self.text_spans is None:
            return block
        spans = self.image_spans[:, images], self.text_spans[:, texts]
        from_start = [each - each[0, 0] for each in spans]
        return block._replace(image_spans=from_start[0], text_spans=from_start[1])

    def without_positives(self, images: int, texts: int) -> TokenRules:
        """Return the rules of images and texts of which no two are a pair."""
        return self._replace(pairing=self.pairing.without_positives(texts, images))

    def transposed(self) -> TokenRules:
        """Make the texts the rows, or the images again."""
        return self._replace(texts_first=not self.texts_first)


class TokenPasses(NamedTuple):
    """The two passes over the tiles, below autograd and outside of any autocast."""

    impl: str
    """"tiled" or "triton"."""

    def statistics(
        self, images: Tensor, texts: Tensor, logit_scale: Tensor, rules: TokenRules
    ) -> Statistics:
        """Reduce the scores of each image and of each text to a few numbers, in one pass."""
        with autocast_disabled(images.device):
            tiles = self.tiles(images, texts, logit_scale.dtype, rules)
            return statistics(tiles, logit_scale, rules.pairing)

    def gradient(
        self,
        rows: Tensor,
        columns: Tensor,
        logit_scale: Tensor,
        rules: TokenRules,
        row_side: SideGradient,
        column_side: SideGradient | None,
        needs: Needs,
        column_sums: Tensor | None,
        dtype: torch.dtype,
    ) -> Gradients:
        """Compute the gradients of the tokens in `dtype`, and of the scale; None where not needed.

        `column_sums` are None: a bias of scores is a constant.
        """
        assert column_side is not None
        if rules.texts_first:
            wanted = (needs[1], needs[0], needs[2]), None, dtype
            turned = rules.transposed(), column_side, row_side, *wanted
            dimages, dtexts, dlogit_scale = self.gradient(columns, rows, logit_scale, *turned)
            return dtexts, dimages, dlogit_scale
        with autocast_disabled(rows.device):
            tiles = self.tiles(rows, columns, logit_scale.dtype, rules)
            given = logit_scale, rules.pairing, (row_side, column_side), needs
            drows, dcolumns, dscale = gradient(tiles, *given, dtype)
        drows = None if drows is None else drows.view(rows.shape)
        dcolumns = None if dcolumns is None else dcolumns.view(columns.shape)
        return drows, dcolumns, dscale

    def tiles(
        self, images: Tensor, texts: Tensor, dtype: torch.dtype, rules: TokenRules
    ) -> TokenTiles:
        """Return the tiles of these tokens, with scores in `dtype`."""
        of_impl = TritonPanels if self.impl == "triton" else TorchPanels
        limits, reduction = of_impl.piece_limits(images), rules.token_reduction
        of_images = images, rules.image_mask, rules.image_spans, reduction, limits[0], dtype
        of_texts = texts, rules.text_mask, rules.text_spans, reduction, limits[1], dtype
        sides, one_way = (Pieces.of(*of_images), Pieces.of(*of_texts)), rules.one_way
        return TokenTiles(*sides, of_impl(*sides, one_way=one_way), one_way=one_way)

    def shapes(self, images: int, texts: int, rules: TokenRules) -> list[tuple[int, ...]]:
        """Return the shapes of the fields of `Statistics`."""
        return [*[(images,)] * 4, *[(texts,)] * 4]


def _unpack(
    masks: Sequence[Tensor | None], numbers: Sequence[int], impl: str
) -> tuple[TokenPasses, TokenRules]:
    return TokenPasses(impl), TokenRules.unpacked(masks, numbers)


_statistics, _gradient = register("late_interaction", _unpack)


def token_statistics(
    images: Tensor,
    texts: Tensor,
    logit_scale: Tensor,
    rules: TokenRules,
    impl: str,
    loss: str = "late_interaction_loss",
) -> Statistics:
    """Compute the statistics of images and texts, differentiable in all but the rules."""
    masks, numbers = rules.packed()
    given = images, texts, logit_scale, masks, numbers, impl, loss, None
    return Statistics(*_statistics(*given))
