"""From the statistics of a contrast to losses: vectors in, vectors and means out.

For a row with one positive logit p and the log-sum-exp N of its negatives, the loss is
log(exp(p) + exp(N)) - p = softplus(N - p): small losses keep their digits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from gradcache_clip.ops.pairing import Statistics

if TYPE_CHECKING:
    from jaxtyping import Float, Int


class Direction(NamedTuple):
    """Statistics of the rows, or of the columns, of a contrast."""

    positive: Float[Tensor, " m"]
    """The positive logit; with labels the sum of the positive logits."""
    peak: Float[Tensor, " m"]
    """Maximum over what is summed: the negatives; with labels all that compete."""
    total: Float[Tensor, " m"]
    """Sum of exp(logit - peak)."""
    best: Float[Tensor, " m"]
    """The best positive or, with labels, the best of all."""
    hardest_negative: Float[Tensor, " m"]
    """The largest logit of a negative."""

    def right(self) -> Tensor:
        """Mask the rows with a positive above all negatives; a tie is wrong."""
        return self.best.detach() > self.hardest_negative

    def accuracy(self) -> Float[Tensor, ""]:
        """Return the share of rows that are right, without a gradient."""
        return self.right().to(self.positive.dtype).mean()


def rows_of(statistics: Statistics) -> Direction:
    """Return the direction in which columns compete for a row."""
    positive, peak, total, hardest_negative = statistics[:4]
    if len(hardest_negative) == 0:
        return Direction(positive, peak, total, positive, peak)
    return Direction(positive, peak, total, peak, hardest_negative)


def columns_of(statistics: Statistics) -> Direction:
    """Return the direction in which rows compete for a column, where the contrast has it.

    Without labels row i and column i are a pair; columns beyond the rows have no positive.
    """
    positive, peak, total, hardest_negative = statistics[4:]
    if len(hardest_negative) == 0:
        pairs = len(statistics.row_positive)
        positive, peak = statistics.row_positive, peak[:pairs]
        return Direction(positive, peak, total[:pairs], positive, peak)
    return Direction(positive, peak, total, peak, hardest_negative)


def log_sum_exp(direction: Direction) -> Float[Tensor, " m"]:
    """Return the logarithm of what is summed of each row; -inf where there is nothing."""
    return direction.peak + _log(direction.total)


def negative_lse_minus_positive(direction: Direction) -> Float[Tensor, " m"]:
    """Return N - p of each row; -inf where there are no negatives."""
    return (direction.peak - direction.positive) + _log(direction.total)


def one_positive_loss(negative_lse_minus_positive: Float[Tensor, " m"]) -> Float[Tensor, " m"]:
    """Return the cross-entropy of rows with one positive."""
    # Beyond the threshold softplus is linear, which is exact there in fp64 too.
    return torch.nn.functional.softplus(negative_lse_minus_positive, threshold=50.0)


def weighted_mean(
    losses: Float[Tensor, " m"], weights: Float[Tensor, " m"] | None
) -> Float[Tensor, ""]:
    """Return the mean over the rows, with weights sum_i w_i loss_i / sum_i w_i."""
    return losses.mean() if weights is None else (losses * weights).sum() / weights.sum()


def many_positives_loss(direction: Direction, positives: Int[Tensor, " m"]) -> Float[Tensor, " m"]:
    """Return the cross-entropy against a uniform target over `positives` columns; 0 for none."""
    mean_positive = direction.positive / positives.clamp_min(1)
    loss = (direction.peak + _log(direction.total)) - mean_positive
    return loss.where(positives > 0, 0)


def debiased(
    negative_lse_minus_positive: Float[Tensor, " m"],
    positive: Float[Tensor, " m"],
    negatives: Int[Tensor, " m"] | int,
    logit_scale: Float[Tensor, ""],
    tau_plus: float,
) -> Float[Tensor, " m"]:
    """Return N - p after the expected share of positives is taken out of the negatives.

    With n negatives of mean g' = mean exp(S_ij) the estimate of a true negative is
    g = max((g' - tau_plus exp(p)) / (1 - tau_plus), exp(-logit_scale)), and the result is
    log(n g) - p. Source: Chuang et al. 2020, "Debiased contrastive learning", equation 8.
    """
    number = torch.as_tensor(negatives, device=positive.device)
    count = number.clamp_min(1).to(positive.dtype).log()
    ratio = negative_lse_minus_positive - count  # log(g') - p
    tau = torch.full_like(positive, tau_plus).log()
    # Where nothing is left after the subtraction the floor holds; 1 stands in, to keep log finite.
    left = ~(ratio <= tau)  # NaN stays NaN
    inner = ratio.where(left, tau + 1)
    estimate = inner + torch.log1p(-torch.exp(tau - inner)) - torch.log1p(-torch.exp(tau))
    estimate = estimate.where(left, -torch.inf)
    result = count + torch.maximum(estimate, -logit_scale - positive)
    return result.where(number > 0, negative_lse_minus_positive)


def _log(total: Tensor) -> Tensor:
    # A sum holds exp(0) unless it is empty: the bound keeps the gradient of an empty one finite.
    return total.clamp_min(torch.finfo(total.dtype).tiny).log()
