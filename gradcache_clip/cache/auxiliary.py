"""The loss of a step: that of the features, and the weighted losses of the encoders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree

from gradcache_clip.cache.checks import check_loss_arguments, check_loss_graph, loss_in
from gradcache_clip.cache.outputs import WithLosses
from gradcache_clip.cache.settings import Settings


class LossOnly(NamedTuple):
    """Result of a step whose loss function returns a bare tensor."""

    loss: Tensor


class AuxiliaryOutput(NamedTuple):
    """Result of a step whose encoders return losses of their own."""

    loss: Tensor
    """What is minimised: the loss of the features and the weighted auxiliary losses."""
    output: Any
    """What the loss function returned."""
    auxiliary: dict[str, Tensor]
    """Each auxiliary loss by name, without its weight: the mean over all rows of all ranks,
    summed over the encoders that return it."""


def evaluate(plan: Settings, features: Sequence[Any], loss_kwargs: Mapping[str, Any]) -> Any:
    """Evaluate the loss on the features of all rows, and add the auxiliary losses.

    Raises:
        ValueError: no encoder returns a loss that has a weight; on every rank. An argument asks for
            a gradient that the strategy does not reduce.
    """
    check_loss_arguments(plan.strategy, loss_kwargs)
    if not plan.auxiliary_losses:
        return plan.loss(*features, **loss_kwargs)
    losses = [given.losses if isinstance(given, WithLosses) else {} for given in features]
    plain = [given.features if isinstance(given, WithLosses) else given for given in features]
    means = _means(plan, losses, pytree.tree_leaves(features)[0])
    output = plan.loss(*plain, **loss_kwargs)
    loss = loss_in(output, plan.loss_key)
    for name, weight in plan.auxiliary_losses.items():
        loss = loss + weight * means[name].to(loss.device)
    return AuxiliaryOutput(loss, output, means)


def _means(
    plan: Settings, losses: Sequence[Mapping[str, Tensor]], like: Tensor
) -> dict[str, Tensor]:
    """Average over the rows of all ranks, and sum over encoders."""
    # As many numbers on every rank, also where a rank lacks a loss.
    columns = [(name, given.get(name)) for name in plan.auxiliary_losses for given in losses]
    table = torch.stack([_sum_and_rows(loss, like) for _, loss in columns])
    if plan.strategy.talks:
        plan.strategy.meet()
        # In one precision on every rank, whatever the losses of a rank have.
        table = _SumOverRanks.apply(table.double()).to(table.dtype)
        _check_everywhere([name for name, _ in columns], table[:, 2].tolist())
    means: dict[str, Tensor] = {}
    for (name, loss), (total, rows, _) in zip(columns, table, strict=True):
        if loss is not None:
            means[name] = total / rows + means.get(name, 0)
    if missing := [name for name in plan.auxiliary_losses if name not in means]:
        raise ValueError(
            f"auxiliary_losses: expected names of 0-dim tensors in the dict that an encoder "
            f"returns, got {missing[0]!r}, which none returns; return it, or leave it out"
        )
    return means


def _sum_and_rows(loss: Tensor | None, like: Tensor) -> Tensor:
    """Also 1 if there is a loss; (3,) on the device of `like`."""
    if loss is None:
        return torch.zeros(3, device=like.device)
    counts = loss.new_full((), len(loss)), loss.new_ones(())
    return torch.stack([loss.sum(), *counts]).to(like.device)


def _check_everywhere(names: Sequence[str], found: Sequence[float]) -> None:
    for name, count in zip(names, found, strict=True):
        if 0 < count < dist.get_world_size():
            raise ValueError(
                f"auxiliary_losses: expected {name!r} from an encoder on every rank, got it on "
                f"{count:.0f} of {dist.get_world_size()}; return a zero where there is none"
            )


def minimised(plan: Settings, output: Any) -> Tensor:
    """Return the scalar whose backward a step takes, and check that it has a graph."""
    loss = loss_of(plan, output)
    check_loss_graph(loss)
    return loss


def loss_of(plan: Settings, output: Any) -> Tensor:
    """Take the loss out of the result of a step, or of what the loss function returned."""
    if isinstance(output, (AuxiliaryOutput, LossOnly)):
        return output.loss
    return loss_in(output, plan.loss_key)


class _SumOverRanks(torch.autograd.Function):
    """Sum whose gradient stays: every rank computes the same loss, of which its rows are a part."""

    @staticmethod
    def forward(ctx: Any, table: Tensor) -> Tensor:
        total = table.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]
