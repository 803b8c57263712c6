"""The share of one rank in a contrast of all ranks, as one autograd node.

W ranks; each holds m rows q_i and n columns k_j of the M = W m rows and N = W n columns of all.

A rank computes its own rows against all columns, which completes the statistics of its rows; those
of the columns are reduced over the ranks, a few numbers each. Every rank then has the statistics of
all rows and columns, and the same loss. In the backward it computes its own rows against all
columns once more, and all rows against its own columns: the gradients of its own features are
complete without any gradient being sent. A rank does 10 m N D flops where one process alone would
do 8 M N D; in a self-contrast 6 m N D.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradcache_clip.distributed.exchange import Block, Ranks
from gradcache_clip.losses.partial_softmax import PartialSoftmax
from gradcache_clip.ops.implementations import second_derivative_refused
from gradcache_clip.ops.pairing import Gradients, Needs, SideGradient, Statistics
from gradcache_clip.ops.statistics_op import Passes


@dataclass(frozen=True)
class DistributedContrast:
    """One contrast of all ranks, and the share of this one."""

    loss: str
    passes: Passes
    pairing: Any
    """`Pairing` or `TokenRules` of all rows and columns; its shift is that within a rank."""
    ranks: Ranks
    arrived: list[Block] = field(default_factory=list)
    """Columns of other ranks, kept for the backward where all are held anyway."""

    def differentiable(
        self, q: Tensor, k: Tensor, logit_scale: Tensor, column_bias: Tensor | None = None
    ) -> Statistics:
        """Compute the statistics of all rows and columns, with a graph.

        The bias is that of the pairing, and here may require a gradient.
        """
        return Statistics(*_DistributedStatistics.apply(q, k, logit_scale, column_bias, self))

    def statistics(self, q: Tensor, k: Tensor, logit_scale: Tensor) -> Statistics:
        """Compute the statistics of all rows and columns, the same on every rank."""
        arriving, rows, columns = self.ranks.others(k), self._own(q), self._own(k)
        own = self.passes.statistics(q, k, logit_scale, self.pairing.of_block(rows, columns))
        row_side, column_sides = PartialSoftmax(*own[:4]), {columns.start: own[4:]}
        for where, block in arriving:
            rules = self._apart(rows, where)
            part = self.passes.statistics(q, block, logit_scale, rules)
            row_side = row_side.merged(PartialSoftmax(*part[:4]))
            column_sides[where.start] = part[4:]
            if self.ranks.exchange == "gather":
                self.arrived.append((where, block))
        # A ring delivers blocks in another order than that of the ranks.
        ordered = zip(*(column_sides[start] for start in sorted(column_sides)), strict=True)
        column_side = PartialSoftmax(*(torch.cat(each, -1) for each in ordered))
        return Statistics(*row_side.joined(self.ranks), *column_side.reduced(self.ranks))

    def gradient(
        self,
        q: Tensor,
        k: Tensor,
        logit_scale: Tensor,
        sides: _TwoSides,
        needs: Needs,
        dbias: Tensor | None = None,
    ) -> Gradients:
        """Compute the gradients of this rank's q and k, and of the scale over all ranks.

        Adds that of the bias of all columns, over all ranks, to `dbias` if it is there.
        """
        # Features travel while the own block is computed.
        columns_arriving = self.arrived or self.ranks.others(k)
        rows_arriving = self.ranks.others(q) if needs[1] and not self._symmetric else ()
        total = _Total(self._of_own_block(q, k, logit_scale, sides, needs, dbias))
        if needs[0] or needs[2] or dbias is not None:
            wanted = needs[0], False, needs[2]
            for where, block in columns_arriving:
                total.add(self._of_columns(q, where, block, logit_scale, sides, wanted, dbias))
        for where, block in rows_arriving:
            total.add_columns(self._of_rows(k, where, block, logit_scale, sides))
        if dbias is not None:
            self.ranks.total(dbias)
        return total.gradients(q.dtype, self.ranks)

    def _of_own_block(
        self,
        q: Tensor,
        k: Tensor,
        logit_scale: Tensor,
        sides: _TwoSides,
        needs: Needs,
        dbias: Tensor | None,
    ) -> Gradients:
        rows, columns = self._own(q), self._own(k)
        rules, of_columns = self.pairing.of_block(rows, columns), sides.columns
        own_sides = sides.rows.of(rows), of_columns and of_columns.of(columns)
        asked: Any = needs, None if dbias is None else dbias[columns], logit_scale.dtype
        return self.passes.gradient(q, k, logit_scale, rules, *own_sides, *asked)

    def _of_columns(
        self,
        q: Tensor,
        where: slice,
        block: Tensor,
        logit_scale: Tensor,
        sides: _TwoSides,
        needs: Needs,
        dbias: Tensor | None,
    ) -> Gradients:
        """Compute the gradients of own rows against columns of another rank."""
        rows = self._own(q)
        # A self-contrast has one side, through which both ranks see the pair.
        columns = sides.rows if self._symmetric else sides.columns
        rules = self._apart(rows, where)._replace(both_ways=columns is not None)
        both = sides.rows.of(rows), columns and columns.of(where)
        asked: Any = needs, None if dbias is None else dbias[where], logit_scale.dtype
        dq, _, dlogit_scale = self.passes.gradient(q, block, logit_scale, rules, *both, *asked)
        if dlogit_scale is not None and self._symmetric:
            # The other rank counts this block as well.
            dlogit_scale = dlogit_scale / 2
        return dq, None, dlogit_scale

    def _of_rows(
        self, k: Tensor, where: slice, block: Tensor, logit_scale: Tensor, sides: _TwoSides
    ) -> Tensor | None:
        """Compute the gradient of own columns against rows of another rank."""
        columns = self._own(k)
        rules = self._apart(where, columns).transposed()._replace(both_ways=True)
        own = SideGradient.zeros(sides.rows.max, len(k))
        if sides.columns is not None:
            max, dsum, dpositive = sides.columns.of(columns)
            # Without labels there are no positives here, nor gradients of any.
            own = SideGradient(max, dsum, dpositive if dpositive.numel() else own.dpositive)
        both = own, sides.rows.of(where)
        asked: Any = (True, False, False), None, logit_scale.dtype
        return self.passes.gradient(k, block, logit_scale, rules, *both, *asked)[0]

    def _apart(self, rows: slice, columns: slice) -> Any:
        """Return the rules of rows and columns of different ranks."""
        block = self.pairing.of_block(rows, columns)
        return block.without_positives(rows.stop - rows.start, columns.stop - columns.start)

    def _own(self, features: Tensor) -> slice:
        return self.ranks.own(len(features))

    @property
    def _symmetric(self) -> bool:
        return bool(self.pairing.self_contrast)


class _TwoSides(NamedTuple):
    """The backward's view of the rows and columns of all ranks."""

    rows: SideGradient
    columns: SideGradient | None
    """None unless both ways."""


