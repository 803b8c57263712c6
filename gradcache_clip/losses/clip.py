"""The CLIP loss as a module. B: pairs of the whole batch, b: pairs of this rank, D: width."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from gradcache_clip.distributed.collectives import gather_rows
from gradcache_clip.ops import Impl, clip_loss_with_accuracy


class ContrastiveOutput(NamedTuple):
    """A loss and how often the right partner wins within the batch, all 0-dim tensors."""

    loss: Tensor
    image_to_text_accuracy: Tensor
    text_to_image_accuracy: Tensor

    @property
    def accuracy(self) -> Tensor:
        """Mean of both directions, between 0 and 1; chance is 1/B."""
        return (self.image_to_text_accuracy + self.text_to_image_accuracy) / 2


class ClipLoss(nn.Module):
    """Symmetric cross-entropy over the cosine similarities of B pairs.

    With I and T the L2-normalised features and S = logit_scale * I T^T, the loss is
    (mean_i -log softmax(S)_ii over rows + the same over columns) / 2. S is never stored: memory
    beyond features and gradients is O(B) and one tile. Source: Radford et al. 2021 (CLIP),
    figure 3.

    The scale is learned as `log_logit_scale`, its logarithm, and held at `max_logit_scale` or
    below. Where torch.distributed is initialised, features of all ranks are gathered and every
    rank returns the loss of the global batch.

    Args:
        init_logit_scale: first value of the multiplier of the cosine similarity (1/temperature).
        max_logit_scale: its upper bound; CLIP uses 100.
        normalize: L2-normalise the features first (equation 2 of the CLIP objective).
        impl: "auto", "reference", "tiled" or "triton"; see `gradcache_clip.ops.clip_loss`.
        group: process group whose ranks share the batch; the default group when None. With
            `DDPStrategy` it must be the default one.

    Example:
        >>> import torch
        >>> from gradcache_clip import ClipLoss
        >>> out = ClipLoss()(torch.eye(4), torch.eye(4))
        >>> bool(out.loss < 1e-5), float(out.accuracy)
        (True, 1.0)
    """

    def __init__(
        self,
        *,
        init_logit_scale: float = 1 / 0.07,
        max_logit_scale: float = 100.0,
        normalize: bool = True,
        impl: Impl = "auto",
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        if not 0 < init_logit_scale <= max_logit_scale:
            raise ValueError(
                f"init_logit_scale: expected 0 < init_logit_scale <= max_logit_scale "
                f"({max_logit_scale}), got {init_logit_scale}; CLIP starts at 1/0.07"
            )
        self.log_logit_scale = nn.Parameter(torch.tensor(math.log(init_logit_scale)))
        self.max_log_logit_scale = math.log(max_logit_scale)
        self.normalize = normalize
        self.impl = impl
        self.group = group

    @property
    def logit_scale(self) -> Tensor:
        """The multiplier of the cosine similarity, with its graph."""
        return self.log_logit_scale.exp()

    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor | None = None
    ) -> ContrastiveOutput:
        """Loss of all pairs; row i of both inputs belongs together.

        Args:
            image_features: (b, D) floating tensor.
            text_features: (b, D) floating tensor.
            logit_scale: a scale of the caller's own, already exponentiated, in place of the
                module's.

        Raises:
            ValueError: shapes differ, or the whole batch is a single pair.
        """
        _check_pairs(image_features, text_features)
        if logit_scale is None:
            self._clamp()
            logit_scale = self.logit_scale
        if self.normalize:
            image_features = _unit(image_features)
            text_features = _unit(text_features)
        image_features = gather_rows(image_features, self.group)
        text_features = gather_rows(text_features, self.group)
        _check_has_negatives(image_features)
        result = clip_loss_with_accuracy(image_features, text_features, logit_scale, impl=self.impl)
        return ContrastiveOutput(*result)

    def _clamp(self) -> None:
        # On the parameter itself: clamping the value would leave it without gradient at the bound.
        with torch.no_grad():
            self.log_logit_scale.clamp_(max=self.max_log_logit_scale)

    def extra_repr(self) -> str:
        return f"normalize={self.normalize}, impl={self.impl!r}"


def _unit(features: Tensor) -> Tensor:
    """Unit rows; in fp16 a norm overflows at 65,504 and the guard against zero is itself zero."""
    wide = features.float() if features.dtype in (torch.float16, torch.bfloat16) else features
    return F.normalize(wide, dim=-1).to(features.dtype)


def _check_pairs(image_features: Tensor, text_features: Tensor) -> None:
    for name, features in (("image_features", image_features), ("text_features", text_features)):
        if not isinstance(features, Tensor) or features.dim() != 2:
            got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(
                f"{name}: expected a (B, D) tensor, got {got}; pool each sample to one vector"
            )
    if image_features.shape != text_features.shape:
        raise ValueError(
            f"text_features: expected the shape of image_features, {tuple(image_features.shape)}, "
            f"got {tuple(text_features.shape)}; pass one text for each image and project both to "
            "the same width"
        )


def _check_has_negatives(image_features: Tensor) -> None:
    if len(image_features) < 2:
        raise ValueError(
            f"batch: expected at least 2 pairs, got {len(image_features)}; a single pair has no "
            "negatives, so its loss and all its gradients are zero"
        )
