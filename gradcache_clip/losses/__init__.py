"""Losses as modules, over the ops."""

from gradcache_clip.losses.clip import ClipLoss, ContrastiveOutput
from gradcache_clip.losses.info_nce import InfoNCELoss, RetrievalOutput
from gradcache_clip.losses.queue import FeatureQueue
from gradcache_clip.losses.self_contrast import NTXentLoss, SelfContrastOutput, SupConLoss

__all__ = [
    "ClipLoss",
    "ContrastiveOutput",
    "FeatureQueue",
    "InfoNCELoss",
    "NTXentLoss",
    "RetrievalOutput",
    "SelfContrastOutput",
    "SupConLoss",
]
