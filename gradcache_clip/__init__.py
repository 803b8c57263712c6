"""Exact large-batch contrastive training in the memory of one chunk."""

from gradcache_clip.cache import (
    ByLength,
    FrozenTrunk,
    GradCache,
    ReplayMismatchError,
    VerifyReport,
    verify,
)
from gradcache_clip.losses import (
    ClipLoss,
    ContrastiveOutput,
    FeatureQueue,
    InfoNCELoss,
    LateInteractionLoss,
    MatryoshkaLoss,
    NTXentLoss,
    RetrievalOutput,
    SelfContrastOutput,
    SigLipLoss,
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
    "LateInteractionLoss",
    "MatryoshkaLoss",
    "NTXentLoss",
    "ReplayMismatchError",
    "RetrievalOutput",
    "SelfContrastOutput",
    "SigLipLoss",
    "SupConLoss",
    "VerifyReport",
    "__version__",
    "verify",
]
