"""Counts and sums over rows that share a number, without a synchronisation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def occurrences(values: Int[Tensor, " m"], among: Int[Tensor, " n"]) -> Int[Tensor, " m"]:
    """Count how often each of `values` occurs in `among`."""
    # Any integers, in the shape of `values`: bincount and unique would wait for the device.
    ordered = among.sort().values
    last = torch.searchsorted(ordered, values, right=True)
    return last - torch.searchsorted(ordered, values)


def dense_groups(*values: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Number the rows from 0 to n - 1, with equal numbers where all of `values` are equal."""
    group = torch.zeros_like(values[0], dtype=torch.int64)
    for each in values:
        ranks = _ranks(each)
        # A pair of numbers below n as one number; its rank is below n again.
        group = _ranks(group * len(each) + ranks)
    return group


def group_sums(features: Float[Tensor, "n d"], group: Int[Tensor, " n"]) -> Float[Tensor, "n d"]:
    """Return for each row the sum over its group, accumulated in a fixed order."""
    zeros = torch.zeros_like(features)
    # index_put sorts before it adds; index_add would add in any order on a GPU.
    return zeros.index_put((group,), features, accumulate=True)[group]


def _ranks(values: Tensor) -> Tensor:
    ordered, order = values.sort()
    steps = torch.zeros_like(order)
    steps[1:] = (ordered[1:] != ordered[:-1]).to(order.dtype)
    return torch.empty_like(order).scatter(0, order, steps.cumsum(0))
