"""Exact large-batch contrastive training in the memory of one chunk."""

from importlib import import_module
from typing import Any

from gradcache_clip.cache import (
    ByLength,
    FrozenTrunk,
    GradCache,
    ReplayMismatchError,
    Shared,
    deferred_step,
)
from gradcache_clip.losses import (
    ClipLoss,
    ContrastiveOutput,
    FeatureQueue,
    InfoNCELoss,
    LateInteractionLoss,
    MatryoshkaLoss,
    MoCoLoss,
    NTXentLoss,
    RetrievalOutput,
    SelfContrastOutput,
    SigLipLoss,
    SupConLoss,
)
from gradcache_clip.verification import VerifyReport, verify

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
    "MoCoLoss",
    "NTXentLoss",
    "PlanOptions",
    "ReplayMismatchError",
    "RetrievalOutput",
    "SelfContrastOutput",
    "Shared",
    "SigLipLoss",
    "SupConLoss",
    "VerifyReport",
    "__version__",
    "deferred_step",
    "plan",
    "verify",
]


def __getattr__(name: str) -> Any:
    # With NumPy and what models are built with; nothing else here needs them.
    if name in ("PlanOptions", "plan"):
        return getattr(import_module("gradcache_clip.memory"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
