"""The sigmoid loss with the whole matrix: the specification that the other implementations meet."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def siglip_reference(
    q: Float[Tensor, "m d"],
    k: Float[Tensor, "n d"],
    logit_scale: Float[Tensor, ""],
    logit_bias: Float[Tensor, ""],
    labels: tuple[Int[Tensor, " m"], Int[Tensor, " n"]] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute loss and both accuracies from the full M x N logits, in at least fp32."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    logits = logit_scale.to(dtype) * (q.to(dtype) @ k.to(dtype).T) + logit_bias.to(dtype)
    rows, columns = labels or (torch.arange(len(x), device=q.device) for x in (q, k))
    positive = rows[:, None] == columns
    loss = -logsigmoid(torch.where(positive, logits, -logits)).sum() / len(q)
    best_positive = logits.detach().masked_fill(~positive, -torch.inf)
    best_negative = logits.detach().masked_fill(positive, -torch.inf)
    row_right = best_positive.amax(1) > best_negative.amax(1)
    column_right = best_positive.amax(0) > best_negative.amax(0)
    return loss, row_right.to(dtype).mean(), column_right.to(dtype).mean()
