"""Losses of several prefixes of the same features, in one pass over the tiles.

A result for width d is that of the loss of the same name over prefixes of d entries, each L2-
normalised anew: F.normalize(features[:, :d], dim=-1). Their weighted sum is a Matryoshka loss.
B pairs or queries, N rows, H shared and K own hard negatives, D feature width.

Source: Kusupati et al. 2022, "Matryoshka representation learning", equation 1.
"""

from __future__ import annotations

from collections.abc import Sequence
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
from gradcache_clip.ops.clip import ClipLossResult, ClipTargets, checked_scale, clip_result
from gradcache_clip.ops.groups import occurrences
from gradcache_clip.ops.implementations import Impl
from gradcache_clip.ops.info_nce import (
    InfoNCEResult,
    RetrievalRules,
    info_nce_result,
    own_negative_logits,
    pair_products,
    retrieval_columns,
    retrieval_pairing,
)
from gradcache_clip.ops.pairing import Pairing
from gradcache_clip.ops.prefixes import check_widths, prefix_statistics
from gradcache_clip.ops.prefixes_reference import unit_prefix
from gradcache_clip.ops.self_contrast import (
    SelfContrastResult,
    classes_pairing,
    nt_xent_result,
    sup_con_result,
    views_pairing,
)

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def clip_prefix_losses(
    image_features: Float[Tensor, "b d"],
    text_features: Float[Tensor, "b d"],
    logit_scale: float | Float[Tensor, ""],
    widths: Sequence[int],
    *,
    labels: Int[Tensor, " b"] | None = None,
    ids: Int[Tensor, " b"] | None = None,
    label_smoothing: float = 0.0,
    impl: Impl = "auto",
) -> list[ClipLossResult]:
    """`clip_loss_with_accuracy` of prefixes of the features, one result for each width.

    Inner products of a prefix go on from those of the one before: for all widths together "tiled"
    takes the flops of the widest, 8 B^2 D, and keeps one tile for each. Beyond the features only
    vectors of B numbers are stored; smoothing takes a normalised copy of each prefix.

    Args:
        image_features: (B, D) fp16, bf16, fp32 or fp64; need not be normalised. A prefix of zeros
            stays zero.
        text_features: (B, D) on the same device.
        logit_scale: multiplier of the cosine similarities, the same for every width.
        widths: number of leading entries of each prefix, increasing; the last is at most D.
        labels: as in `clip_loss_with_accuracy`, and so are the other options.
        impl: as there. With labels or ids "triton" makes one pass for each width, over normalised
            copies.

    Raises:
        TypeError, ValueError, RuntimeError: as `clip_loss_with_accuracy`.
        ValueError: widths that do not increase from 1 to D at most.

    Source: Kusupati et al. 2022, equation 1.

    Example:
        >>> import torch
        >>> from gradcache_clip.ops.matryoshka import clip_prefix_losses
        >>> for result in clip_prefix_losses(torch.eye(4), torch.eye(4), 2.0, [1, 4]):
        ...     print(f"{result.loss:.4f}")
        1.1249
        0.3408
    """
    q, k = image_features, text_features
    scale = checked_scale(q, k, logit_scale, labels, ids, label_smoothing)
    check_widths("widths", widths, q.shape[1])
    pairing = Pairing(labels, labels, ids, ids)
    statistics = prefix_statistics("clip_prefix_losses", q, k, scale, pairing, widths, impl)
    targets = ClipTargets(labels, ids, label_smoothing)
    return [
        clip_result(each, targets, *_smoothed_over(q, k, width, label_smoothing), scale)
        for each, width in zip(statistics, widths, strict=True)
    ]