class _Total:
    """Sums the gradients of blocks, which come in the dtype of the logits."""

    # What cancels between blocks would not cancel in 16-bit roundings of them.
    def __init__(self, first: Gradients) -> None:
        self.dq, self.dk, self.dlogit_scale = first

    def add(self, part: Gradients) -> None:
        """Add the gradients of own rows and of the scale."""
        for total, each in ((self.dq, part[0]), (self.dlogit_scale, part[2])):
            if total is not None and each is not None:
                total += each

    def add_columns(self, part: Tensor | None) -> None:
        """Add the gradient of own columns."""
        if self.dk is not None and part is not None:
            self.dk += part

    def gradients(self, dtype: torch.dtype, ranks: Ranks) -> Gradients:
        """Return the sums in the dtype of the features; that of the scale over all ranks."""
        dq, dk = (None if each is None else each.to(dtype) for each in (self.dq, self.dk))
        return dq, dk, None if self.dlogit_scale is None else ranks.total(self.dlogit_scale)


class _DistributedStatistics(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        logit_scale: Tensor,
        _bias: Tensor | None,
        contrast: DistributedContrast,
    ) -> tuple[Tensor, ...]:
        result = contrast.statistics(q, k, logit_scale)
        ctx.contrast = contrast
        ctx.save_for_backward(q, k, logit_scale, result.row_max, result.column_max)
        ctx.mark_non_differentiable(*result.constants)
        return tuple(result)

    @staticmethod
    def backward(ctx: Any, *doutput: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise second_derivative_refused(ctx.contrast.loss)
        q, k, logit_scale, row_max, column_max = ctx.saved_tensors
        d = Statistics(*doutput)
        rows = SideGradient(row_max, d.row_sum, d.row_positive)
        columns = None
        if ctx.contrast.pairing.both_ways:
            columns = SideGradient(column_max, d.column_sum, d.column_positive)
        sides = _TwoSides(rows, columns)
        needs = ctx.needs_input_grad[:3]
        N = ctx.contrast.ranks.size * len(k)
        dbias = logit_scale.new_zeros(N) if ctx.needs_input_grad[3] else None
        return (*ctx.contrast.gradient(q, k, logit_scale, sides, needs, dbias), dbias, None)
