"""Replacements for the losses of open_clip that return a second one beside the contrastive loss.

b: pairs of this rank, D: width, G: width of the teacher, L: tokens, V: vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gradcache_clip import losses
from gradcache_clip.distributed.exchange import Exchange
from gradcache_clip.integrations.arguments import translate_errors
from gradcache_clip.integrations.open_clip_base import (
    SoftmaxLoss,
    check_features,
    check_scalars,
)
from gradcache_clip.losses.options import check_finite

_NAMES = {
    "teacher_queries": "dist_image_features",
    "teacher_documents": "dist_text_features",
    "queries": "image_features",
}


class CoCaLoss(SoftmaxLoss):
    """Replaces `open_clip.loss.CoCaLoss`: a `ClipLoss` and the cross-entropy of captions.

    The caption loss is torch's: the mean over this rank's tokens that are no padding, as there.

    Args:
        caption_loss_weight: factor of the caption loss.
        clip_loss_weight: factor of the contrastive loss, which is not computed if this is 0.
        pad_id: label of padding.
        local_loss: as all that follow, see `ClipLoss`.

    Source: Yu et al. 2022, "CoCa: contrastive captioners are image-text foundation models",
    equation 4.

    Example:
        >>> import torch
        >>> from gradcache_clip.integrations.open_clip import CoCaLoss
        >>> logits, labels = torch.zeros(4, 3, 8), torch.ones(4, 3, dtype=torch.long)
        >>> loss = CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=1.0)
        >>> both = loss(torch.eye(4), torch.eye(4), logits, labels, torch.tensor(2.0))
        >>> print(" ".join(f"{each:.4f}" for each in both))
        0.3408 4.1589
    """

    def __init__(
        self,
        caption_loss_weight: float,
        clip_loss_weight: float,
        pad_id: int = 0,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        *,
        exchange: Exchange = "gather",
    ) -> None:
        remedy = "1.0 leaves the loss as it is"
        check_finite("caption_loss_weight", caption_loss_weight, remedy)
        check_finite("clip_loss_weight", clip_loss_weight, remedy)
        flags = local_loss, gather_with_grad, cache_labels
        super().__init__(*flags, rank, world_size, use_horovod, exchange=exchange)
        self.clip_loss_weight, self.caption_loss_weight = clip_loss_weight, caption_loss_weight
        self.caption_loss = nn.CrossEntropyLoss(ignore_index=pad_id)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logits: Tensor,
        labels: Tensor,
        logit_scale: Tensor,
        output_dict: bool = False,
    ) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
        """Compute both losses, each times its weight.

        Args:
            image_features: (b, D), L2-normalised by the model, with equal b on every rank.
            text_features: (b, D), L2-normalised by the model.
            logits: (b, L, V), for the next token of each caption.
            labels: (b, L) integers, these tokens.
            logit_scale: the model's multiplier of the cosines, already exponentiated.
            output_dict: return {"contrastive_loss": ..., "caption_loss": ...}, not a tuple.

        Raises:
            ValueError: logits and labels that do not match, and what `ClipLoss` raises.
            TypeError: a scale that is not a tensor.
        """
        _check_captions(logits, labels)
        contrastive = logits.new_zeros(())
        if self.clip_loss_weight:
            plain = self.contrastive(image_features, text_features, logit_scale)
            contrastive = self.clip_loss_weight * plain
        captions: Tensor = self.caption_loss(logits.mT, labels) * self.caption_loss_weight
        if output_dict:
            return {"contrastive_loss": contrastive, "caption_loss": captions}
        return contrastive, captions


class DistillClipLoss(SoftmaxLoss):
    """Replaces `open_clip.loss.DistillClipLoss`: a `ClipLoss` and the softmaxes of a teacher.

    With S the logits of the student and T those of the teacher over all pairs, the second loss is
    the mean of -sum_j softmax(T)_ij log softmax(S)_ij over the rows i, and the same over the
    columns, halved. Neither matrix is stored; see `gradcache_clip.losses.InBatchDistillationLoss`.

    Args:
        local_loss: as all that follow, see `ClipLoss`.

    Sources: Hinton et al. 2015, "Distilling the knowledge in a neural network"; for two towers, Wu
    et al. 2023, "TinyCLIP".

    Example:
        >>> import torch
        >>> from gradcache_clip.integrations.open_clip import DistillClipLoss
        >>> rows, scale = torch.eye(4), torch.tensor(2.0)
        >>> both = DistillClipLoss()(rows, rows, scale, rows, rows, scale)
        >>> print(" ".join(f"{each:.4f}" for each in both))
        0.3408 0.9183
    """

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        dist_image_features: Tensor,
        dist_text_features: Tensor,
        dist_logit_scale: Tensor,
        output_dict: bool = False,
    ) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
        """Compute both losses over the pairs of all ranks.

        Args:
            image_features: (b, D), L2-normalised by the student, with equal b on every rank.
            text_features: (b, D), L2-normalised by the student.
            logit_scale: the student's multiplier of the cosines, already exponentiated.
            dist_image_features: (b, G), L2-normalised by the teacher; constants.
            dist_text_features: (b, G), L2-normalised by the teacher; constants.
            dist_logit_scale: the teacher's multiplier, a constant.
            output_dict: return {"contrastive_loss": ..., "distill_loss": ...}, not a tuple.

        Raises:
            ValueError: a teacher whose features require a gradient or do not match, and what
                `ClipLoss` raises.
            TypeError: a scale that is not a tensor.
        """
        check_features(
            dist_image_features=dist_image_features, dist_text_features=dist_text_features
        )
        check_scalars(dist_logit_scale=dist_logit_scale)
        contrastive = self.contrastive(image_features, text_features, logit_scale)
        wide = torch.promote_types(dist_image_features.dtype, torch.float32)
        # In a feature rather than as a number, for which the host would wait.
        scaled = dist_image_features.to(wide) * dist_logit_scale.to(wide)
        features = self.for_ddp(image_features, text_features)
        given = *features, scaled, dist_text_features, logit_scale
        with translate_errors(_NAMES):
            distilled: Tensor = self._distillation()(*given).loss
        if output_dict:
            return {"contrastive_loss": contrastive, "distill_loss": distilled}
        return contrastive, distilled

    def _distillation(self) -> losses.InBatchDistillationLoss:
        return losses.InBatchDistillationLoss(
            teacher_scale=1.0,
            symmetric=True,
            cross_entropy=True,
            normalize=False,
            exchange=self._contrast[0].exchange,
        )


def _check_captions(logits: Tensor, labels: Tensor) -> None:
    check_features(logits=logits)
    # Those that torch's cross-entropy takes.
    if not isinstance(labels, Tensor) or labels.dtype not in (torch.int64, torch.uint8):
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"labels: expected a tensor of int64, got {got}; convert with .long()")
    if logits.ndim != 3 or logits.shape[:2] != labels.shape:
        raise ValueError(
            f"labels: expected shape (b, L) with logits (b, L, V), got {tuple(labels.shape)} with "
            f"{tuple(logits.shape)}; pass logits[:, :-1] and the tokens text[:, 1:]"
        )
