"""The late-interaction loss (FILIP, MaxSim): one public op over three implementations.

B pairs, P image tokens, R text tokens, D feature width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from gradcache_clip.ops.arguments import check_floating, check_same_device, scalar_tensor
from gradcache_clip.ops.implementations import (
    Impl,
    autocast_disabled,
    refuse_transforms,
    resolve_impl,
)
from gradcache_clip.ops.late_interaction_op import TokenRules, token_statistics
from gradcache_clip.ops.late_interaction_reference import (
    DenseTokens,
    token_statistics_reference,
)
from gradcache_clip.ops.loss_alone import loss_alone
from gradcache_clip.ops.pairing import Statistics
from gradcache_clip.ops.results import ContrastiveOutput
from gradcache_clip.ops.softmax import (
    Direction,
    negative_lse_minus_positive,
    one_positive_loss,
    weighted_mean,
)
from gradcache_clip.ops.token_pieces import TokenReduction

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

_NAMES = "image_tokens", "text_tokens"


def late_interaction_loss_with_accuracy(
    image_tokens: Float[Tensor, "b p d"],
    text_tokens: Float[Tensor, "b r d"],
    logit_scale: float | Float[Tensor, ""],
    *,
    image_mask: Bool[Tensor, "b p"] | None = None,
    text_mask: Bool[Tensor, "b r"] | None = None,
    one_way: bool = False,
    token_reduction: TokenReduction = "mean",
    impl: Impl = "auto",
) -> ContrastiveOutput:
    """Compute the cross-entropy over B pairs scored by their best matching tokens.

    With x_ip the tokens of image i and y_jr those of text j, over the tokens that the masks keep:

        I_ij = mean over p of max over r of <x_ip, y_jr>    (image i looks for text j)
        T_ij = mean over r of max over p of <x_ip, y_jr>    (text j looks for image i)
        loss = (cross_entropy(logit_scale * I, labels)
                + cross_entropy(logit_scale * T.T, labels)) / 2,    labels 0..B-1

    `one_way` keeps the second half alone, undivided: MaxSim, where the texts are queries and the
    images the documents. For a search among texts pass the documents as `image_tokens`.

    Where maxima tie, the first token gets the gradient. The similarities of all tokens would be
    B x P x B x R numbers, the winners of the maxima B x B x (P + R), the scores B x B: "tiled" and
    "triton" hold none of them beyond a tile, and compute each tile again in the backward (flops of
    "tiled" about 4 B^2 P R D in all, of "triton" 8 B^2 P R D). Similarities, sums and gradient
    accumulators are fp32 (fp64 for fp64 tokens) whatever the dtype of the tokens, and whatever
    autocast surrounds the call or its backward. Two runs give the same bits. Both differentiate
    once; "reference" is plain autograd, differentiable twice, and its backward follows an autocast
    that surrounds it.

    Args:
        image_tokens: (B, P, D) fp16, bf16, fp32 or fp64, taken as they are: L2-normalise each token
            first for cosine similarities. B = 1 has no negatives and gives loss 0.
        text_tokens: (B, R, D) on the same device. Another dtype is allowed: both are promoted, and
            each gradient returns in its own input's dtype.
        logit_scale: multiplier of the similarities (1/temperature, already exponentiated): a number
            or a tensor of one element on the same device.
        image_mask: (B, P) bool, True for tokens that count. All count when None. What the others
            hold changes nothing, and they get gradient 0; time is spent on them all the same.
        text_mask: (B, R) bool, the same for text tokens.
        one_way: texts look for images only.
        token_reduction: "mean" over the tokens that look, as in FILIP, or "sum", as in ColBERT.
        impl: "reference" stores all similarities and is the specification; "tiled" runs on any
            device; "triton" needs an NVIDIA GPU of compute capability 8.0 or later, or a CPU under
            Triton's interpreter; "auto" is "triton" where that runs on a GPU, else "tiled".

    Returns:
        loss: 0-dim, in nats, fp32 (fp64 for fp64 tokens).
        image_to_text_accuracy: share of images i with I_ii above every other I_ij (one way: T_ii
            above every other T_ij), 0 to 1; a tie is wrong. No gradient.
        text_to_image_accuracy: share of texts j with T_jj above every other T_ij.

    Raises:
        TypeError: tokens that are not floating-point tensors, a logit_scale that is neither that
            nor a number, masks that are not bool tensors.
        ValueError: shapes or devices that do not match, an empty batch, an unknown token_reduction
            or impl; on the CPU a sample without any token that counts. On other devices that is
            not checked, as the check would wait for the device: such a sample scores 0 with every
            other, and gets no gradient.
        RuntimeError: impl="triton" where it cannot run; torch.func or forward-mode differentiation
            through "tiled" or "triton".

    Source: Yao et al. 2021, "FILIP: fine-grained interactive language-image pre-training",
    equations 3 to 6. MaxSim: Khattab and Zaharia 2020, "ColBERT", section 3.

    Example:
        >>> import torch
        >>> from gradcache_clip.ops import late_interaction_loss_with_accuracy
        >>> tokens = torch.eye(12).view(4, 3, 12)
        >>> mask = torch.tensor([True, False, False]).expand(4, 3)
        >>> result = late_interaction_loss_with_accuracy(
        ...     tokens, tokens, 3.0, text_mask=mask
        ... )
        >>> print(f"{result.loss:.4f} {result.text_to_image_accuracy:.1f}")
        0.4414 1.0
    """
    check_tokens(image_tokens, text_tokens)
    check_mask("image_mask", image_mask, image_tokens)
    check_mask("text_mask", text_mask, text_tokens)
    check_token_reduction(token_reduction)
    dtype = torch.promote_types(image_tokens.dtype, text_tokens.dtype)
    scale = scalar_tensor("logit_scale", logit_scale, image_tokens.device, dtype)
    resolved = resolve_impl(impl, image_tokens.device, dtype)
    images, texts = image_tokens.to(dtype), text_tokens.to(dtype)
    rules = TokenRules(image_mask, text_mask, one_way, token_reduction)
    statistics = late_interaction_statistics(images, texts, scale, rules, resolved)
    return late_interaction_result(statistics, one_way=one_way)


late_interaction_loss = loss_alone(late_interaction_loss_with_accuracy)
"""The loss of `late_interaction_loss_with_accuracy` alone, with the same arguments."""


def late_interaction_statistics(
    images: Tensor, texts: Tensor, logit_scale: Tensor, rules: TokenRules, impl: str
) -> Statistics:
    """Compute the statistics of images and texts of one dtype, by any implementation."""
    if impl != "reference":
        refuse_transforms("late_interaction_loss", images, texts, logit_scale)
        return token_statistics(images, texts, logit_scale, rules, impl)
    reduction, dtype = rules.token_reduction, logit_scale.dtype
    with autocast_disabled(images.device):
        dense_images, dense_texts = (
            DenseTokens.of(tokens, mask, mask, reduction, dtype)
            for tokens, mask in ((images, rules.image_mask), (texts, rules.text_mask))
        )
        given = dense_images, dense_texts, logit_scale, rules.pairing
        return token_statistics_reference(*given, one_way=rules.one_way)


def late_interaction_result(
    statistics: Statistics, *, one_way: bool, weights: Float[Tensor, " b"] | None = None
) -> ContrastiveOutput:
    """Compute loss and accuracies from the statistics of images and texts."""
    images, texts = (
        Direction(positive, peak, total, positive, peak)
        for positive, peak, total, _ in (statistics[:4], statistics[4:])
    )
    each = [texts] if one_way else [images, texts]
    losses = [one_positive_loss(negative_lse_minus_positive(direction)) for direction in each]
    means = [weighted_mean(loss, weights) for loss in losses]
    return ContrastiveOutput(torch.stack(means).mean(), images.accuracy(), texts.accuracy())


def check_tokens(images: Tensor, texts: Tensor) -> None:
    """Raise unless both can be the tokens of B pairs."""
    for name, tokens in zip(_NAMES, (images, texts), strict=True):
        check_floating(name, tokens)
        if tokens.ndim != 3 or tokens.numel() == 0:
            raise ValueError(
                f"{name}: expected a non-empty (B, tokens, D) tensor, got shape "
                f"{tuple(tokens.shape)}; one vector for each sample is clip_loss"
            )
    if len(images) != len(texts) or images.shape[2] != texts.shape[2]:
        expected = f"({len(images)}, any, {images.shape[2]})"
        raise ValueError(
            f"text_tokens: expected shape {expected} to go with image_tokens "
            f"{tuple(images.shape)}, got {tuple(texts.shape)}; pass one text for each image and "
            "project both to the same width"
        )
    check_same_device(_NAMES, images, texts)


def check_mask(name: str, mask: Tensor | None, tokens: Tensor) -> None:
    """Raise unless the mask fits the tokens and, where it can be read, leaves each sample some."""
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(
            f"{name}: expected a bool tensor, True for tokens that count, got {got}; "
            "convert with .bool()"
        )
    if mask.shape != tokens.shape[:2]:
        raise ValueError(
            f"{name}: expected shape {tuple(tokens.shape[:2])}, got {tuple(mask.shape)}; "
            "one entry for each token"
        )
    check_same_device((name.replace("mask", "tokens"), name), tokens, mask)
    if _readable(mask) and not mask.any(1).all():
        sample = int((~mask.any(1)).nonzero()[0])
        raise ValueError(
            f"{name}: expected a token that counts in each sample, got none in sample {sample}; "
            "drop the pair, or let one token count"
        )


def check_token_reduction(token_reduction: str) -> None:
    """Raise unless it is "mean" or "sum"."""
    if token_reduction not in ("mean", "sum"):
        raise ValueError(
            f'token_reduction: expected "mean" or "sum", got {token_reduction!r}; '
            'FILIP takes the "mean", ColBERT the "sum"'
        )


def _readable(mask: Tensor) -> bool:
    """Say whether its values can be read now, without waiting for a device."""
    if torch.compiler.is_compiling() or type(mask) is not Tensor:
        return False
    return mask.device.type == "cpu" and not is_functorch_wrapped_tensor(mask)
