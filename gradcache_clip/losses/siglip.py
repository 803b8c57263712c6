"""The sigmoid loss of SigLIP as a module. B: all pairs, b: pairs of this rank, D: width."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gradcache_clip.distributed.collectives import check_same_everywhere
from gradcache_clip.distributed.exchange import Exchange
from gradcache_clip.losses.clip import ContrastiveOutput
from gradcache_clip.losses.scaled import ScaledLoss
from gradcache_clip.losses.spread_sigmoid import sigmoid_over_ranks
from gradcache_clip.ops.implementations import Impl
from gradcache_clip.ops.siglip import checked_labels
from gradcache_clip.ops.siglip_tiled import Labels


class SigLipLoss(ScaledLoss):
    """Every image against every text as a decision of its own: do the two belong together?

    With I and T the L2-normalised features and S = logit_scale * I T^T + logit_bias, the loss is
    sum_ij log(1 + exp(-z_ij S_ij)) / B, z_ij = 1 for pairs and -1 otherwise. S is never stored, and
    the gradients are computed in the same pass over its tiles: memory beyond features and gradients
    is one tile. Source: Zhai et al. 2023, "Sigmoid loss for language image pre-training",
    algorithm 1.

    The scale is learned as `log_logit_scale`, its logarithm, the bias as `logit_bias`. Where
    torch.distributed is initialised the batch is that of all ranks: each computes its share of S,
    and every rank returns the loss of the global batch. A single pair is a batch like any other.

    Args:
        init_logit_scale: first value of the multiplier of the cosine similarity (1/temperature).
        init_logit_bias: first value of the bias; at -10 the many negatives start out as such.
        max_logit_scale: upper bound of the scale; none, as in the paper, when None.
        normalize: L2-normalise the features first.
        impl: "auto", "reference", "tiled" or "triton"; see `gradcache_clip.ops.siglip_loss`.
        group: process group whose ranks share the batch; the default group when None. With
            `DDPStrategy` it must be the default one.
        exchange: "gather" or "ring": how features of other ranks arrive; see `ClipLoss`.

    Example:
        >>> import torch
        >>> from gradcache_clip import SigLipLoss
        >>> out = SigLipLoss()(torch.eye(4), torch.eye(4))
        >>> print(f"{out.loss:.4f} {out.accuracy}")
        0.6933 1.0
    """

    def __init__(
        self,
        *,
        init_logit_scale: float = 10.0,
        init_logit_bias: float = -10.0,
        max_logit_scale: float | None = None,
        normalize: bool = True,
        impl: Impl = "auto",
        group: dist.ProcessGroup | None = None,
        exchange: Exchange = "gather",
    ) -> None:
        super().__init__(
            init_logit_scale=init_logit_scale,
            max_logit_scale=math.inf if max_logit_scale is None else max_logit_scale,
            normalize=normalize,
            impl=impl,
            group=group,
            exchange=exchange,
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
        """Loss of the whole batch; row i of both inputs belongs together unless labels say else.

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
            TypeError: features of a wrong type, or labels that are no integers.
            ValueError: shapes that do not fit together.
        """
        label_pair = self._checked(image_features, text_features, labels)
        result = sigmoid_over_ranks(
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
        return ContrastiveOutput(*result)

    def _checked(
        self,
        image_features: Tensor,
        text_features: Tensor,
        labels: Tensor | tuple[Tensor, Tensor] | None,
    ) -> Labels | None:
        """Labels of all ranks, after checks of everything."""
        pair = checked_labels(image_features, text_features, labels)
        of_images, of_texts = pair or (None, None)
        features = {"image_features": image_features, "text_features": text_features}
        given = {"labels": of_images, "labels[1]": of_texts}
        check_same_everywhere(self.group, **features, **given)
        if of_images is None or of_texts is None:
            return None
        images = self.ranks.joined(of_images)
        return images, images if of_texts is of_images else self.ranks.joined(of_texts)
