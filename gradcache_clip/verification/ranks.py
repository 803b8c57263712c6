"""Collectives of a verification, which no strategy takes part in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gradcache_clip.distributed.collectives import world_size


def of_all_ranks(value: Any) -> list[Any]:
    """A small object of every rank, in rank order."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def on_any_rank(flag: bool) -> bool:
    return any(of_all_ranks(flag))


@torch.no_grad()
def sum_over_ranks(parameters: Sequence[nn.Parameter]) -> None:
    """Sum `.grad` over the ranks; None counts as zero unless every rank has None."""
    if world_size() == 1:
        return
    by_rank = of_all_ranks([parameter.grad is not None for parameter in parameters])
    for parameter, has in zip(parameters, zip(*by_rank, strict=True), strict=True):
        if any(has):
            total = _dense_gradient(parameter)
            dist.all_reduce(total)
            parameter.grad = total


def _dense_gradient(parameter: nn.Parameter) -> Tensor:
    gradient = parameter.grad
    if gradient is None:
        return torch.zeros_like(parameter)
    return (gradient.to_dense() if gradient.is_sparse else gradient).contiguous()
