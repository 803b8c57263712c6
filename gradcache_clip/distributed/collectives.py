"""Collectives that autograd can go through. b: rows of this rank, B: rows of all ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_DTYPES = (
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
)


def world_size(group: dist.ProcessGroup | None = None) -> int:
    """Number of processes in `group`; 1 where torch.distributed is not in use."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def all_gather(everyone: Tensor, mine: Tensor, group: dist.ProcessGroup | None = None) -> None:
    """Rows of all ranks, in rank order, into `everyone`."""
    _all_gather()(everyone, mine, group)


def start_all_gather(
    everyone: Tensor, mine: Tensor, group: dist.ProcessGroup | None = None
) -> dist.Work:
    """The same in the background; wait for what is returned."""
    work: dist.Work = _all_gather()(everyone, mine, group, async_op=True)
    return work


def _all_gather() -> Callable[..., Any]:
    """torch 2.13 gave it a new name and warns of the old one."""
    newer: Callable[..., Any] | None = getattr(dist, "all_gather_single", None)
    return newer or dist.all_gather_into_tensor


def gather_rows(features: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The rows of every rank, in rank order: (b, D) on each rank -> (B, D), B = world size x b.

    The backward keeps this rank's rows of the gradient and communicates nothing. That is exact
    when every rank computes the same loss over all B rows: the gradient of its own rows is then
    already complete, and parameter gradients are the sum of what the ranks contribute.

    Args:
        features: (b, ...) tensor, the same shape on every rank; integers and booleans carry no
            gradient.
        group: process group; the default group when None.

    Raises:
        ValueError: shapes or dtypes differ between the ranks (raised on every rank).
    """
    if world_size(group) == 1:
        return features
    # Its backward is no exchange: a rank may have constants.
    check_same_everywhere(group, features=features.detach())
    rows: Tensor = _GatherRows.apply(features, group)
    return rows


def with_summed_gradient(value: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The value itself, which is the same on every rank; its gradient is summed over the ranks.

    For what each rank does with its own rows alone, such as scaling their logits.
    """
    if world_size(group) == 1:
        return value
    same: Tensor = _SumGradient.apply(value, group)
    return same


def check_same_everywhere(group: dist.ProcessGroup | None = None, **given: Tensor | None) -> None:
    """Raise, on every rank, unless all ranks pass the same arguments with as many rows.

    Args:
        group: process group; the default group when None.
        given: arguments by name; at least one is a tensor. The devices wait for each other once.

    Raises:
        ValueError: an argument that some ranks lack, whose rows, width or dtype differ, or that
            requires a gradient on some ranks alone, where others would wait for an exchange.
    """
    if world_size(group) == 1:
        return
    described = [_description(each) for each in given.values()]
    device = next(each.device for each in given.values() if each is not None)
    mine = torch.tensor(described, device=device)
    theirs = mine.new_empty((world_size(group), *mine.shape))
    all_gather(theirs.flatten(0, 1), mine, group)
    for name, by_rank in zip(given, theirs.movedim(1, 0).tolist(), strict=True):
        _check_equal(name, *zip(*by_rank, strict=True))


def _description(given: Tensor | None) -> tuple[int, int, int, bool]:
    """Rows, width, dtype, and whether it requires a gradient."""
    if given is None:
        return -1, -1, -1, False
    width, dtype = math.prod(given.shape[1:]), _DTYPES.index(given.dtype)
    return len(given), width, dtype, given.requires_grad


def _check_equal(
    name: str,
    rows: Sequence[int],
    widths: Sequence[int],
    dtypes: Sequence[int],
    learned: Sequence[int],
) -> None:
    if min(dtypes) < 0 <= max(dtypes):
        lacking = [rank for rank, dtype in enumerate(dtypes) if dtype < 0]
        raise ValueError(
            f"{name}: expected it on every rank or on none, got None on ranks {lacking}; "
            "pass it everywhere"
        )
    if min(rows) != max(rows):
        raise ValueError(
            f"{name}: expected the same number of rows on every rank, got {list(rows)} by rank; "
            "drop or pad the last batch so that all ranks hold as many pairs"
        )
    if min(widths) != max(widths) or min(dtypes) != max(dtypes):
        names = [str(_DTYPES[dtype]) for dtype in dtypes]
        raise ValueError(
            f"{name}: expected the same width and dtype on every rank, got {list(widths)} and "
            f"{names} by rank; run the same model in the same precision everywhere"
        )
    if min(learned) != max(learned):
        constant = [rank for rank, each in enumerate(learned) if not each]
        raise ValueError(
            f"{name}: expected a gradient to be required on every rank or on none, got constants "
            f"on ranks {constant}; freeze the same parameters everywhere"
        )


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.start = dist.get_rank(group) * len(features)
        ctx.rows = len(features)
        gathered = features.new_empty((world_size(group) * len(features), *features.shape[1:]))
        all_gather(gathered, features.contiguous(), group)
        return gathered

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return grad_outputs[0][ctx.start : ctx.start + ctx.rows], None


class _SumGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        total = grad_outputs[0].contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None