def _smoothed_over(
    q: Tensor, k: Tensor, width: int, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """The features whose mean logits smoothing needs; any will do where it is off."""
    return (q, k) if label_smoothing == 0 else (unit_prefix(q, width), unit_prefix(k, width))


def info_nce_prefix_losses(
    queries: Float[Tensor, "b d"],
    documents: Float[Tensor, "b d"],
    logit_scale: float | Float[Tensor, ""],
    widths: Sequence[int],
    *,
    hard_negatives: Float[Tensor, "h d"] | Float[Tensor, "b k d"] | None = None,
    ids: Int[Tensor, " b"] | Int[Tensor, " b+h"] | None = None,
    false_negative_margin: float | None = None,
    symmetric: bool = False,
    tau_plus: float = 0.0,
    impl: Impl = "auto",
) -> list[InfoNCEResult]:
    """`info_nce_loss_with_accuracy` of prefixes of the features, one result for each width.

    Cost as in `clip_prefix_losses`. A margin is applied to the similarities of each prefix; it and
    own hard negatives take a normalised copy of each prefix.

    Args:
        queries: (B, D), need not be normalised.
        documents: (B, D) on the same device; row i is the positive of query i.
        logit_scale: multiplier of the cosine similarities, the same for every width.
        widths: number of leading entries of each prefix, increasing; the last is at most D.
        hard_negatives: as in `info_nce_loss_with_accuracy`, and so are the other options.
        impl: as there. With ids or a margin "triton" makes one pass for each width, over normalised
            copies.

    Raises:
        TypeError, ValueError, RuntimeError: as `info_nce_loss_with_accuracy`.
        ValueError: widths that do not increase from 1 to D at most.

    Source: Kusupati et al. 2022, equation 1.

    Example:
        >>> import torch
        >>> from gradcache_clip.ops.matryoshka import info_nce_prefix_losses
        >>> rows = torch.eye(4)
        >>> results = info_nce_prefix_losses(rows, rows, 2.0, [2, 4], hard_negatives=-rows)
        >>> [round(result.loss.item(), 4) for result in results]
        [1.342, 0.6045]
    """
    rules = RetrievalRules(ids, false_negative_margin, symmetric, tau_plus)
    columns, own = retrieval_columns(queries, documents, hard_negatives, rules)
    check_widths("widths", widths, queries.shape[1])
    dtype = torch.promote_types(queries.dtype, columns.dtype)
    scale = scalar_tensor("logit_scale", logit_scale, queries.device, dtype)
    cosine = None
    if false_negative_margin is not None:
        cosine = _prefix_cosines(queries, documents, widths, scale.dtype)
    pairing = retrieval_pairing(cosine, len(queries), len(columns), scale, rules)
    statistics = prefix_statistics(
        "info_nce_prefix_losses", queries, columns, scale, pairing, widths, impl
    )
    results = []
    for each, width in zip(statistics, widths, strict=True):
        own_logits = None
        if own is not None:
            own_logits = own_negative_logits(
                unit_prefix(queries, width), unit_prefix(own, width), scale
            )
        results.append(info_nce_result(each, own_logits, len(columns), scale, rules))
    return results


def _prefix_cosines(
    queries: Tensor, documents: Tensor, widths: Sequence[int], dtype: torch.dtype
) -> Float[Tensor, "p b"]:
    prefixes = ((unit_prefix(queries, d), unit_prefix(documents, d)) for d in widths)
    return torch.stack([pair_products(*each, dtype) for each in prefixes])


def nt_xent_prefix_losses(
    features_a: Float[Tensor, "b d"],
    features_b: Float[Tensor, "b d"],
    logit_scale: float | Float[Tensor, ""],
    widths: Sequence[int],
    *,
    tau_plus: float = 0.0,
    impl: Impl = "auto",
) -> list[SelfContrastResult]:
    """`nt_xent_loss_with_accuracy` of prefixes of the features, one result for each width.

    Cost as in `clip_prefix_losses`; "tiled" computes one half of the symmetric matrix.

    Args:
        features_a: (B, D), need not be normalised.
        features_b: (B, D) on the same device; row i is another view of the same sample.
        logit_scale: multiplier of the cosine similarities, the same for every width.
        widths: number of leading entries of each prefix, increasing; the last is at most D.
        tau_plus: as in `nt_xent_loss_with_accuracy`.
        impl: as there. "triton" makes one pass for each width, over normalised copies.

    Raises:
        TypeError, ValueError, RuntimeError: as `nt_xent_loss_with_accuracy`.
        ValueError: widths that do not increase from 1 to D at most.

    Source: Kusupati et al. 2022, equation 1.

    Example:
        >>> import torch
        >>> from gradcache_clip.ops.matryoshka import nt_xent_prefix_losses
        >>> results = nt_xent_prefix_losses(torch.eye(4), torch.eye(4), 2.0, [2, 4])
        >>> [round(result.loss.item(), 4) for result in results]
        [1.2702, 0.5944]
    """
    check_pairs(("features_a", "features_b"), features_a, features_b)
    check_widths("widths", widths, features_a.shape[1])
    check_share("tau_plus", tau_plus)
    features = torch.cat((features_a, features_b))
    scale = scalar_tensor("logit_scale", logit_scale, features.device, features.dtype)
    pairing = views_pairing(len(features_a))
    statistics = prefix_statistics(
        "nt_xent_prefix_losses", features, features, scale, pairing, widths, impl
    )
    return [nt_xent_result(each, scale, tau_plus) for each in statistics]


def sup_con_prefix_losses(
    features: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    logit_scale: float | Float[Tensor, ""],
    widths: Sequence[int],
    *,
    impl: Impl = "auto",
) -> list[SelfContrastResult]:
    """`sup_con_loss_with_accuracy` of prefixes of the features, one result for each width.

    Cost as in `clip_prefix_losses`; "tiled" computes one half of the symmetric matrix.

    Args:
        features: (N, D), need not be normalised.
        labels: (N,) integers on the same device.
        logit_scale: multiplier of the cosine similarities, the same for every width.
        widths: number of leading entries of each prefix, increasing; the last is at most D.
        impl: as in `sup_con_loss_with_accuracy`. "triton" makes one pass for each width, over
            normalised copies.

    Raises:
        TypeError, ValueError, RuntimeError: as `sup_con_loss_with_accuracy`.
        ValueError: widths that do not increase from 1 to D at most.

    Source: Kusupati et al. 2022, equation 1.

    Example:
        >>> import torch
        >>> from gradcache_clip.ops.matryoshka import sup_con_prefix_losses
        >>> labels = torch.tensor([0, 1, 0, 1])
        >>> results = sup_con_prefix_losses(torch.eye(2).repeat(2, 1), labels, 2.0, [1, 2])
        >>> [round(result.loss.item(), 4) for result in results]
        [0.6691, 0.2395]
    """
    check_features("features", features)
    check_integers("labels", labels, (len(features),), features.device)
    check_widths("widths", widths, features.shape[1])
    scale = scalar_tensor("logit_scale", logit_scale, features.device, features.dtype)
    statistics = prefix_statistics(
        "sup_con_prefix_losses", features, features, scale, classes_pairing(labels), widths, impl
    )
    positives = occurrences(labels, labels) - 1
    return [sup_con_result(each, positives) for each in statistics]
