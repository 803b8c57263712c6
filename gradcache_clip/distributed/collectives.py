"""Collectives that autograd can go through. b: rows of this rank, B: rows of all ranks."""

from __future__ import annotations

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
    _check_same_everywhere(features, group)
    rows: Tensor = _GatherRows.apply(features, group)
    return rows


def _check_same_everywhere(features: Tensor, group: dist.ProcessGroup | None) -> None:
    described = len(features), features[0].numel(), _DTYPES.index(features.dtype)
    mine = torch.tensor(described, device=features.device)
    theirs = mine.new_empty(world_size(group) * len(described))
    dist.all_gather_into_tensor(theirs, mine, group=group)
    rows, widths, dtypes = theirs.view(-1, len(described)).T.tolist()
    if min(rows) != max(rows):
        raise ValueError(
            f"features: expected the same number of rows on every rank, got {rows} by rank; "
            "drop or pad the last batch so that all ranks hold as many pairs"
        )
    if min(widths) != max(widths) or min(dtypes) != max(dtypes):
        names = [str(_DTYPES[dtype]) for dtype in dtypes]
        raise ValueError(
            f"features: expected the same width and dtype on every rank, got {widths} and {names} "
            "by rank; run the same model in the same precision everywhere"
        )


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.start = dist.get_rank(group) * len(features)
        ctx.rows = len(features)
        gathered = features.new_empty((world_size(group) * len(features), *features.shape[1:]))
        dist.all_gather_into_tensor(gathered, features.contiguous(), group=group)
        return gathered

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return grad_outputs[0][ctx.start : ctx.start + ctx.rows], None
