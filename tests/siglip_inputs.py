"""Features, losses and gradients that the tests of the sigmoid loss and of its kernel share."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import clip_inputs
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    logit_scale: Tensor
    logit_bias: Tensor

    def to(self, dtype: torch.dtype) -> Inputs:
        """Leaves in another dtype; scale and bias stay fp32 unless everything becomes fp64."""
        wide = torch.promote_types(dtype, torch.float32)
        dtypes = dtype, dtype, wide, wide
        return Inputs(
            *(x.detach().to(d).requires_grad_() for x, d in zip(self, dtypes, strict=True))
        )


def random_inputs(
    B: int,
    D: int,
    dtype: torch.dtype,
    *,
    N: int | None = None,
    scale: float = 10.0,
    bias: float = -5.0,
    device: str = "cpu",
) -> Inputs:
    """Unrelated unit vectors."""
    rows = max(B, N or 0)
    q, k, logit_scale = clip_inputs.random_inputs(rows, D, dtype, scale=scale, device=device)
    inputs = Inputs(q[:B], k[: N or B], logit_scale, torch.full_like(logit_scale, bias))
    return inputs.to(dtype)


def labels_of(rows: int, kinds: int = 9, *, device: str = "cpu") -> Tensor:
    """Integers of which several are equal where there are fewer kinds than rows."""
    return torch.randint(0, kinds, (rows,), device=device)


def clustered_inputs(
    cosine: float, B: int, D: int, dtype: torch.dtype, *, device: str = "cpu"
) -> Inputs:
    """Every image against every text near one cosine, at scale 100: a gap, or a collapse."""
    inputs = clip_inputs.clustered_inputs(cosine, B, D, dtype, device=device)
    bias = torch.full_like(inputs.logit_scale, -10.0).detach().requires_grad_()
    return Inputs(*inputs, bias)


def plain_loss(q: Tensor, k: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
    """open_clip's formula, in the dtype of the features throughout."""
    logits = logit_scale.to(q.dtype) * q @ k.T + logit_bias.to(q.dtype)
    labels = 2 * torch.eye(len(q), dtype=q.dtype, device=q.device) - 1
    return -logsigmoid(labels * logits).sum() / len(q)
