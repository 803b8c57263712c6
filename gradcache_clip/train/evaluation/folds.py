"""Recall averaged over parts of a data set: COCO's 1K protocol.

N images, M texts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gradcache_clip.train.evaluation.features import Features
from gradcache_clip.train.evaluation.recall import (
    DirectionMetrics,
    RetrievalMetrics,
    recall_at_k,
)

if TYPE_CHECKING:
    from jaxtyping import Int


def recall_in_folds(
    image_features: Features,
    text_features: Features,
    *,
    image_ids: Int[Tensor, " n"],
    text_ids: Int[Tensor, " m"],
    folds: int,
    ks: Sequence[int] = (1, 5, 10),
) -> RetrievalMetrics:
    """Average `recall_at_k` over consecutive parts of the images, each with its own texts.

    Candidates come from the same part only, so recall is higher than over the whole set: state
    which one you report. Five folds of COCO's 5,000 test images have 1,000 images each.

    Args:
        image_features, text_features: as for `recall_at_k`, images in the order of their file.
        image_ids, text_ids: integers, equal where image and text belong together.
        folds: number of parts; their sizes differ by at most one image.
        ks: depths.

    Returns:
        Means over the parts, also of ranks; `queries` is their total, `candidates` the mean.

    Raises:
        ValueError: as for `recall_at_k`, or `folds` is not between 1 and N.

    Source:
        Karpathy and Fei-Fei 2015, section 4.2: five folds of 1,000 images of COCO's test set.

    Example:
        >>> features, ids = torch.eye(4), torch.arange(4)
        >>> recall_in_folds(features, features, image_ids=ids, text_ids=ids, folds=2,
        ...                 ks=(1,)).image_to_text.chance
        {1: 0.5}
    """
    if folds == 1:
        return recall_at_k(
            image_features, text_features, image_ids=image_ids, text_ids=text_ids, ks=ks
        )
    if not 1 <= folds <= len(image_features):
        raise ValueError(
            f"folds: expected 1 to {len(image_features)}, the number of images, got {folds}; "
            "COCO's 5,000 test images make 5"
        )
    parts = []
    for images in torch.arange(len(image_features)).tensor_split(folds):
        own = image_ids[images]
        texts = torch.isin(text_ids, own).nonzero().flatten()
        parts.append(
            recall_at_k(
                image_features[images],
                text_features[texts],
                image_ids=own,
                text_ids=text_ids[texts],
                ks=ks,
            )
        )
    return RetrievalMetrics(
        _mean([part.image_to_text for part in parts]), _mean([part.text_to_image for part in parts])
    )


def _mean(parts: Sequence[DirectionMetrics]) -> DirectionMetrics:
    return DirectionMetrics(
        recall=_mean_at([part.recall for part in parts]),
        chance=_mean_at([part.chance for part in parts]),
        median_rank=fmean(part.median_rank for part in parts),
        mean_rank=fmean(part.mean_rank for part in parts),
        queries=sum(part.queries for part in parts),
        candidates=round(fmean(part.candidates for part in parts)),
    )


def _mean_at(shares: Sequence[Mapping[int, float]]) -> dict[int, float]:
    return {k: fmean(share[k] for share in shares) for k in shares[0]}
