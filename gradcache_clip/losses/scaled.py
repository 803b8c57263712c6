"""The base of the losses: a learned scale, unit features, and the rows of all ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from typing import ClassVar, TypedDict

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gradcache_clip.distributed.exchange import Exchange, Ranks
from gradcache_clip.losses.distributed_softmax import (
    distributed_prefix_statistics,
    distributed_statistics,
)
from gradcache_clip.losses.options import check_choice, check_flags, is_number
from gradcache_clip.ops.arguments import check_widths, scalar_tensor
from gradcache_clip.ops.implementations import Impl
from gradcache_clip.ops.pairing import Pairing, Statistics
from gradcache_clip.ops.unit import unit


class LossOptions(TypedDict, total=False):
    """Keywords of every loss; see `ScaledLoss`."""

    normalize: bool
    impl: Impl
    group: dist.ProcessGroup | None
    exchange: Exchange


class ScaleOptions(LossOptions, total=False):
    """Keywords of every softmax loss; see `ScaledLoss`."""

    init_logit_scale: float
    max_logit_scale: float


class ScaledLoss(nn.Module):
    """A loss over logit_scale times the (cosine) similarities of the global batch.

    The scale is learned as its logarithm, `log_logit_scale`, and clamped to `max_logit_scale`.
    Where torch.distributed is initialised the batch is that of all ranks: each computes its share
    of the matrix, and every rank returns the loss of the global batch.

    Args:
        init_logit_scale: initial multiplier of the similarities (1/temperature).
        max_logit_scale: its upper bound; CLIP uses 100.
        normalize: L2-normalise the features first.
        impl: "auto", "reference", "tiled" or "triton"; see
            `gradcache_clip.ops.clip_loss_with_accuracy`.
        group: process group whose ranks share the batch; the default group when None. With
            `DDPStrategy` it must be the default one.
        exchange: how features of other ranks arrive: "gather" holds all of them on each rank,
            "ring" passes them from rank to rank and holds those of two others at most.
    """

    feature_arguments: ClassVar[tuple[str, ...]]
    """Arguments of `forward` that are features in training, which `MatryoshkaLoss` cuts."""

    def __init__(
        self,
        *,
        init_logit_scale: float = 1 / 0.07,
        max_logit_scale: float = 100.0,
        normalize: bool = True,
        impl: Impl = "auto",
        group: dist.ProcessGroup | None = None,
        exchange: Exchange = "gather",
    ) -> None:
        super().__init__()
        check_flags(normalize=normalize)
        numbers = is_number(init_logit_scale) and is_number(max_logit_scale)
        if not numbers or not 0 < init_logit_scale <= max_logit_scale:
            raise ValueError(
                f"init_logit_scale: expected 0 < init_logit_scale <= max_logit_scale "
                f"({max_logit_scale}), got {init_logit_scale}; CLIP starts at 1/0.07"
            )
        self.log_logit_scale = nn.Parameter(torch.tensor(math.log(init_logit_scale)))
        self.max_log_logit_scale = math.log(max_logit_scale)
        self.normalize = normalize
        self.impl = impl
        self.group = group
        check_choice("exchange", exchange, ("gather", "ring"))
        self.exchange = exchange

    @property
    def logit_scale(self) -> Tensor:
        """The multiplier of the similarities, with its graph."""
        return self.log_logit_scale.exp()

    def _bounded_scale(self, given: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Return the caller's scale, or the module's within its bound, as precise as `dtype`."""
        if given is not None:
            return given
        # On the parameter itself: clamping the value would leave it without gradient at the bound.
        with torch.no_grad():
            self.log_logit_scale.clamp_(max=self.max_log_logit_scale)
        # For features in fp64 the exponential must not be rounded to fp32.
        wide = torch.promote_types(self.log_logit_scale.dtype, dtype)
        return self.log_logit_scale.to(wide).exp()

    @property
    def ranks(self) -> Ranks:
        """Who shares the batch; read at every call, as the group may be initialised later."""
        return Ranks(self.group, self.exchange)

    def _unit(self, features: Tensor) -> Tensor:
        """Normalise where the loss does."""
        return unit(features) if self.normalize else features

    def _prepared(self, widths: Sequence[int] | None, *features: Tensor) -> list[Tensor]:
        """Normalise where the loss does; with prefixes check their widths instead."""
        if widths is None:
            return [self._unit(each) for each in features]
        # Each prefix is normalised anew, inside the op.
        check_widths("widths", widths, features[0].shape[1])
        return list(features)

    def _statistics(
        self,
        loss: str,
        q: Tensor,
        k: Tensor,
        logit_scale: Tensor,
        pairing: Pairing,
        widths: Sequence[int] | None,
    ) -> list[Statistics]:
        """Compute the statistics of the features, or of each prefix, over all ranks."""
        arguments = loss, q, k, logit_scale, pairing, self.impl, self.ranks
        if widths is None:
            return [distributed_statistics(*arguments)]
        return distributed_prefix_statistics(*arguments, widths)

    def _scale_for(self, given: Tensor | None, *features: Tensor) -> Tensor:
        """Return the scale as a tensor in the dtype of these features' logits."""
        dtype = reduce(torch.promote_types, (each.dtype for each in features))
        scale = self._bounded_scale(given, dtype)
        return scalar_tensor("logit_scale", scale, features[0].device, dtype)

    def extra_repr(self) -> str:
        return f"normalize={self.normalize}, impl={self.impl!r}"


def check_has_negatives(pairs: int) -> None:
    """Raise if the batch of all ranks is a single pair and nothing else competes."""
    if pairs < 2:
        raise ValueError(
            f"batch: expected at least 2 pairs, got {pairs}; a single pair has no "
            "negatives, so its loss and all its gradients are zero: drop the last batch of an "
            "epoch where it is that short"
        )
