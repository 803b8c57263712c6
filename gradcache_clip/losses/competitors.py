"""What competes with the positive of each query, and the losses of the queries.

B queries, p_i the logit of query i with its document.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from gradcache_clip.ops.softmax import Direction, log_sum_exp, one_positive_loss

if TYPE_CHECKING:
    from jaxtyping import Float


class Competitors(NamedTuple):
    """The negatives of every query in one direction."""

    log_sum_exp: Float[Tensor, " b"]
    """Of their logits; -inf where there are none."""
    hardest: Float[Tensor, " b"]
    """The largest similarity times the scale; no gradient."""
    with_positive: bool
    """Whether the positive stands in the denominator as well."""

    @staticmethod
    def of(direction: Direction, *, with_positive: bool) -> Competitors:
        """Take the negatives of the rows, or of the columns, of a contrast."""
        return Competitors(log_sum_exp(direction), direction.hardest_negative, with_positive)

    def plus(self, bias: Float[Tensor, " b"]) -> Competitors:
        """Add a number to all logits of each row."""
        hardest = self.hardest + bias.detach()
        return self._replace(log_sum_exp=self.log_sum_exp + bias, hardest=hardest)

    def joined(self, logits: Float[Tensor, "b k"], hardest: Float[Tensor, " b"]) -> Competitors:
        """Add K logits that compete with each query."""
        both = _log_sum_exp(torch.cat((self.log_sum_exp[:, None], logits), 1))
        return self._replace(log_sum_exp=both, hardest=torch.maximum(self.hardest, hardest))


def joint_loss(positive: Tensor, directions: Sequence[Competitors]) -> Float[Tensor, " b"]:
    """Return log(Z_1 + ... + Z_n) - p, with Z_d the denominator of direction d."""
    total = _log_sum_exp(torch.stack([each.log_sum_exp for each in directions], 1))
    # log(P exp(p) + exp(N)) - p with P positives: small losses keep their digits.
    positives = math.log(sum(each.with_positive for each in directions))
    return positives + one_positive_loss(total - positive - positives)


def mean_loss(positive: Tensor, directions: Sequence[Competitors]) -> Float[Tensor, " b"]:
    """Return mean_d log Z_d - p, with the positive in each denominator."""
    losses = [one_positive_loss(each.log_sum_exp - positive) for each in directions]
    return torch.stack(losses).mean(0)


def accuracy(positive: Tensor, against: Competitors) -> Float[Tensor, ""]:
    """Return the share of queries whose positive is above all negatives; a tie is wrong."""
    return (positive.detach() > against.hardest).to(positive.dtype).mean()


def _log_sum_exp(logits: Float[Tensor, "b k"]) -> Float[Tensor, " b"]:
    """Reduce each row; where nothing competes, its gradient is zero and not NaN."""
    empty = (logits == -torch.inf).all(1)
    found = logits.masked_fill(empty[:, None], 0).logsumexp(1)
    return found.masked_fill(empty, -torch.inf)


def with_gradient_times(features: Tensor, factor: Tensor) -> Tensor:
    """Return the features, whose gradient will be multiplied by a 0-dim factor."""
    return _GradientTimes.apply(features, factor)


class _GradientTimes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, factor: Tensor) -> Tensor:
        ctx.factor = factor
        return features.view_as(features)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor.to(gradient.dtype), None
