"""Exact large-batch contrastive training in the memory of one chunk."""

from gradcache_clip.cache import GradCache, ReplayMismatchError
from gradcache_clip.losses import ClipLoss, ContrastiveOutput

__version__ = "0.1.0"

__all__ = [
    "ClipLoss",
    "ContrastiveOutput",
    "GradCache",
    "ReplayMismatchError",
    "__version__",
]
