"""The CLIP loss through the Triton kernels: who can run them, and how they meet autograd.

Triton is imported on first use only.
"""

from __future__ import annotations

import math
import os
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gradcache_clip.ops.clip_autograd import ClipFunction, ClipPasses, Gradients, Needs
from gradcache_clip.ops.clip_terms import ClipStatistics, SoftmaxTerms

if TYPE_CHECKING:
    from jaxtyping import Float

_OLDEST_CAPABILITY = (8, 0)


def clip_triton(
    q: Float[Tensor, "b d"], k: Float[Tensor, "b d"], logit_scale: Float[Tensor, ""]
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, row accuracy and column accuracy; memory beyond the inputs: O(B D) and a workspace."""
    passes = ClipPasses(_statistics, _gradient)
    return ClipFunction.apply(q.contiguous(), k.contiguous(), logit_scale, passes)


def triton_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot run here, or None if they can."""
    if not _triton_is_installed():
        return "triton is not installed"
    if dtype == torch.float64:
        return "the kernels have no float64"
    if device.type == "cpu":
        return _interpreter_obstacle(dtype)
    if device.type != "cuda" or torch.version.hip is not None:
        return f"the kernels need an NVIDIA GPU, the features are on {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability < _OLDEST_CAPABILITY:
        return f"the kernels need compute capability 8.0 or later, this GPU has {capability}"
    return None


@cache
def _triton_is_installed() -> bool:
    return find_spec("triton") is not None


def _interpreter_obstacle(dtype: torch.dtype) -> str | None:
    if os.environ.get("TRITON_INTERPRET", "").lower() not in ("1", "true", "on"):
        return "the features are on the CPU and Triton's interpreter is off"
    from gradcache_clip.kernels.launch_config import INTERPRETED

    if not INTERPRETED:
        return "TRITON_INTERPRET was set after the kernels had been imported"
    # Products of bfloat16 in the interpreter are silently wrong.
    return "Triton's interpreter has no bfloat16" if dtype == torch.bfloat16 else None


def _statistics(q: Tensor, k: Tensor, logit_scale: Tensor) -> ClipStatistics:
    from gradcache_clip.kernels.clip_statistics import clip_statistics

    return ClipStatistics(math.log(2), *clip_statistics(q, k, logit_scale))


def _gradient(
    q: Tensor,
    k: Tensor,
    logit_scale: Tensor,
    terms: SoftmaxTerms,
    factor: Tensor,
    needs: Needs,
) -> Gradients:
    from gradcache_clip.kernels.clip_gradient import clip_gradient

    return clip_gradient(q, k, logit_scale, terms, factor, needs)
