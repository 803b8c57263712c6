"""Losses as modules, over the ops."""

from gradcache_clip.losses.clip import ClipLoss
from gradcache_clip.losses.distillation import DistillationOutput, ScoreDistillationLoss
from gradcache_clip.losses.in_batch_distillation import InBatchDistillationLoss
from gradcache_clip.losses.info_nce import InfoNCELoss
from gradcache_clip.losses.late_interaction import LateInteractionLoss
from gradcache_clip.losses.matryoshka import MatryoshkaLoss
from gradcache_clip.losses.max_sim import MaxSimLoss
from gradcache_clip.losses.max_sim_distillation import MaxSimDistillationLoss
from gradcache_clip.losses.moco import MoCoLoss
from gradcache_clip.losses.queue import FeatureQueue
from gradcache_clip.losses.retrieval import RetrievalLoss
from gradcache_clip.losses.self_contrast import NTXentLoss, SupConLoss
from gradcache_clip.losses.siglip import SigLipLoss
from gradcache_clip.ops.results import ContrastiveOutput, RetrievalOutput, SelfContrastOutput

MoCoOutput = SelfContrastOutput  # its earlier name

__all__ = [
    "ClipLoss",
    "ContrastiveOutput",
    "DistillationOutput",
    "FeatureQueue",
    "InBatchDistillationLoss",
    "InfoNCELoss",
    "LateInteractionLoss",
    "MatryoshkaLoss",
    "MaxSimDistillationLoss",
    "MaxSimLoss",
    "MoCoLoss",
    "MoCoOutput",
    "NTXentLoss",
    "RetrievalLoss",
    "RetrievalOutput",
    "ScoreDistillationLoss",
    "SelfContrastOutput",
    "SigLipLoss",
    "SupConLoss",
]
