"""The CLIP loss: one public op over three implementations.

B pairs, D feature width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from gradcache_clip.ops.clip_autograd import autocast_disabled
from gradcache_clip.ops.clip_reference import clip_reference
from gradcache_clip.ops.clip_tiled import clip_tiled
from gradcache_clip.ops.clip_triton import clip_triton, triton_obstacle

if TYPE_CHECKING:
    from jaxtyping import Float

Impl = Literal["auto", "reference", "tiled", "triton"]

_IMPLEMENTATIONS: dict[str, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]] = {
    "reference": clip_reference,
    "tiled": clip_tiled,
    "triton": clip_triton,
}
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class ClipLossResult(NamedTuple):
    """Loss and rank-1 accuracies of a batch, as 0-dim tensors; the accuracies carry no gradient."""

    loss: Float[Tensor, ""]
    image_to_text_accuracy: Float[Tensor, ""]
    text_to_image_accuracy: Float[Tensor, ""]


def clip_loss(
    image_features: Float[Tensor, "b d"],
    text_features: Float[Tensor, "b d"],
    logit_scale: float | Float[Tensor, ""],
    *,
    impl: Impl = "auto",
) -> Float[Tensor, ""]:
    """The loss of `clip_loss_with_accuracy` alone; same arguments, errors and source.

    Example:
        >>> import torch
        >>> from gradcache_clip.ops import clip_loss
        >>> features = torch.eye(4)
        >>> print(f"{clip_loss(features, features, 2.0):.4f}")
        0.3408
    """
    return clip_loss_with_accuracy(image_features, text_features, logit_scale, impl=impl).loss


def clip_loss_with_accuracy(
    image_features: Float[Tensor, "b d"],
    text_features: Float[Tensor, "b d"],
    logit_scale: float | Float[Tensor, ""],
    *,
    impl: Impl = "auto",
) -> ClipLossResult:
    """Symmetric cross-entropy over the similarities of B pairs, and how often the pair wins.

    With S = logit_scale * image_features @ text_features.T (B x B) and labels 0..B-1:

        loss = (cross_entropy(S, labels) + cross_entropy(S.T, labels)) / 2

    "tiled" and "triton" never hold S, nor anything else of B x B numbers; logits, sums and gradient
    accumulators are fp32 (fp64 for fp64 features) whatever the dtype of the features, and whatever
    autocast surrounds the call or its backward. Two runs give the same bits. They differentiate
    once; "reference" is plain autograd, differentiable twice, and its backward follows an autocast
    that surrounds it.

    Args:
        image_features: (B, D) fp16, bf16, fp32 or fp64, taken as it is: L2-normalise first for
            cosine similarities. B = 1 has no negatives and gives loss 0.
        text_features: (B, D) on the same device. Another dtype is allowed: both are promoted, and
            each gradient returns in its own input's dtype.
        logit_scale: multiplier of the similarities (1/temperature, already exponentiated): a number
            or a tensor of one element on the same device.
        impl: "reference" stores S and is the specification; "tiled" runs on any device; "triton"
            needs an NVIDIA GPU of compute capability 8.0 or later, or a CPU under Triton's
            interpreter; "auto" is "triton" where that runs on a GPU, else "tiled".

    Returns:
        loss: 0-dim, in nats, fp32 (fp64 for fp64 features).
        image_to_text_accuracy: share of images whose own text has a larger logit than every other
            text, 0 to 1; a tie is wrong. No gradient.
        text_to_image_accuracy: the same over the images for each text.

    Raises:
        TypeError: features or logit_scale that are no floating-point tensor (logit_scale: number).
        ValueError: unequal shapes or devices, an empty batch, an unknown impl.
        RuntimeError: impl="triton" where it cannot run.

    Source: Radford et al. 2021, "Learning transferable visual models from natural language
    supervision", figure 3.

    Example:
        >>> import torch
        >>> from gradcache_clip.ops import clip_loss_with_accuracy
        >>> result = clip_loss_with_accuracy(torch.eye(4), torch.eye(4).roll(1, 0), 2.0)
        >>> print(f"{result.loss:.4f} {result.image_to_text_accuracy:.1f}")
        2.3408 0.0
    """
    _check_features(image_features, text_features)
    dtype = torch.promote_types(image_features.dtype, text_features.dtype)
    scale = _scale_tensor(logit_scale, image_features.device, dtype)
    implementation = _IMPLEMENTATIONS[_resolve(impl, image_features.device, dtype)]
    with autocast_disabled(image_features.device):
        result = implementation(image_features.to(dtype), text_features.to(dtype), scale)
    return ClipLossResult(*result)


def _resolve(impl: str, device: torch.device, dtype: torch.dtype) -> str:
    if impl not in ("auto", *_IMPLEMENTATIONS):
        raise ValueError(
            f'impl: expected "auto", "reference", "tiled" or "triton", got {impl!r}; '
            'use impl="auto" to choose by device'
        )
    if impl == "auto":
        runs = device.type == "cuda" and triton_obstacle(device, dtype) is None
        return "triton" if runs else "tiled"
    if impl == "triton" and (obstacle := triton_obstacle(device, dtype)) is not None:
        raise RuntimeError(
            f'impl: expected an implementation that runs here, got "triton", but {obstacle}; '
            f'impl="tiled" runs on {device.type} with any floating dtype (or set '
            "TRITON_INTERPRET=1 before the first import to interpret the kernels on a CPU)"
        )
    return impl


def _check_features(image_features: Tensor, text_features: Tensor) -> None:
    for name, features in (("image_features", image_features), ("text_features", text_features)):
        if not isinstance(features, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(features).__name__}")
        if features.dtype not in _DTYPES:
            raise TypeError(
                f"{name}: expected float16, bfloat16, float32 or float64, got {features.dtype}; "
                "convert with .float()"
            )
        if features.ndim != 2 or features.numel() == 0:
            raise ValueError(
                f"{name}: expected a non-empty (B, D) matrix, got shape {tuple(features.shape)}; "
                "pool tokens to one vector for each sample first"
            )
    if image_features.shape != text_features.shape:
        raise ValueError(
            f"text_features: expected the shape of image_features {tuple(image_features.shape)}, "
            f"got {tuple(text_features.shape)}; row i of both must be one pair"
        )
    if image_features.device != text_features.device:
        raise ValueError(
            f"text_features: expected device {image_features.device}, got {text_features.device}; "
            "move one with .to(device)"
        )


def _scale_tensor(
    logit_scale: float | Tensor, device: torch.device, dtype: torch.dtype
) -> Float[Tensor, ""]:
    """A 0-dim tensor in the dtype of the logits, without a synchronisation."""
    dtype = torch.promote_types(dtype, torch.float32)
    if isinstance(logit_scale, (int, float)):
        return torch.full((), float(logit_scale), device=device, dtype=dtype)
    if not isinstance(logit_scale, Tensor) or not logit_scale.is_floating_point():
        got = logit_scale.dtype if isinstance(logit_scale, Tensor) else type(logit_scale).__name__
        raise TypeError(
            f"logit_scale: expected a number or a floating-point tensor, got {got}; "
            "pass e.g. log_logit_scale.exp()"
        )
    if logit_scale.numel() != 1:
        raise ValueError(
            f"logit_scale: expected one element, got shape {tuple(logit_scale.shape)}; "
            "pass a 0-dim tensor"
        )
    if logit_scale.device != device:
        raise ValueError(
            f"logit_scale: expected device {device}, got {logit_scale.device}; "
            "move it with .to(device)"
        )
    return logit_scale.reshape(()).to(dtype)
