"""Late interaction as a differentiable op, which torch.compile takes as it is.

B pairs, P image tokens, R text tokens, D feature width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradcache_clip.ops.implementations import autocast_disabled, second_derivative_refused
from gradcache_clip.ops.late_interaction_passes import (
    TokenReduction,
    TokenTiles,
    gradient,
    masked_tokens,
    statistics,
)
from gradcache_clip.ops.late_interaction_tiled import TorchTiles
from gradcache_clip.ops.late_interaction_triton import TritonTiles
from gradcache_clip.ops.pairing import Gradients, Needs, SideGradient, Statistics

_TILES: dict[str, Callable[..., TokenTiles]] = {"tiled": TorchTiles, "triton": TritonTiles}


def _tiles(
    images: Tensor,
    texts: Tensor,
    logit_scale: Tensor,
    masks: Sequence[Tensor | None],
    one_way: bool,
    token_reduction: TokenReduction,
    impl: str,
) -> TokenTiles:
    sides = (
        masked_tokens(tokens, mask, token_reduction, logit_scale.dtype)
        for tokens, mask in zip((images, texts), masks, strict=True)
    )
    return _TILES[impl](*sides, one_way=one_way)


class TokenRules(NamedTuple):
    """The rules of a contrast of images and texts, as `Pairing` has those of a contrast of rows."""

    image_mask: Tensor | None
    """(B, P) bool, True for tokens that count; all when None."""
    text_mask: Tensor | None
    one_way: bool
    token_reduction: TokenReduction
    paired: bool = True
    """Whether image i and text i are positives of each other; otherwise none are."""
    texts_first: bool = False
    """Whether the texts are the rows."""
    both_ways: bool = True
    """Images and texts both have statistics, also where only one side has a loss."""
    self_contrast: bool = False

    def of_block(self, images: slice, texts: slice) -> TokenRules:
        """The rules of these images and texts alone."""
        masks = zip((self.image_mask, self.text_mask), (images, texts), strict=True)
        of_images, of_texts = (None if mask is None else mask[where] for mask, where in masks)
        return self._replace(image_mask=of_images, text_mask=of_texts)

    def without_positives(self, images: int, texts: int) -> TokenRules:
        """The rules of images and texts that hold no pair."""
        return self._replace(paired=False)

    def transposed(self) -> TokenRules:
        """Images as columns, and the reverse."""
        return self._replace(texts_first=not self.texts_first)


class TokenPasses(NamedTuple):
    """The two passes over the tiles, below autograd and outside of any autocast."""

    impl: str
    """"tiled" or "triton"."""

    def statistics(
        self, images: Tensor, texts: Tensor, logit_scale: Tensor, rules: TokenRules
    ) -> Statistics:
        """What one pass over the scores leaves of each image and of each text."""
        with autocast_disabled(images.device):
            tiles = _tiles(images, texts, logit_scale, rules[:2], *rules[2:4], self.impl)
            return statistics(tiles, logit_scale, paired=rules.paired)

    def gradient(
        self,
        rows: Tensor,
        columns: Tensor,
        logit_scale: Tensor,
        rules: TokenRules,
        row_side: SideGradient,
        column_side: SideGradient | None,
        needs: Needs,
    ) -> Gradients:
        """Of the tokens of rows and columns, and of the scale; None where not needed."""
        assert column_side is not None
        if rules.texts_first:
            turned = rules.transposed(), column_side, row_side, (needs[1], needs[0], needs[2])
            dimages, dtexts, dlogit_scale = self.gradient(columns, rows, logit_scale, *turned)
            return dtexts, dimages, dlogit_scale
        with autocast_disabled(rows.device):
            tiles = _tiles(rows, columns, logit_scale, rules[:2], *rules[2:4], self.impl)
            return gradient(tiles, logit_scale, (row_side, column_side), needs, paired=rules.paired)


# torch.compile calls these two as they are, through the shapes that the fake kernels give.
@torch.library.custom_op(
    "gradcache_clip::late_interaction",
    mutates_args=(),
    schema="(Tensor images, Tensor texts, Tensor logit_scale, Tensor? image_mask, "
    "Tensor? text_mask, bool one_way, str token_reduction, str impl) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def late_interaction_forward(
    images: Tensor,
    texts: Tensor,
    logit_scale: Tensor,
    image_mask: Tensor | None,
    text_mask: Tensor | None,
    one_way: bool,
    token_reduction: TokenReduction,
    impl: str,
) -> tuple[Tensor, ...]:
    """Positive logit, and maximum and sum over negatives, of each image and of each text."""
    rules = TokenRules(image_mask, text_mask, one_way, token_reduction)
    found = TokenPasses(impl).statistics(images, texts, logit_scale, rules)
    return (*found[:3], *found[4:7])


@torch.library.custom_op(
    "gradcache_clip::late_interaction_gradient",
    mutates_args=(),
    schema="(Tensor images, Tensor texts, Tensor logit_scale, Tensor? image_mask, "
    "Tensor? text_mask, bool one_way, str token_reduction, str impl, Tensor[] by_image, "
    "Tensor[] by_text, bool[] needs) -> (Tensor, Tensor, Tensor)",
)
def late_interaction_backward(
    images: Tensor,
    texts: Tensor,
    logit_scale: Tensor,
    image_mask: Tensor | None,
    text_mask: Tensor | None,
    one_way: bool,
    token_reduction: TokenReduction,
    impl: str,
    by_image: Sequence[Tensor],
    by_text: Sequence[Tensor],
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Gradients that are not needed come back empty."""
    rules = TokenRules(image_mask, text_mask, one_way, token_reduction)
    sides, needed = (
        (SideGradient(*by_image), SideGradient(*by_text)),
        (needs[0], needs[1], needs[2]),
    )
    gradients = TokenPasses(impl).gradient(images, texts, logit_scale, rules, *sides, needed)
    return tuple(images.new_empty(0) if each is None else each for each in gradients)


@late_interaction_forward.register_fake
def _(images: Tensor, texts: Tensor, logit_scale: Tensor, *rules: Any) -> tuple[Tensor, ...]:
    return tuple(logit_scale.new_empty(len(side)) for side in (images, texts) for _ in range(3))


@late_interaction_backward.register_fake
def _(images: Tensor, texts: Tensor, logit_scale: Tensor, *rules: Any) -> tuple[Tensor, ...]:
    return tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format) if need else x.new_empty(0)
        for x, need in zip((images, texts, logit_scale), rules[-1], strict=True)
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.one_way, ctx.token_reduction, ctx.impl = inputs
    maxima = output[1], output[4]
    ctx.save_for_backward(*tensors, *maxima)
    ctx.mark_non_differentiable(*maxima)


def _differentiate(ctx: Any, *doutput: Tensor) -> tuple[Any, ...]:
    *tensors, image_max, text_max = ctx.saved_tensors
    rules = ctx.one_way, ctx.token_reduction, ctx.impl
    by_image, by_text = (
        [peak, dsum, dpositive]
        for peak, (dpositive, _, dsum) in (
            (image_max, doutput[:3]),
            (text_max, doutput[3:]),
        )
    )
    gradients = late_interaction_backward(
        *tensors, *rules, by_image, by_text, ctx.needs_input_grad[:3]
    )
    needed = (each if each.numel() else None for each in gradients)
    return (*needed, None, None, None, None, None)


def _keep_nothing(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    pass


def _refuse(ctx: Any, *_: Tensor) -> None:
    raise second_derivative_refused("late_interaction_loss")


late_interaction_forward.register_autograd(_differentiate, setup_context=_save)
late_interaction_backward.register_autograd(_refuse, setup_context=_keep_nothing)
