"""Late interaction as a differentiable op, which torch.compile takes as it is.

B pairs, P image tokens, R text tokens, D feature width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gradcache_clip.ops.implementations import autocast_disabled, second_derivative_refused
from gradcache_clip.ops.late_interaction_passes import (
    Direction,
    TokenTiles,
    gradient,
    masked_tokens,
    summary,
)
from gradcache_clip.ops.late_interaction_tiled import TorchTiles
from gradcache_clip.ops.late_interaction_triton import TritonTiles

_TILES: dict[str, Callable[..., TokenTiles]] = {"tiled": TorchTiles, "triton": TritonTiles}


def _tiles(
    images: Tensor,
    texts: Tensor,
    logit_scale: Tensor,
    masks: tuple[Tensor | None, Tensor | None],
    one_way: bool,
    token_reduction: str,
    impl: str,
) -> TokenTiles:
    sides = (
        masked_tokens(tokens, mask, token_reduction, logit_scale.dtype)
        for tokens, mask in zip((images, texts), masks, strict=True)
    )
    return _TILES[impl](*sides, one_way=one_way)


# torch.compile calls these two as they are, through the shapes that the fake kernels give.
@torch.library.custom_op(
    "gradcache_clip::late_interaction",
    mutates_args=(),
    schema="(Tensor images, Tensor texts, Tensor logit_scale, Tensor? image_mask, "
    "Tensor? text_mask, bool one_way, str token_reduction, str impl) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def late_interaction_forward(
    images: Tensor,
    texts: Tensor,
    logit_scale: Tensor,
    image_mask: Tensor | None,
    text_mask: Tensor | None,
    one_way: bool,
    token_reduction: str,
    impl: str,
) -> tuple[Tensor, ...]:
    """Loss, two accuracies, and the vectors of both directions; those of images empty one way."""
    masks = image_mask, text_mask
    with autocast_disabled(images.device):
        tiles = _tiles(images, texts, logit_scale, masks, one_way, token_reduction, impl)
        *results, by_image, by_text = summary(tiles, logit_scale)
    return (*results, *by_image, *by_text)


@torch.library.custom_op(
    "gradcache_clip::late_interaction_gradient",
    mutates_args=(),
    schema="(Tensor dloss, Tensor images, Tensor texts, Tensor logit_scale, Tensor? image_mask, "
    "Tensor? text_mask, bool one_way, str token_reduction, str impl, Tensor[] vectors, "
    "bool[] needs) -> (Tensor, Tensor, Tensor)",
)
def late_interaction_backward(
    dloss: Tensor,
    images: Tensor,
    texts: Tensor,
    logit_scale: Tensor,
    image_mask: Tensor | None,
    text_mask: Tensor | None,
    one_way: bool,
    token_reduction: str,
    impl: str,
    vectors: Sequence[Tensor],
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Gradients that are not needed come back empty."""
    masks = image_mask, text_mask
    directions = Direction(*vectors[:2]), Direction(*vectors[2:])
    terms = len(images) * (1 if one_way else 2)
    with autocast_disabled(images.device):
        tiles = _tiles(images, texts, logit_scale, masks, one_way, token_reduction, impl)
        needed = needs[0], needs[1], needs[2]
        gradients = gradient(tiles, logit_scale, dloss / terms, directions, needed)
    return tuple(dloss.new_empty(0) if each is None else each for each in gradients)


@late_interaction_forward.register_fake
def _(images: Tensor, texts: Tensor, logit_scale: Tensor, *rules: Any) -> tuple[Tensor, ...]:
    by_image = 0 if rules[2] else len(images)
    sizes = by_image, by_image, len(images), len(images)
    scalars = (torch.empty_like(logit_scale) for _ in range(3))
    return (*scalars, *(logit_scale.new_empty(size) for size in sizes))


@late_interaction_backward.register_fake
def _(
    dloss: Tensor, images: Tensor, texts: Tensor, logit_scale: Tensor, *rules: Any
) -> tuple[Tensor, ...]:
    return tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format) if need else dloss.new_empty(0)
        for x, need in zip((images, texts, logit_scale), rules[-1], strict=True)
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.one_way, ctx.token_reduction, ctx.impl = inputs
    ctx.save_for_backward(*tensors, *output[3:])
    ctx.mark_non_differentiable(*output[1:])


def _differentiate(ctx: Any, dloss: Tensor, *_: Tensor) -> tuple[Any, ...]:
    tensors, vectors = ctx.saved_tensors[:5], list(ctx.saved_tensors[5:])
    rules = ctx.one_way, ctx.token_reduction, ctx.impl
    gradients = late_interaction_backward(
        dloss, *tensors, *rules, vectors, ctx.needs_input_grad[:3]
    )
    needed = (each if each.numel() else None for each in gradients)
    return (*needed, None, None, None, None, None)


def _keep_nothing(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    pass


def _refuse(ctx: Any, *_: Tensor) -> None:
    raise second_derivative_refused("late_interaction_loss")


late_interaction_forward.register_autograd(_differentiate, setup_context=_save)
late_interaction_backward.register_autograd(_refuse, setup_context=_keep_nothing)
