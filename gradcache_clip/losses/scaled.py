"""What the softmax losses share: a learned scale, unit features, and the rows of all ranks."""

from __future__ import annotations

import math
from functools import reduce

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from gradcache_clip.distributed.exchange import Exchange, Ranks
from gradcache_clip.ops import Impl
from gradcache_clip.ops.arguments import scalar_tensor


class ScaledLoss(nn.Module):
    """A loss over logit_scale times the (cosine) similarities of the global batch.

    The scale is learned as `log_logit_scale`, its logarithm, and held at `max_logit_scale` or
    below. Where torch.distributed is initialised the batch is that of all ranks: each computes its
    share of the matrix, and all return the loss of the global batch.

    Args:
        init_logit_scale: first value of the multiplier of the similarity (1/temperature).
        max_logit_scale: its upper bound.
        normalize: L2-normalise the features first.
        impl: "auto", "reference", "tiled" or "triton"; see `gradcache_clip.ops.clip_loss`.
        group: process group whose ranks share the batch; the default group when None. With
            `DDPStrategy` it must be the default one.
        exchange: how features of other ranks arrive: "gather" holds all of them on each rank,
            "ring" passes them on from rank to rank and never holds those of more than two others.
    """

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
        if exchange not in ("gather", "ring"):
            raise ValueError(
                f'exchange: expected "gather" or "ring", got {exchange!r}; "gather" is faster '
                "where the features of all ranks fit"
            )
        self.exchange = exchange

    @property
    def logit_scale(self) -> Tensor:
        """The multiplier of the similarity, with its graph."""
        return self.log_logit_scale.exp()

    def _bounded_scale(self, given: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The caller's own scale, or the module's within its bound, as precise as `dtype`."""
        if given is not None:
            return given
        # On the parameter itself: clamping the value would leave it without gradient at the bound.
        with torch.no_grad():
            self.log_logit_scale.clamp_(max=self.max_log_logit_scale)
        # Features in fp64 are not to meet an exponential that was rounded to fp32.
        wide = torch.promote_types(self.log_logit_scale.dtype, dtype)
        return self.log_logit_scale.to(wide).exp()

    @property
    def ranks(self) -> Ranks:
        """Who shares the batch; asked at every call, as the group may come into being later."""
        return Ranks(self.group, self.exchange)

    def _unit(self, features: Tensor) -> Tensor:
        """Of unit length where the loss normalises."""
        return unit(features) if self.normalize else features

    def _scale_for(self, given: Tensor | None, *features: Tensor) -> Tensor:
        """The scale as a tensor in the dtype of these features' logits."""
        dtype = reduce(torch.promote_types, (each.dtype for each in features))
        scale = self._bounded_scale(given, dtype)
        return scalar_tensor("logit_scale", scale, features[0].device, dtype)

    def extra_repr(self) -> str:
        return f"normalize={self.normalize}, impl={self.impl!r}"


def unit(features: Tensor) -> Tensor:
    """Unit rows; in fp16 a norm overflows at 65,504 and the guard against zero is itself zero."""
    wide = features.float() if features.dtype in (torch.float16, torch.bfloat16) else features
    return F.normalize(wide, dim=-1).to(features.dtype)


def check_rows(**features: Tensor) -> None:
    """Raise unless all are (B, D) matrices of one shape."""
    for name, given in features.items():
        if not isinstance(given, Tensor) or given.dim() != 2:
            got = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
            raise ValueError(
                f"{name}: expected a (B, D) tensor, got {got}; pool each sample to one vector"
            )
    (first, one), *others = features.items()
    for name, given in others:
        if given.shape != one.shape:
            raise ValueError(
                f"{name}: expected the shape of {first}, {tuple(one.shape)}, got "
                f"{tuple(given.shape)}; row i of both must be one pair: pass one for each, and "
                "project both to the same width"
            )


def check_has_negatives(pairs: int) -> None:
    """Raise if the batch of all ranks is a single pair."""
    if pairs < 2:
        raise ValueError(
            f"batch: expected at least 2 pairs, got {pairs}; a single pair has no "
            "negatives, so its loss and all its gradients are zero"
        )
