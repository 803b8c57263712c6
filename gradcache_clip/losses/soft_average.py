"""The columns of all ranks averaged by a teacher's softmax, without its matrix.

"tiled" folds tiles of its logits into an online softmax; "triton" takes the statistics of a block
of columns, then their products with panels of the softmax, as the gradient of a contrast does.

m rows on this rank, M on all, n columns on this rank, N on all, D width, G width of the teacher.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from gradcache_clip.distributed.exchange import Ranks
from gradcache_clip.ops.implementations import autocast_disabled, second_derivative_refused
from gradcache_clip.ops.softmax_average import softmax_average, softmax_average_gradient
from gradcache_clip.ops.tiles import DEFAULT_TILE, Tiles

if TYPE_CHECKING:
    from jaxtyping import Float


class SoftAverage(NamedTuple):
    """What a teacher's rows see of the columns of all ranks."""

    values: Float[Tensor, "m d"]
    """sum_j P_ij v_j."""
    negative_entropy: Float[Tensor, " m"]
    """sum_j P_ij log P_ij; no gradient."""


def soft_average(
    rows: Float[Tensor, "m g"],
    columns: Float[Tensor, "n g"],
    values: Float[Tensor, "n d"],
    scale: Float[Tensor, ""],
    ranks: Ranks,
    impl: str = "tiled",
) -> SoftAverage:
    """Average the values of all ranks with P_ij = softmax_j(scale <row_i, column_j>).

    Rows, columns and scale are constants; the gradient of the values is complete on their rank.
    "triton" takes the values in the dtype of rows and columns.
    """
    with autocast_disabled(values.device):
        found = _SoftAverage.apply(values, rows, columns, scale, ranks, impl)
    return SoftAverage(*found)


class _Running:
    """An online softmax over the columns so far, and the average of their values."""

    def __init__(self, rows: Tensor, scale: Tensor, width: int) -> None:
        self.rows, self.scale = rows, scale
        self.peak = scale.new_full((len(rows),), -torch.inf)
        self.total, self.logits = self.peak.new_zeros(len(rows)), self.peak.new_zeros(len(rows))
        self.values = self.peak.new_zeros(len(rows), width)

    def fold(self, columns: Tensor, values: Tensor) -> None:
        """Add columns, tile by tile."""
        tiles = Tiles(self.rows, columns, self.scale, DEFAULT_TILE.on(columns.device))
        for stripe in tiles.stripes():
            for panel in tiles.panels():
                self._fold(tiles.logits(stripe, panel), stripe, values[panel])

    def _fold(self, tile: Tensor, stripe: slice, values: Tensor) -> None:
        before = self.peak[stripe]
        peak = torch.maximum(before, tile.amax(1))
        weights = torch.exp(tile - peak[:, None])
        kept = torch.exp(before - peak)
        self.total[stripe].mul_(kept).add_(weights.sum(1))
        self.logits[stripe].mul_(kept).add_((weights * tile).sum(1))
        self.values[stripe].mul_(kept[:, None]).addmm_(weights, values.to(weights.dtype))
        before.copy_(peak)

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the averages, sum_j P log P, and the log-sum-exp of each row."""
        lse = self.peak + self.total.log()
        return self.values / self.total[:, None], self.logits / self.total - lse, lse


class _Merged:
    """The same from whole blocks of columns, each by the kernels."""

    def __init__(self, rows: Tensor, scale: Tensor, width: int) -> None:
        self.rows, self.scale = rows, scale
        self.lse = scale.new_full((len(rows),), -torch.inf)
        self.logits, self.values = scale.new_zeros(len(rows)), scale.new_zeros(len(rows), width)

    def fold(self, columns: Tensor, values: Tensor) -> None:
        """Add a block of columns."""
        average, logits, lse = softmax_average(self.rows, columns, values, self.scale)
        both = torch.logaddexp(self.lse, lse)
        before, now = torch.exp(self.lse - both), torch.exp(lse - both)
        self.logits = self.logits * before + logits * now
        self.values = self.values * before[:, None] + average * now[:, None]
        self.lse = both

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the averages, sum_j P log P, and the log-sum-exp of each row."""
        return self.values, self.logits - self.lse, self.lse


_FOLD: dict[str, type[_Running] | type[_Merged]] = {"tiled": _Running, "triton": _Merged}


class _SoftAverage(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        rows: Tensor,
        columns: Tensor,
        scale: Tensor,
        ranks: Ranks,
        impl: str,
    ) -> tuple[Tensor, Tensor]:
        # In the wider dtype of both, to which `cat` takes them.
        arriving = ranks.others(torch.cat((columns, values), 1))
        running, G = _FOLD[impl](rows, scale, values.shape[1]), columns.shape[1]
        running.fold(columns, values)
        for _, block in arriving:
            running.fold(block[:, :G], block[:, G:])
        average, negative_entropy, lse = running.result()
        ctx.save_for_backward(rows, columns, scale, lse)
        ctx.ranks, ctx.dtype, ctx.impl = ranks, values.dtype, impl
        ctx.mark_non_differentiable(negative_entropy)
        return average, negative_entropy

    @staticmethod
    def backward(ctx: Any, daverage: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise second_derivative_refused("soft_average")
        with autocast_disabled(daverage.device):
            dvalues = _gradient_of_values(daverage, ctx.ranks, ctx.impl, *ctx.saved_tensors)
        return dvalues.to(ctx.dtype), None, None, None, None, None


def _gradient_of_values(
    daverage: Tensor,
    ranks: Ranks,
    impl: str,
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    lse: Tensor,
) -> Tensor:
    """Compute sum_i P_ij daverage_i over the rows of all ranks."""
    dvalues, G = daverage.new_zeros(len(columns), daverage.shape[1]), rows.shape[1]
    own = torch.cat((rows.to(daverage.dtype), daverage, lse[:, None]), 1)
    for block in _own_and_others(own, ranks):
        of_rows, d, of_lse = block[:, :G].to(rows.dtype), block[:, G:-1], block[:, -1]
        if impl == "triton":
            dvalues += softmax_average_gradient(of_rows, columns, scale, of_lse, d)
        else:
            shape = DEFAULT_TILE.on(columns.device)
            _add_tiles(dvalues, Tiles(of_rows, columns, scale, shape), of_lse, d)
    return dvalues


def _add_tiles(dvalues: Tensor, tiles: Tiles, lse: Tensor, daverage: Tensor) -> None:
    for stripe in tiles.stripes():
        for panel in tiles.panels():
            weights = tiles.logits(stripe, panel).sub_(lse[stripe, None]).exp_()
            dvalues[panel].addmm_(weights.T, daverage[stripe])


def _own_and_others(own: Tensor, ranks: Ranks) -> Iterator[Tensor]:
    arriving = ranks.others(own)
    yield own
    for _, block in arriving:
        yield block
