"""The sigmoid loss of SigLIP: one public op over three implementations.

B pairs, M image rows, N text rows, D feature width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gradcache_clip.ops.arguments import (
    check_features,
    check_integers,
    check_pairs,
    check_same_device,
    scalar_tensor,
)
from gradcache_clip.ops.implementations import (
    Impl,
    autocast_disabled,
    refuse_transforms,
    resolve_impl,
    second_derivative_refused,
)
from gradcache_clip.ops.results import ContrastiveOutput
from gradcache_clip.ops.siglip_reference import siglip_reference
from gradcache_clip.ops.siglip_tiled import Labels, SigmoidPass, Wanted, siglip_tiled
from gradcache_clip.ops.siglip_triton import siglip_triton

if TYPE_CHECKING:
    from jaxtyping import Float, Int

_NAMES = ("image_features", "text_features")
_PASSES: dict[str, Callable[..., SigmoidPass]] = {"tiled": siglip_tiled, "triton": siglip_triton}


def siglip_loss(
    image_features: Float[Tensor, "m d"],
    text_features: Float[Tensor, "n d"],
    logit_scale: float | Float[Tensor, ""],
    logit_bias: float | Float[Tensor, ""],
    *,
    labels: Int[Tensor, " b"] | tuple[Int[Tensor, " m"], Int[Tensor, " n"]] | None = None,
    impl: Impl = "auto",
) -> Float[Tensor, ""]:
    """Return the loss of `siglip_loss_with_accuracy` alone, without the work for accuracies.

    Same arguments, errors and source.

    Example:
        >>> import torch
        >>> from gradcache_clip.ops import siglip_loss
        >>> features = torch.eye(4)
        >>> print(f"{siglip_loss(features, features, 10.0, -10.0):.4f}")
        0.6933
    """
    arguments = image_features, text_features, logit_scale, logit_bias, labels, impl
    return _result(*arguments, with_accuracy=False)[0]


def siglip_loss_with_accuracy(
    image_features: Float[Tensor, "m d"],
    text_features: Float[Tensor, "n d"],
    logit_scale: float | Float[Tensor, ""],
    logit_bias: float | Float[Tensor, ""],
    *,
    labels: Int[Tensor, " b"] | tuple[Int[Tensor, " m"], Int[Tensor, " n"]] | None = None,
    impl: Impl = "auto",
) -> ContrastiveOutput:
    """Compute the sigmoid loss: every image-text combination is a binary classification.

    With S = logit_scale * image_features @ text_features.T + logit_bias (M x N), z_ij = 1 where
    image i and text j are positives and z_ij = -1 elsewhere:

        loss = sum_ij log(1 + exp(-z_ij S_ij)) / M

    "tiled" and "triton" never hold S, nor anything else of M x N numbers. Each tile of S gives its
    part of the loss and, where gradients are needed, of the gradients in one go (6 M N D flops, no
    second look at S in the backward); these wait for the backward in fp32 (fp64 for fp64 features),
    4 D bytes per row: the factor of a gradient scaler comes only then, and 16 bits would have lost
    what is below it. Logits and sums are of that dtype whatever the features are, and whatever
    autocast surrounds the call or its backward. Two runs give the same bits. Both differentiate
    once; "reference" is plain autograd, differentiable twice.

    Args:
        image_features: (M, D) fp16, bf16, fp32 or fp64, taken as it is: L2-normalise first for
            cosine similarities.
        text_features: (N, D) on the same device; N = M unless `labels` is a pair. Another dtype is
            allowed: both are promoted, and each gradient returns in its own input's dtype.
        logit_scale: multiplier of the similarities (1/temperature, already exponentiated): a number
            or a tensor of one element on the same device. SigLIP starts at 10.
        logit_bias: added to every logit: like `logit_scale`. SigLIP starts at -10, because nearly
            all of the M N decisions are negative.
        labels: which image and text are positives: None for row i and row i alone; (M,) integers
            for all pairs of equal labels, where M = N; or a pair of vectors, (M,) for the images
            and (N,) for the texts. Rows without any positive are allowed.
        impl: "reference" stores S and is the specification; "tiled" runs on any device; "triton"
            needs an NVIDIA GPU of compute capability 8.0 or later, or a CPU under Triton's
            interpreter; "auto" is "triton" where that runs on a GPU, else "tiled".

    Returns:
        loss: 0-dim, in nats per image: the sum over all texts, averaged over the M images; fp32
            (fp64 for fp64 features).
        image_to_text_accuracy: share of images whose best positive has a larger logit than every
            negative, 0 to 1; a tie is wrong, and so is an image without a positive. No gradient.
        text_to_image_accuracy: the same over the images for each text.

    Raises:
        TypeError: features that are not floating-point tensors, a logit_scale or logit_bias that
            is neither that nor a number, labels that are not integers.
        ValueError: unequal shapes or devices, an empty batch, an unknown impl.
        RuntimeError: impl="triton" where it cannot run; torch.func or forward-mode differentiation
            through "tiled" or "triton".

    Source: Zhai et al. 2023, "Sigmoid loss for language image pre-training", equation 1 and
    algorithm 1.

    Example:
        >>> import torch
        >>> from gradcache_clip.ops import siglip_loss_with_accuracy
        >>> captions = torch.eye(3)[[0, 0, 1, 2]]
        >>> result = siglip_loss_with_accuracy(
        ...     torch.eye(3), captions, 10.0, -5.0,
        ...     labels=(torch.arange(3), torch.tensor([0, 0, 1, 2])),
        ... )
        >>> print(f"{result.loss:.4f} {result.text_to_image_accuracy:.1f}")
        0.0269 1.0
    """
    arguments = image_features, text_features, logit_scale, logit_bias, labels, impl
    return ContrastiveOutput(*_result(*arguments, with_accuracy=True))


def _result(
    q: Tensor,
    k: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor,
    labels: Tensor | Labels | None,
    impl: str,
    *,
    with_accuracy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    label_pair = checked_labels(q, k, labels)
    dtype = torch.promote_types(q.dtype, k.dtype)
    scale = scalar_tensor("logit_scale", logit_scale, q.device, dtype)
    bias = scalar_tensor("logit_bias", logit_bias, q.device, dtype)
    impl = resolve_impl(impl, q.device, dtype)
    inputs = q.to(dtype), k.to(dtype), scale, bias
    if impl == "reference":
        with autocast_disabled(q.device):
            return siglip_reference(*inputs, label_pair)
    refuse_transforms("siglip_loss", *inputs)
    wanted = wanted_of(*inputs, accuracy=with_accuracy)
    loss, *gradients, row_accuracy, column_accuracy = _siglip(
        *(each.detach() for each in inputs), *(label_pair or (None, None)), list(wanted), impl
    )
    return with_gradients(loss, inputs, gradients), row_accuracy, column_accuracy


def wanted_of(*inputs: Tensor, accuracy: bool) -> Wanted:
    """Return what a pass must compute beside the loss."""
    q, k, scale, bias = (torch.is_grad_enabled() and each.requires_grad for each in inputs)
    return Wanted(q, k, scale, bias, accuracy)


def with_gradients(
    loss: Tensor, inputs: Sequence[Tensor], gradients: Sequence[Tensor | None]
) -> Tensor:
    """Attach the gradients of those of (q, k, logit_scale, logit_bias) that need one."""
    for each, gradient in zip(inputs, gradients, strict=True):
        if gradient is not None and torch.is_grad_enabled() and each.requires_grad:
            loss = _attach_gradient(loss, each, gradient)
    return loss


def share_right(best: Float[Tensor, "2 m"]) -> Float[Tensor, ""]:
    """Return the share of rows whose best positive is above their best negative."""
    return (best[0] > best[1]).to(best.dtype).mean()


def sigmoid_pass(
    impl: str,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    labels: Labels | None,
    wanted: Wanted,
    *,
    paired: bool = True,
) -> SigmoidPass:
    """Run one pass over the tiles, below autograd and outside of any autocast."""
    with autocast_disabled(inputs[0].device):
        return _PASSES[impl](*inputs, labels, wanted, paired=paired)


def checked_labels(q: Tensor, k: Tensor, labels: Tensor | Labels | None) -> Labels | None:
    """Check shapes; return the labels of both sides, twice the same for one vector."""
    if not isinstance(labels, (tuple, list)):
        check_pairs(_NAMES, q, k)
        if labels is None:
            return None
        check_integers("labels", labels, (len(q),), q.device)
        return (labels.long(),) * 2
    for name, features in zip(_NAMES, (q, k), strict=True):
        check_features(name, features)
    check_same_device(_NAMES, q, k)
    if q.shape[1] != k.shape[1]:
        raise ValueError(
            f"text_features: expected the width of image_features, {q.shape[1]}, got {k.shape[1]}; "
            "project both to the same width"
        )
    if len(labels) != 2:
        raise ValueError(
            f"labels: expected one vector or a pair (image labels, text labels), got {len(labels)} "
            "of them; pass labels=(image_labels, text_labels)"
        )
    for name, values, features in zip(("labels[0]", "labels[1]"), labels, (q, k), strict=True):
        check_integers(name, values, (len(features),), q.device)
    return labels[0].long(), labels[1].long()


# torch.compile calls these three as they are, through the shapes that the fake kernels give.
@torch.library.custom_op(
    "gradcache_clip::siglip",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor logit_scale, Tensor logit_bias, Tensor? row_labels, "
    "Tensor? column_labels, bool[] wanted, str impl) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _siglip(
    q: Tensor, k: Tensor, logit_scale: Tensor, logit_bias: Tensor, *options: Any
) -> tuple[Tensor, ...]:
    # Loss, gradients and accuracies as constants; what is not wanted comes back empty.
    row_labels, column_labels, wanted, impl = options
    labels = None if row_labels is None else (row_labels, column_labels)
    inputs = q, k, logit_scale, logit_bias
    found = sigmoid_pass(impl, inputs, labels, Wanted(*wanted)).mean(logit_scale, len(q))
    accuracies = (None if best is None else share_right(best) for best in found[5:])
    result = *found[:5], *accuracies
    return tuple(logit_scale.new_empty(0) if each is None else each for each in result)


@_siglip.register_fake
def _(q: Tensor, k: Tensor, logit_scale: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *_, wanted, _impl = rest
    shapes = q.shape, k.shape, (), (), (), ()
    needed = *wanted, wanted[-1]
    results = (shape if need else (0,) for shape, need in zip(shapes, needed, strict=True))
    return tuple(logit_scale.new_empty(shape) for shape in ((), *results))


@torch.library.custom_op(
    "gradcache_clip::attach_gradient",
    mutates_args=(),
    schema="(Tensor loss, Tensor x, Tensor gradient) -> Tensor",
)
def _attach_gradient(loss: Tensor, x: Tensor, gradient: Tensor) -> Tensor:
    # The loss itself, with dloss/dx = gradient. One node per input, so each frees its gradient
    # independently.
    return loss.clone()


@torch.library.custom_op(
    "gradcache_clip::scale_gradient",
    mutates_args=(),
    schema="(Tensor gradient, Tensor factor, Tensor x) -> Tensor",
)
def _scale_gradient(gradient: Tensor, factor: Tensor, x: Tensor) -> Tensor:
    # In the dtype of x. The edge to x is there to make a second derivative fail.
    return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=x.dtype))


_attach_gradient.register_fake(lambda loss, x, gradient: torch.empty_like(loss))
_scale_gradient.register_fake(lambda gradient, factor, x: torch.empty_like(gradient, dtype=x.dtype))


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _backward(ctx: Any, dloss: Tensor) -> tuple[Tensor, Tensor, None]:
    x, gradient = ctx.saved_tensors
    return dloss, _scale_gradient(gradient, dloss, x), None


def _refuse(ctx: Any, *_: Tensor) -> Any:
    raise second_derivative_refused("siglip_loss")


_attach_gradient.register_autograd(_backward, setup_context=_keep)
_scale_gradient.register_autograd(_refuse)
