"""Statistics over part of a contrast, and how the parts become one."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from gradcache_clip.distributed.exchange import Ranks

if TYPE_CHECKING:
    from jaxtyping import Float


class PartialSoftmax(NamedTuple):
    """The row half, or the column half, of `Statistics`; what a contrast lacks is empty."""

    positive: Float[Tensor, "... m"]
    max: Float[Tensor, "... m"]
    sum: Float[Tensor, "... m"]
    hardest_negative: Float[Tensor, "... m"]
    """Only with labels."""

    def merged(self, other: PartialSoftmax) -> PartialSoftmax:
        """Join the same rows over other columns; without labels the positives are this one's."""
        peak = torch.maximum(self.max, other.max)
        total = self._sum_relative_to(peak) + other._sum_relative_to(peak)
        if not self._labelled:
            return PartialSoftmax(self.positive, peak, total, self.hardest_negative)
        hardest = torch.maximum(self.hardest_negative, other.hardest_negative)
        return PartialSoftmax(self.positive + other.positive, peak, total, hardest)

    def joined(self, ranks: Ranks) -> PartialSoftmax:
        """Gather the rows of all ranks, in rank order."""
        # One collective for all fields that are there.
        there = [index for index, each in enumerate(self) if each.numel() > 0]
        fields = list(self)
        for index, each in zip(
            there, ranks.joined(torch.stack([self[i] for i in there])), strict=True
        ):
            fields[index] = each
        return PartialSoftmax(*fields)

    def reduced(self, ranks: Ranks) -> PartialSoftmax:
        """Merge the same rows over all ranks, each of which has seen its own columns."""
        if self.max.numel() == 0:
            return self
        peak, *hardest = ranks.maximum(self._stacked(self.max, self.hardest_negative))
        total, *positive = ranks.total(self._stacked(self._sum_relative_to(peak), self.positive))
        first, last = (positive or [self.positive])[0], (hardest or [self.hardest_negative])[0]
        return PartialSoftmax(first, peak, total, last)

    def _stacked(self, always: Tensor, with_labels: Tensor) -> Tensor:
        return torch.stack([always, with_labels] if self._labelled else [always])

    def _sum_relative_to(self, peak: Tensor) -> Tensor:
        # Where nothing competes there is no finite maximum to subtract.
        return self.sum * torch.exp(self.max - peak.masked_fill(peak == -torch.inf, 0))

    @property
    def _labelled(self) -> bool:
        return self.hardest_negative.numel() > 0
