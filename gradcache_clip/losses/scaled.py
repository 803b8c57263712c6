"""What the softmax losses share: a learned scale, unit features, and the rows of all ranks."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from gradcache_clip.distributed.collectives import gather_rows
from gradcache_clip.ops import Impl


class ScaledLoss(nn.Module):
    """A loss over logit_scale times the (cosine) similarities of the global batch.

    The scale is learned as `log_logit_scale`, its logarithm, and held at `max_logit_scale` or
    below. Where torch.distributed is initialised, features of all ranks are gathered and every
    rank returns the loss of the global batch.

    Args:
        init_logit_scale: first value of the multiplier of the similarity (1/temperature).
        max_logit_scale: its upper bound.
        normalize: L2-normalise the features first.
        impl: "auto", "reference", "tiled" or "triton"; see `gradcache_clip.ops.clip_loss`.
        group: process group whose ranks share the batch; the default group when None. With
            `DDPStrategy` it must be the default one.
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
        """The multiplier of the similarity, with its graph."""
        return self.log_logit_scale.exp()

    def _bounded_scale(self, given: Tensor | None) -> Tensor:
        """The caller's own scale, or the module's within its bound."""
        if given is not None:
            return given
        # On the parameter itself: clamping the value would leave it without gradient at the bound.
        with torch.no_grad():
            self.log_logit_scale.clamp_(max=self.max_log_logit_scale)
        return self.logit_scale

    def _global_features(self, features: Tensor) -> Tensor:
        """Features of all ranks, of unit length where the loss normalises."""
        return gather_rows(unit(features) if self.normalize else features, self.group)

    def _global_integers(self, values: Tensor) -> Tensor:
        """Labels or ids of all ranks."""
        return gather_rows(values, self.group)

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


def check_has_negatives(features: Tensor) -> None:
    """Raise if the whole batch is a single pair."""
    if len(features) < 2:
        raise ValueError(
            f"batch: expected at least 2 pairs, got {len(features)}; a single pair has no "
            "negatives, so its loss and all its gradients are zero"
        )
