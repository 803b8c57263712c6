"""From the statistics of the negatives to loss, accuracies and what the backward needs.

Every implementation leaves the positive out of its sums, so that a small loss keeps its digits:
loss_i = log(1 + exp(neg_lse_i - positive_i)) instead of the difference of two large numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float


class ClipStatistics(NamedTuple):
    """What one pass over the logits leaves: diagonal, and (max, sum of exp) of the negatives.

    Logits and maxima count in units of `nats` nats: log 2 where the exponential is exp2.
    """

    nats: float
    positive_logit: Float[Tensor, " b"]
    row_max: Float[Tensor, " b"]
    row_sum: Float[Tensor, " b"]
    column_max: Float[Tensor, " b"]
    column_sum: Float[Tensor, " b"]


class ClipSummary(NamedTuple):
    """What the caller sees: three 0-dim tensors."""

    loss: Float[Tensor, ""]
    row_accuracy: Float[Tensor, ""]
    column_accuracy: Float[Tensor, ""]


class SoftmaxTerms(NamedTuple):
    """What the backward needs to write G = 2B dloss/dS, in the units of the statistics.

    Off the diagonal G_ij = exp(S_ij - shift - row_lse_i) + exp(S_ij - shift - column_lse_j). The
    shift takes the common size out of the log-sum-exps: they would be rounded at that size, and the
    error would be the same all along a row, where nothing cancels it.
    """

    shift: Float[Tensor, ""]
    row_lse: Float[Tensor, " b"]
    column_lse: Float[Tensor, " b"]
    positive_gradient: Float[Tensor, " b"]


def clip_terms(statistics: ClipStatistics) -> tuple[ClipSummary, SoftmaxTerms]:
    """Loss and rank-1 accuracies (ties are wrong), and the vectors of the backward."""
    nats, positive, row_max, row_sum, column_max, column_sum = statistics
    row_loss = _softplus(nats * (row_max - positive) + row_sum.log())
    column_loss = _softplus(nats * (column_max - positive) + column_sum.log())
    summary = ClipSummary(
        loss=(row_loss.mean() + column_loss.mean()) / 2,
        row_accuracy=(positive > row_max).to(positive.dtype).mean(),
        column_accuracy=(positive > column_max).to(positive.dtype).mean(),
    )
    shift = torch.maximum(positive, row_max).mean()
    terms = SoftmaxTerms(
        shift=shift,
        row_lse=positive - shift + row_loss / nats,
        column_lse=positive - shift + column_loss / nats,
        # P_ii - 1 = exp(-loss_i) - 1 keeps its digits where P_ii rounds to one.
        positive_gradient=torch.expm1(-row_loss) + torch.expm1(-column_loss),
    )
    return summary, terms


def _softplus(x: Tensor) -> Tensor:
    return torch.logaddexp(x, torch.zeros_like(x))
