"""The CLIP loss with the whole matrix: the specification that the other implementations meet."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

if TYPE_CHECKING:
    from jaxtyping import Float


def clip_reference(
    q: Float[Tensor, "b d"], k: Float[Tensor, "b d"], logit_scale: Float[Tensor, ""]
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, row accuracy and column accuracy from the full B x B logits, in at least fp32."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    logits = logit_scale.to(dtype) * (q.to(dtype) @ k.to(dtype).T)
    labels = torch.arange(len(q), device=q.device)
    loss = (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2
    positive = logits.detach().diagonal()
    negatives = logits.detach().clone().fill_diagonal_(-torch.inf)
    row_accuracy = (positive > negatives.amax(dim=1)).to(dtype).mean()
    column_accuracy = (positive > negatives.amax(dim=0)).to(dtype).mean()
    return loss, row_accuracy, column_accuracy
