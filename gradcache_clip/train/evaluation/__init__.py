"""Retrieval and zero-shot classification, without graphs and without an N x N matrix."""

from gradcache_clip.train.evaluation.embed import embed_dataset
from gradcache_clip.train.evaluation.recall import RetrievalMetrics, recall_at_k, retrieve
from gradcache_clip.train.evaluation.zero_shot import (
    zero_shot_classification,
    zero_shot_classifier,
)

__all__ = [
    "RetrievalMetrics",
    "embed_dataset",
    "recall_at_k",
    "retrieve",
    "zero_shot_classification",
    "zero_shot_classifier",
]
