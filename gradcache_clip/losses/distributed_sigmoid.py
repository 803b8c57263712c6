"""The share of one rank in a sigmoid loss of all ranks.

W ranks; each holds m rows q_i and n columns k_j of the M = W m rows and N = W n columns of all.

A rank computes its own rows against all columns: their part of the loss, dq, and what the scale and
the bias get. Another pass, over its own columns and the rows of the other ranks, completes dk, so
that no gradient of a feature is sent. Both run in the forward, as in one process: 8 m N D flops a
rank (less 2 m n D: its own block gives dq and dk at once) where one process alone would do 6 M N D.
Four sums and the best logits of N columns are reduced over the ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gradcache_clip.distributed.collectives import gather_rows
from gradcache_clip.distributed.exchange import Block, Ranks
from gradcache_clip.ops.arguments import scalar_tensor
from gradcache_clip.ops.implementations import Impl, refuse_transforms, resolve_impl
from gradcache_clip.ops.results import ContrastiveOutput
from gradcache_clip.ops.siglip import (
    share_right,
    siglip_loss_with_accuracy,
    sigmoid_pass,
    wanted_of,
    with_gradients,
)
from gradcache_clip.ops.siglip_tiled import Labels, SigmoidPass, Wanted

_ONLY_ROWS = Wanted(dq=True, dk=False, dlogit_scale=False, dlogit_bias=False, accuracy=False)


def distributed_sigmoid(
    q: Tensor,
    k: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    labels: Labels | None,
    impl: Impl,
    ranks: Ranks,
) -> ContrastiveOutput:
    """Compute `siglip_loss_with_accuracy` of the rows and columns of all ranks, on every rank.

    Args:
        q: (m, D) rows of this rank, as many on every rank.
        k: (n, D) columns of this rank; without labels m = n and row i belongs to column i.
        logit_scale: one element, the same on every rank; its gradient is complete on every rank.
        logit_bias: like logit_scale.
        labels: (M,) and (N,) of all ranks, or None.
        impl: "reference" gathers all features on every rank; the others share the work.
        ranks: who shares the batch, and how features travel.
    """
    dtype = torch.promote_types(q.dtype, k.dtype)
    resolved = resolve_impl(impl, q.device, dtype)
    if ranks.size == 1 or resolved == "reference":
        features = gather_rows(q, ranks.group), gather_rows(k, ranks.group)
        return siglip_loss_with_accuracy(
            *features, logit_scale, logit_bias, labels=labels, impl=impl
        )
    scale = scalar_tensor("logit_scale", logit_scale, q.device, dtype)
    bias = scalar_tensor("logit_bias", logit_bias, q.device, dtype)
    inputs = q.to(dtype), k.to(dtype), scale, bias
    refuse_transforms("siglip_loss", *inputs)
    q, k, scale, bias = (each.detach() for each in inputs)
    contrast = DistributedSigmoid(resolved, q, k, scale, bias, labels, ranks)
    found, row_accuracy, column_accuracy = contrast.result(wanted_of(*inputs, accuracy=True))
    loss = with_gradients(found.loss, inputs, found[1:5])
    return ContrastiveOutput(loss, row_accuracy, column_accuracy)


@dataclass(frozen=True)
class DistributedSigmoid:
    """One sigmoid loss of all ranks, and the share of this one."""

    impl: str
    """"tiled" or "triton"."""
    q: Tensor
    k: Tensor
    logit_scale: Tensor
    logit_bias: Tensor
    labels: Labels | None
    """Sum over all rows and columns."""
    ranks: Ranks

    def result(self, wanted: Wanted) -> tuple[SigmoidPass, Tensor, Tensor]:
        """Compute loss and gradients of the mean over all rows, and both accuracies."""
        found = self.share(wanted)
        row_best, column_best = found.row_best, found.column_best
        assert row_best is not None and column_best is not None
        scalars = found.loss, found.dlogit_scale, found.dlogit_bias, share_right(row_best)
        zero = torch.zeros_like(found.loss)
        sums = torch.stack([zero if each is None else each for each in scalars])
        loss, scale, bias, right = self.ranks.total(sums).unbind()
        column_accuracy = share_right(self.ranks.maximum(column_best))
        found = found._replace(
            loss=loss,
            dlogit_scale=scale if wanted.dlogit_scale else None,
            dlogit_bias=bias if wanted.dlogit_bias else None,
        )
        mean = found.mean(self.logit_scale, self.ranks.size * len(self.q))
        return mean, right / self.ranks.size, column_accuracy

    def share(self, wanted: Wanted) -> SigmoidPass:
        """Sum over this rank's rows; keep the best logits of all columns among these rows."""
        rows, columns = self._own
        columns_arriving = self.ranks.others(self.k)
        labels = self._labels_of(rows, columns)
        total = self._pass(self.q, self.k, labels, wanted, paired=True)
        # These travel while the columns of the others are computed.
        rows_arriving = self.ranks.others(self.q) if wanted.dk else ()
        total = self._with_columns(total, columns_arriving, wanted._replace(dk=False))
        for where, block in rows_arriving:
            labels = self._labels_of(where, columns)
            turned = None if labels is None else (labels[1], labels[0])
            _add(total.dk, self._pass(self.k, block, turned, _ONLY_ROWS).dq)
        return total

    def _with_columns(
        self, total: SigmoidPass, arriving: Iterator[Block], wanted: Wanted
    ) -> SigmoidPass:
        """Add own rows against the columns of the other ranks."""
        rows, columns = self._own
        best = {columns.start: total.column_best}
        for where, block in arriving:
            part = self._pass(self.q, block, self._labels_of(rows, where), wanted)
            best[where.start] = part.column_best
            total = _together(total, part)
        in_order = [each for _, each in sorted(best.items()) if each is not None]
        return total._replace(column_best=torch.cat(in_order, 1))

    @property
    def _own(self) -> tuple[slice, slice]:
        return self.ranks.own(len(self.q)), self.ranks.own(len(self.k))

    def _pass(
        self,
        q: Tensor,
        k: Tensor,
        labels: Labels | None,
        wanted: Wanted,
        *,
        paired: bool = False,
    ) -> SigmoidPass:
        inputs = q, k, self.logit_scale, self.logit_bias
        return sigmoid_pass(self.impl, inputs, labels, wanted, paired=paired)

    def _labels_of(self, rows: slice, columns: slice) -> Labels | None:
        if self.labels is None:
            return None
        return self.labels[0][rows], self.labels[1][columns]


def _together(total: SigmoidPass, part: SigmoidPass) -> SigmoidPass:
    """Join the same rows over other columns, in the memory of the first; dk is the first's."""
    assert total.row_best is not None and part.row_best is not None
    best = torch.maximum(total.row_best, part.row_best, out=total.row_best)
    for index in (0, 1, 3, 4):
        _add(total[index], part[index])
    return total._replace(row_best=best)


def _add(total: Tensor | None, part: Tensor | None) -> None:
    if total is not None and part is not None:
        total += part
