"""The softmax family through the Triton kernels, which are imported on first use only."""

from __future__ import annotations

import math

from torch import Tensor

from gradcache_clip.ops.pairing import Pairing, SideGradient, Statistics

Needs = tuple[bool, bool, bool]
Gradients = tuple["Tensor | None", "Tensor | None", "Tensor | None"]


def statistics_triton(q: Tensor, k: Tensor, logit_scale: Tensor, pairing: Pairing) -> Statistics:
    """Statistics by the tile kernel and its merges, back from units of log 2 into nats."""
    from gradcache_clip.kernels.contrast_statistics import contrast_statistics

    raise NotImplementedError(contrast_statistics, math.log(2))


def gradient_triton(
    q: Tensor,
    k: Tensor,
    logit_scale: Tensor,
    pairing: Pairing,
    rows: SideGradient,
    columns: SideGradient | None,
    needs: Needs,
) -> Gradients:
    from gradcache_clip.kernels.contrast_gradient import contrast_gradient

    raise NotImplementedError(contrast_gradient)
