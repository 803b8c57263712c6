"""Losses as modules, over the ops."""

from gradcache_clip.losses.clip import ClipLoss, ContrastiveOutput
from gradcache_clip.losses.info_nce import InfoNCELoss, RetrievalOutput
from gradcache_clip.losses.late_interaction import LateInteractionLoss
from gradcache_clip.losses.matryoshka import MatryoshkaLoss
from gradcache_clip.losses.moco import MoCoLoss, MoCoOutput
from gradcache_clip.losses.queue import FeatureQueue
from gradcache_clip.losses.self_contrast import NTXentLoss, SelfContrastOutput, SupConLoss
from gradcache_clip.losses.siglip import SigLipLoss

__all__ = [
    "ClipLoss",
    "ContrastiveOutput",
    "FeatureQueue",
    "InfoNCELoss",
    "LateInteractionLoss",
    "MatryoshkaLoss",
    "MoCoLoss",
    "MoCoOutput",
    "NTXentLoss",
    "RetrievalOutput",
    "SelfContrastOutput",
    "SigLipLoss",
    "SupConLoss",
]
