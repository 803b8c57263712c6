"""The CLIP loss: one public op over three implementations.

B pairs, D feature width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gradcache_clip.ops.arguments import check_integers, check_pairs, check_share, scalar_tensor
from gradcache_clip.ops.contrast import contrast_statistics
from gradcache_clip.ops.groups import occurrences
from gradcache_clip.ops.implementations import Impl, autocast_disabled
from gradcache_clip.ops.loss_alone import loss_alone
from gradcache_clip.ops.pairing import Pairing, Statistics
from gradcache_clip.ops.results import ContrastiveOutput
from gradcache_clip.ops.smoothing import mean_logits
from gradcache_clip.ops.softmax import (
    columns_of,
    many_positives_loss,
    negative_lse_minus_positive,
    one_positive_loss,
    rows_of,
)

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def clip_loss_with_accuracy(
    image_features: Float[Tensor, "b d"],
    text_features: Float[Tensor, "b d"],
    logit_scale: float | Float[Tensor, ""],
    *,
    labels: Int[Tensor, " b"] | None = None,
    ids: Int[Tensor, " b"] | None = None,
    label_smoothing: float = 0.0,
    impl: Impl = "auto",
) -> ContrastiveOutput:
    """Compute the symmetric cross-entropy over the similarities of B pairs, and the accuracies.

    With S = logit_scale * image_features @ text_features.T (B x B) and the target T = identity:

        loss = (cross_entropy(S, T) + cross_entropy(S.T, T)) / 2

    "tiled" and "triton" never hold S, nor anything else of B x B numbers; logits, sums and gradient
    accumulators are fp32 (fp64 for fp64 features) whatever the dtype of the features, and whatever
    autocast surrounds the call or its backward. Two runs give the same bits. Both differentiate
    once; "reference" is plain autograd, differentiable twice, and its backward follows an autocast
    that surrounds it.

    Args:
        image_features: (B, D) fp16, bf16, fp32 or fp64, taken as it is: L2-normalise first for
            cosine similarities. B = 1 has no negatives and gives loss 0.
        text_features: (B, D) on the same device. Another dtype is allowed: both are promoted, and
            each gradient returns in its own input's dtype.
        logit_scale: multiplier of the similarities (1/temperature, already exponentiated): a number
            or a tensor of one element on the same device.
        labels: (B,) integers. Pairs with equal labels are positives of each other, and T is uniform
            over the positives of a row: captions that share an image, classes.
        ids: (B,) integers. Pairs with equal ids are not negatives of each other: duplicates. Where
            labels are equal as well they stay positives.
        label_smoothing: share of T, from 0 to below 1, that is spread evenly over all competitors,
            positives included, as in `torch.nn.functional.cross_entropy`.
        impl: "reference" stores S and is the specification; "tiled" runs on any device; "triton"
            needs an NVIDIA GPU of compute capability 8.0 or later, or a CPU under Triton's
            interpreter; "auto" is "triton" where that runs on a GPU, else "tiled".

    Returns:
        loss: 0-dim, in nats, fp32 (fp64 for fp64 features).
        image_to_text_accuracy: share of images for which a positive text has a larger logit than
            every negative, 0 to 1; a tie is wrong. No gradient.
        text_to_image_accuracy: the same over the images for each text.

    Raises:
        TypeError: features that are not floating-point tensors, a logit_scale that is neither
            that nor a number, labels or ids that are not integers.
        ValueError: unequal shapes or devices, an empty batch, a smoothing out of range, an unknown
            impl.
        RuntimeError: impl="triton" where it cannot run; torch.func or forward-mode differentiation
            through "tiled" or "triton".

    Source: Radford et al. 2021, "Learning transferable visual models from natural language
    supervision", figure 3. Several positives: Khosla et al. 2020, "Supervised contrastive
    learning", equation 2.

    Example:
        >>> import torch
        >>> from gradcache_clip.ops import clip_loss_with_accuracy
        >>> result = clip_loss_with_accuracy(torch.eye(4), torch.eye(4).roll(1, 0), 2.0)
        >>> print(f"{result.loss:.4f} {result.image_to_text_accuracy:.1f}")
        2.3408 0.0
    """
    return _clip(
        image_features,
        text_features,
        logit_scale,
        labels=labels,
        ids=ids,
        label_smoothing=label_smoothing,
        impl=impl,
        maxima=True,
    )


def _clip(
    q: Tensor,
    k: Tensor,
    logit_scale: float | Tensor,
    *,
    labels: Tensor | None = None,
    ids: Tensor | None = None,
    label_smoothing: float = 0.0,
    impl: str = "auto",
    maxima: bool,
) -> ContrastiveOutput:
    scale = _checked_scale(q, k, logit_scale, labels, ids, label_smoothing)
    pairing = Pairing(labels, labels, ids, ids, maxima=maxima)
    statistics = contrast_statistics("clip_loss", q, k, scale, pairing, impl)
    return clip_result(statistics, ClipTargets(labels, ids, label_smoothing), q, k, scale)


clip_loss = loss_alone(clip_loss_with_accuracy, _clip)
"""The loss of `clip_loss_with_accuracy` alone, with the same arguments."""


class ClipTargets:
    """The target distribution of each row."""

    def __init__(self, labels: Tensor | None, ids: Tensor | None, smoothing: float) -> None:
        self.labels, self.ids, self.smoothing = labels, ids, smoothing
        self.positives = None if labels is None else occurrences(labels, labels)


def _checked_scale(
    q: Tensor,
    k: Tensor,
    logit_scale: float | Tensor,
    labels: Tensor | None,
    ids: Tensor | None,
    label_smoothing: float,
) -> Tensor:
    """Check all arguments, and return the scale as a tensor."""
    check_pairs(("image_features", "text_features"), q, k)
    for name, integers in (("labels", labels), ("ids", ids)):
        if integers is not None:
            check_integers(name, integers, (len(q),), q.device)
    check_share("label_smoothing", label_smoothing)
    dtype = torch.promote_types(q.dtype, k.dtype)
    return scalar_tensor("logit_scale", logit_scale, q.device, dtype)


def clip_result(
    statistics: Statistics,
    targets: ClipTargets,
    q: Tensor,
    k: Tensor,
    logit_scale: Tensor,
) -> ContrastiveOutput:
    """Compute loss and accuracies from the statistics of q and k."""
    rows, columns = rows_of(statistics), columns_of(statistics)
    if targets.positives is None:
        losses = [one_positive_loss(negative_lse_minus_positive(each)) for each in (rows, columns)]
    else:
        losses = [many_positives_loss(each, targets.positives) for each in (rows, columns)]
    loss = (losses[0].mean() + losses[1].mean()) / 2
    if targets.smoothing > 0:
        # Cross-entropy is linear in the target: moving a share of it from the positives to all
        # competitors adds that share of the difference of their mean logits.
        above = _positive_above_mean(q, k, logit_scale, statistics, targets)
        loss = loss + targets.smoothing * above
    return ContrastiveOutput(loss, rows.accuracy(), columns.accuracy())


def _positive_above_mean(
    q: Tensor, k: Tensor, logit_scale: Tensor, statistics: Statistics, targets: ClipTargets
) -> Float[Tensor, ""]:
    """Average both directions of: mean positive logit minus mean competing logit."""
    positive = statistics.row_positive, statistics.row_positive
    if targets.positives is not None:
        positive = (
            statistics.row_positive / targets.positives,
            statistics.column_positive / targets.positives,
        )
    with autocast_disabled(q.device):
        mean = (
            mean_logits(q, k, logit_scale, targets.labels, targets.ids),
            mean_logits(k, q, logit_scale, targets.labels, targets.ids),
        )
    return ((positive[0] - mean[0]).mean() + (positive[1] - mean[1]).mean()) / 2
