"""Exact large-batch contrastive training in the memory of one chunk."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradcache_clip.cache import (
        AuxiliaryOutput,
        ByLength,
        FrozenTrunk,
        GradCache,
        PackedPatches,
        PackedTokens,
        Ragged,
        ReplayMismatchError,
        Rows,
        Shared,
        deferred_step,
        methods,
    )
    from gradcache_clip.losses import (
        ClipLoss,
        ContrastiveOutput,
        FeatureQueue,
        InBatchDistillationLoss,
        InfoNCELoss,
        LateInteractionLoss,
        MatryoshkaLoss,
        MaxSimDistillationLoss,
        MaxSimLoss,
        MoCoLoss,
        NTXentLoss,
        RetrievalLoss,
        RetrievalOutput,
        ScoreDistillationLoss,
        SelfContrastOutput,
        SigLipLoss,
        SupConLoss,
    )
    from gradcache_clip.memory import PlanOptions, plan
    from gradcache_clip.verification import VerifyReport, verify

__version__ = "0.1.0"

# Imported on first use, so that the command line answers before torch is there.
_HOMES = {
    "cache": (
        "AuxiliaryOutput",
        "ByLength",
        "FrozenTrunk",
        "GradCache",
        "PackedPatches",
        "PackedTokens",
        "Ragged",
        "ReplayMismatchError",
        "Rows",
        "Shared",
        "deferred_step",
        "methods",
    ),
    "losses": (
        "ClipLoss",
        "ContrastiveOutput",
        "FeatureQueue",
        "InBatchDistillationLoss",
        "InfoNCELoss",
        "LateInteractionLoss",
        "MatryoshkaLoss",
        "MaxSimDistillationLoss",
        "MaxSimLoss",
        "MoCoLoss",
        "NTXentLoss",
        "RetrievalLoss",
        "RetrievalOutput",
        "ScoreDistillationLoss",
        "SelfContrastOutput",
        "SigLipLoss",
        "SupConLoss",
    ),
    "memory": ("PlanOptions", "plan"),
    "verification": ("VerifyReport", "verify"),
}

__all__ = [
    "AuxiliaryOutput",
    "ByLength",
    "ClipLoss",
    "ContrastiveOutput",
    "FeatureQueue",
    "FrozenTrunk",
    "GradCache",
    "InBatchDistillationLoss",
    "InfoNCELoss",
    "LateInteractionLoss",
    "MatryoshkaLoss",
    "MaxSimDistillationLoss",
    "MaxSimLoss",
    "MoCoLoss",
    "NTXentLoss",
    "PackedPatches",
    "PackedTokens",
    "PlanOptions",
    "Ragged",
    "ReplayMismatchError",
    "RetrievalLoss",
    "RetrievalOutput",
    "Rows",
    "ScoreDistillationLoss",
    "SelfContrastOutput",
    "Shared",
    "SigLipLoss",
    "SupConLoss",
    "VerifyReport",
    "__version__",
    "deferred_step",
    "methods",
    "plan",
    "verify",
]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            value = globals()[name] = getattr(import_module(f"gradcache_clip.{home}"), name)
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
