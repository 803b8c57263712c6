"""Losses of a batch against itself: NT-Xent over two views, and SupCon over labels.

B samples, N feature rows in all, D feature width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gradcache_clip.ops.arguments import (
    check_features,
    check_integers,
    check_pairs,
    check_share,
    scalar_tensor,
)
from gradcache_clip.ops.contrast import contrast_statistics
from gradcache_clip.ops.groups import occurrences
from gradcache_clip.ops.implementations import Impl
from gradcache_clip.ops.loss_alone import loss_alone
from gradcache_clip.ops.pairing import Pairing, Statistics
from gradcache_clip.ops.results import SelfContrastOutput
from gradcache_clip.ops.softmax import (
    debiased,
    many_positives_loss,
    negative_lse_minus_positive,
    one_positive_loss,
    rows_of,
)

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def nt_xent_loss_with_accuracy(
    features_a: Float[Tensor, "b d"],
    features_b: Float[Tensor, "b d"],
    logit_scale: float | Float[Tensor, ""],
    *,
    tau_plus: float = 0.0,
    impl: Impl = "auto",
) -> SelfContrastOutput:
    """Compute the cross-entropy of each of 2B views over all others, with its partner as target.

    With z = [features_a; features_b], S = logit_scale * z @ z.T and p(i) = i + B mod 2B:

        loss = mean_i (logsumexp_{j != i} S_ij - S_i,p(i))

    S is symmetric and never held: "tiled" computes one half of it, 16 B^2 D flops in all instead
    of the 32 B^2 D of a general contrast of 2B rows.

    Args:
        features_a: (B, D) fp16, bf16, fp32 or fp64, taken as it is: L2-normalise first.
        features_b: (B, D) on the same device; row i is another view of the same sample.
        logit_scale: multiplier of the similarities (1/temperature, already exponentiated).
        tau_plus: share of positives among the negatives, from 0 to below 1, taken out of their
            mean: the debiased loss. For unit features.
        impl: "auto", "reference", "tiled" or "triton"; see `clip_loss_with_accuracy`.

    Returns:
        loss: 0-dim, in nats, fp32 (fp64 for fp64 features).
        accuracy: share of views whose partner has a larger logit than every other view, 0 to 1; a
            tie is wrong. No gradient.

    Raises:
        TypeError: features or logit_scale of a wrong type.
        ValueError: unequal shapes or devices, an empty batch, a tau_plus out of range.
        RuntimeError: impl="triton" where it cannot run.

    Source: Chen et al. 2020, "A simple framework for contrastive learning of visual
    representations", equation 1. Debiased: Chuang et al. 2020, equation 8.

    Example:
        >>> import torch
        >>> from gradcache_clip.ops import nt_xent_loss_with_accuracy
        >>> result = nt_xent_loss_with_accuracy(torch.eye(4), torch.eye(4), 2.0)
        >>> print(f"{result.loss:.4f} {result.accuracy:.1f}")
        0.5944 1.0
    """
    arguments = features_a, features_b, logit_scale
    return _nt_xent(*arguments, tau_plus=tau_plus, impl=impl, maxima=True)


def _nt_xent(
    features_a: Tensor,
    features_b: Tensor,
    logit_scale: float | Tensor,
    *,
    tau_plus: float = 0.0,
    impl: str = "auto",
    maxima: bool,
) -> SelfContrastOutput:
    check_pairs(("features_a", "features_b"), features_a, features_b)
    check_share("tau_plus", tau_plus)
    features = torch.cat((features_a, features_b))
    scale = scalar_tensor("logit_scale", logit_scale, features.device, features.dtype)
    pairing = views_pairing(len(features_a))._replace(maxima=maxima)
    statistics = contrast_statistics("nt_xent_loss", features, features, scale, pairing, impl)
    return nt_xent_result(statistics, scale, tau_plus)


nt_xent_loss = loss_alone(nt_xent_loss_with_accuracy, _nt_xent)
"""The loss of `nt_xent_loss_with_accuracy` alone, with the same arguments."""


def views_pairing(B: int) -> Pairing:
    """Pair row i with row (i + B) mod 2B, the other view of its sample."""
    return Pairing(positive_shift=B, both_ways=False, self_contrast=True)


def nt_xent_result(
    statistics: Statistics, logit_scale: Float[Tensor, ""], tau_plus: float
) -> SelfContrastOutput:
    """Compute loss and accuracy of views against each other."""
    rows = rows_of(statistics)
    difference = negative_lse_minus_positive(rows)
    if tau_plus > 0:
        # Neither a view itself nor its partner is a negative.
        negatives = len(difference) - 2
        difference = debiased(difference, rows.positive, negatives, logit_scale, tau_plus)
    return SelfContrastOutput(one_positive_loss(difference).mean(), rows.accuracy())


def sup_con_loss_with_accuracy(
    features: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    logit_scale: float | Float[Tensor, ""],
    *,
    impl: Impl = "auto",
) -> SelfContrastOutput:
    """Compute the cross-entropy of each row over all others, uniform over the rows of its label.

    With S = logit_scale * features @ features.T and P(i) the other rows of label i:

        loss = mean_i (logsumexp_{j != i} S_ij - mean_{p in P(i)} S_ip)

    over the rows whose P(i) is not empty; 0 if there is none. Views of a sample are rows of one
    label: pass them concatenated. S and the comparison of labels never leave a tile.

    Args:
        features: (N, D) fp16, bf16, fp32 or fp64, taken as it is: L2-normalise first.
        labels: (N,) integers on the same device.
        logit_scale: multiplier of the similarities (1/temperature, already exponentiated).
        impl: "auto", "reference", "tiled" or "triton"; see `clip_loss_with_accuracy`.

    Returns:
        loss: 0-dim, in nats, fp32 (fp64 for fp64 features).
        accuracy: share of the rows that have a positive for which one of them has a larger logit
            than every negative, 0 to 1; a tie is wrong. No gradient.

    Raises:
        TypeError: features or logit_scale of a wrong type, labels that are not integers.
        ValueError: shapes or devices that do not fit together, an empty batch.
        RuntimeError: impl="triton" where it cannot run.

    Source: Khosla et al. 2020, "Supervised contrastive learning", equation 2 (L_out), without the
    factor temperature / base temperature of its code.

    Example:
        >>> import torch
        >>> from gradcache_clip.ops import sup_con_loss_with_accuracy
        >>> features, labels = torch.eye(2).repeat(2, 1), torch.tensor([0, 1, 0, 1])
        >>> result = sup_con_loss_with_accuracy(features, labels, 2.0)
        >>> print(f"{result.loss:.4f} {result.accuracy:.1f}")
        0.2395 1.0
    """
    check_features("features", features)
    check_integers("labels", labels, (len(features),), features.device)
    scale = scalar_tensor("logit_scale", logit_scale, features.device, features.dtype)
    statistics = contrast_statistics(
        "sup_con_loss", features, features, scale, classes_pairing(labels), impl
    )
    return sup_con_result(statistics, labels)


sup_con_loss = loss_alone(sup_con_loss_with_accuracy)
"""The loss of `sup_con_loss_with_accuracy` alone, with the same arguments."""


def classes_pairing(labels: Int[Tensor, " n"]) -> Pairing:
    """Make rows with equal labels positives of each other."""
    return Pairing(labels, labels, both_ways=False, self_contrast=True)


def sup_con_result(statistics: Statistics, labels: Int[Tensor, " n"]) -> SelfContrastOutput:
    """Compute loss and accuracy over the rows that have positives."""
    rows, positives = rows_of(statistics), occurrences(labels, labels) - 1
    count = (positives > 0).sum().clamp_min(1)
    right = rows.right() & (positives > 0)
    loss = many_positives_loss(rows, positives).sum() / count
    return SelfContrastOutput(loss, right.sum().to(loss.dtype) / count)
