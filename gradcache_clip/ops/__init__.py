"""Loss ops: one public function each, several implementations behind it."""

from gradcache_clip.ops.clip import clip_loss, clip_loss_with_accuracy
from gradcache_clip.ops.implementations import Impl
from gradcache_clip.ops.info_nce import info_nce_loss, info_nce_loss_with_accuracy
from gradcache_clip.ops.late_interaction import (
    late_interaction_loss,
    late_interaction_loss_with_accuracy,
)
from gradcache_clip.ops.results import ContrastiveOutput, RetrievalOutput, SelfContrastOutput
from gradcache_clip.ops.self_contrast import (
    nt_xent_loss,
    nt_xent_loss_with_accuracy,
    sup_con_loss,
    sup_con_loss_with_accuracy,
)
from gradcache_clip.ops.siglip import siglip_loss, siglip_loss_with_accuracy

# Earlier names of the three results.
ClipLossResult = LateInteractionResult = SigLipLossResult = ContrastiveOutput
InfoNCEResult, SelfContrastResult = RetrievalOutput, SelfContrastOutput

__all__ = [
    "ClipLossResult",
    "ContrastiveOutput",
    "Impl",
    "InfoNCEResult",
    "LateInteractionResult",
    "RetrievalOutput",
    "SelfContrastOutput",
    "SelfContrastResult",
    "SigLipLossResult",
    "clip_loss",
    "clip_loss_with_accuracy",
    "info_nce_loss",
    "info_nce_loss_with_accuracy",
    "late_interaction_loss",
    "late_interaction_loss_with_accuracy",
    "nt_xent_loss",
    "nt_xent_loss_with_accuracy",
    "siglip_loss",
    "siglip_loss_with_accuracy",
    "sup_con_loss",
    "sup_con_loss_with_accuracy",
]
