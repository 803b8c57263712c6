"""Statistics of the rows, or of the columns, of a contrast in parts that become one."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from gradcache_clip.distributed.exchange import Ranks

if TYPE_CHECKING:
    from jaxtyping import Float


class StatisticsSide(NamedTuple):
    """One half of `Statistics`; what a contrast lacks is empty."""

    positive: Float[Tensor, "... m"]
    max: Float[Tensor, "... m"]
    sum: Float[Tensor, "... m"]
    rival: Float[Tensor, "... m"]
    """Only with labels."""

    def merged(self, other: StatisticsSide) -> StatisticsSide:
        """The same rows over the columns of both; without labels the positives are this one's."""
        peak = torch.maximum(self.max, other.max)
        total = self._sum_relative_to(peak) + other._sum_relative_to(peak)
        if not self._labelled:
            return StatisticsSide(self.positive, peak, total, self.rival)
        rival = torch.maximum(self.rival, other.rival)
        return StatisticsSide(self.positive + other.positive, peak, total, rival)

    def joined(self, ranks: Ranks) -> StatisticsSide:
        """The rows of all ranks, one rank's after another's."""
        there = [index for index, each in enumerate(self) if each.numel() > 0]
        fields = list(self)
        for index, each in zip(
            there, ranks.joined(torch.stack([self[i] for i in there])), strict=True
        ):
            fields[index] = each
        return StatisticsSide(*fields)

    def reduced(self, ranks: Ranks) -> StatisticsSide:
        """The same rows over the columns of all ranks, each of which has seen its own."""
        if self.max.numel() == 0:
            return self
        peak, *rival = ranks.maximum(self._stacked(self.max, self.rival))
        total, *positive = ranks.total(self._stacked(self._sum_relative_to(peak), self.positive))
        fields = (positive or [self.positive])[0], peak, total, (rival or [self.rival])[0]
        return StatisticsSide(*fields)

    def _stacked(self, always: Tensor, with_labels: Tensor) -> Tensor:
        return torch.stack([always, with_labels] if self._labelled else [always])

    def _sum_relative_to(self, peak: Tensor) -> Tensor:
        # Where nothing competes there is no finite maximum to subtract.
        return self.sum * torch.exp(self.max - peak.masked_fill(peak == -torch.inf, 0))

    @property
    def _labelled(self) -> bool:
        return self.rival.numel() > 0
