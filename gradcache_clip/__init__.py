"""Exact large-batch contrastive training in the memory of one chunk."""

from gradcache_clip.cache import ByLength, FrozenTrunk, GradCache, ReplayMismatchError
from gradcache_clip.losses import (
    ClipLoss,
    ContrastiveOutput,
    FeatureQueue,
    InfoNCELoss,
    NTXentLoss,
    RetrievalOutput,
    SelfContrastOutput,
    SupConLoss,
)

__version__ = "0.1.0"

__all__ = [
    "ByLength",
    "ClipLoss",
    "ContrastiveOutput",
    "FeatureQueue",
    "FrozenTrunk",
    "GradCache",
    "InfoNCELoss",
    "NTXentLoss",
    "ReplayMismatchError",
    "RetrievalOutput",
    "SelfContrastOutput",
    "SupConLoss",
    "__version__",
]
