"""The sigmoid loss of SigLIP as a module. B: all pairs, b: pairs of this rank, D: width."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from gradcache_clip.distributed.collectives import check_same_everywhere
from gradcache_clip.losses.distributed_sigmoid import distributed_sigmoid
from gradcache_clip.losses.scaled import LossOptions, ScaledLoss
from gradcache_clip.ops.results import ContrastiveOutput
from gradcache_clip.ops.siglip import checked_labels
from gradcache_clip.ops.siglip_tiled import Labels

if TYPE_CHECKING:
    from typing_extensions import Unpack


class SigLipLoss(ScaledLoss):
    """Sigmoid loss: every image-text combination is a binary classification of its own.

    With I and T the L2-normalised features and S = logit_scale * I T^T + logit_bias, the loss is
    sum_ij log(1 + exp(-z_ij S_ij)) / B, z_ij = 1 for pairs and -1 otherwise. S is never stored, and
    the gradients are computed in the same pass over its tiles: memory beyond features and gradients
    is one tile. Source: Zhai et al. 2023, "Sigmoid loss for language image pre-training",
    algorithm 1.

    The scale is learned as its logarithm, `log_logit_scale`, the bias as `logit_bias`. Where
    torch.distributed is initialised the batch is that of all ranks: each computes its share of S,
    and every rank returns the loss of the global batch. A batch may be a single pair.

    Args:
        init_logit_scale: initial multiplier of the cosine similarities (1/temperature).
        init_logit_bias: initial bias; at -10 the many negatives are classified as such.
        max_logit_scale: upper bound of the scale; none, as in the paper, when None.
        **options: `normalize=True`, `impl="auto"`, `group=None`, `exchange="gather"`; see
            `ScaledLoss`.

    Example:
        >>> import torch
        >>> from gradcache_clip import SigLipLoss
        >>> out = SigLipLoss()(torch.eye(4), torch.eye(4))
        >>> print(f"{out.loss:.4f} {out.accuracy}")
        0.6933 1.0
    """

    feature_arguments = "image_features", "text_features"

    def __init__(
        self,
        *,
        init_logit_scale: float = 10.0,
        init_logit_bias: float = -10.0,
        max_logit_scale: float | None = None,
        **options: Unpack[LossOptions],
    ) -> None:
        super().__init__(
            init_logit_scale=init_logit_scale,
            max_logit_scale=math.inf if max_logit_scale is None else max_logit_scale,
            **options,
        )
        self.logit_bias = nn.Parameter(torch.tensor(float(init_logit_bias)))

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | None = None,
        logit_bias: Tensor | None = None,
        *,
        labels: Tensor | tuple[Tensor, Tensor] | None = None,
    ) -> ContrastiveOutput:
        """Compute the loss of the whole batch; row i of both inputs is a pair unless labels differ.

        Args:
            image_features: (b, D) floating tensor, the same shape on every rank.
            text_features: (b, D) floating tensor; with a pair of labels (c, D), as when images have
                several captions. The loss is the mean over the images.
            logit_scale: a scale of the caller's own, already exponentiated, in place of the
                module's.
            logit_bias: a bias of the caller's own in place of the module's.
            labels: images and texts of equal labels, on whatever rank, are positives: (b,) integers
                for both, or a pair of them, (b,) for the images and (c,) for the texts. Given on
                every rank or on none.

        Raises:
            TypeError: features of a wrong type, or labels that are not integers.
            ValueError: shapes that do not fit together.
        """
        label_pair = self._checked(image_features, text_features, labels)
        return distributed_sigmoid(
            self._unit(image_features),
            self._unit(text_features),
            self._bounded_scale(
                logit_scale, torch.promote_types(image_features.dtype, text_features.dtype)
            ),
            self.logit_bias if logit_bias is None else logit_bias,
            label_pair,
            self.impl,
            self.ranks,
        )

    def _checked(
        self,
        image_features: Tensor,
        text_features: Tensor,
        labels: Tensor | tuple[Tensor, Tensor] | None,
    ) -> Labels | None:
        """Check everything; return the labels of all ranks."""
        pair = checked_labels(image_features, text_features, labels)
        of_images, of_texts = pair or (None, None)
        features = {"image_features": image_features, "text_features": text_features}
        given = {"labels": of_images, "labels[1]": of_texts}
        check_same_everywhere(self.group, **features, **given)
        if of_images is None or of_texts is None:
            return None
        images = self.ranks.joined(of_images)
        return images, images if of_texts is of_images else self.ranks.joined(of_texts)
