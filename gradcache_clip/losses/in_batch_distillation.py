"""A teacher's softmax over the documents of all ranks, matched by that of the student.

b queries on this rank, B on all, D width, G width of the teacher.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gradcache_clip.distributed.collectives import (
    check_same_everywhere,
    gather_rows,
    with_summed_gradient,
)
from gradcache_clip.losses.distillation import DistillationOutput
from gradcache_clip.losses.options import check_finite, check_flags
from gradcache_clip.losses.scaled import ScaledLoss, ScaleOptions, check_has_negatives
from gradcache_clip.losses.soft_average import soft_average
from gradcache_clip.ops.arguments import check_pairs, check_same_device
from gradcache_clip.ops.implementations import resolve_impl
from gradcache_clip.ops.info_nce import own_negative_logits
from gradcache_clip.ops.pairing import Pairing
from gradcache_clip.ops.softmax import Direction, columns_of, log_sum_exp, rows_of
from gradcache_clip.ops.unit import unit

if TYPE_CHECKING:
    from typing_extensions import Unpack

Sides = tuple[Tensor, Tensor]
"""Queries and documents, or documents and queries."""


class InBatchDistillationLoss(ScaledLoss):
    """Match a teacher's softmax over the documents of all ranks.

    With student logits S_ij = logit_scale <q_i, d_j>, a teacher's T_ij = teacher_scale <t_i, u_j>
    and their softmaxes P = softmax(T), Q = softmax(S) over j,

        loss = mean_i sum_j P_ij log(P_ij / Q_ij)

    and, if symmetric, the mean of that and of the same over i. Neither matrix is stored:
    sum_j P_ij S_ij = logit_scale <q_i, sum_j P_ij d_j>, and the average of documents is made tile
    by tile as in attention. In `MatryoshkaLoss` the teacher stays whole, and its softmax is made
    once for all widths. Sources: Hinton et al. 2015; for two towers, the affinity mimicking of Wu
    et al. 2023, "TinyCLIP".

    Args:
        teacher_scale: multiplier of the teacher's similarities, such as its own logit scale.
        symmetric: both directions.
        cross_entropy: leave the teacher's own entropy in the loss, -sum_j P_ij log Q_ij, as
            open_clip does; the gradients are the same.
        **options: `init_logit_scale=1/0.07`, `max_logit_scale=100`, `normalize=True`,
            `impl="auto"`, `group=None`, `exchange="gather"`; see `ScaledLoss`.

    Example:
        >>> import torch
        >>> from gradcache_clip.losses import InBatchDistillationLoss
        >>> rows = torch.eye(4)
        >>> loss = InBatchDistillationLoss(teacher_scale=5.0, init_logit_scale=5.0)
        >>> bool(loss(rows, rows, rows, rows).loss.abs() < 1e-6)
        True
    """

    feature_arguments = "queries", "documents"

    def __init__(
        self,
        *,
        teacher_scale: float,
        symmetric: bool = False,
        cross_entropy: bool = False,
        **options: Unpack[ScaleOptions],
    ) -> None:
        super().__init__(**options)
        check_finite("teacher_scale", teacher_scale, "pass the teacher's own logit scale")
        check_flags(symmetric=symmetric, cross_entropy=cross_entropy)
        self.teacher_scale = teacher_scale
        self.symmetric = symmetric
        self.cross_entropy = cross_entropy

    def forward(
        self,
        queries: Tensor,
        documents: Tensor,
        teacher_queries: Tensor,
        teacher_documents: Tensor,
        logit_scale: Tensor | None = None,
    ) -> DistillationOutput:
        """Compute the loss of all queries; row i of all inputs is a pair.

        Args:
            queries: (b, D) floating tensor.
            documents: (b, D) floating tensor.
            teacher_queries: (b, G), normalised where the teacher does; constants.
            teacher_documents: (b, G).
            logit_scale: a scale of the caller's own in place of the module's.

        Raises:
            TypeError: features of a wrong type.
            ValueError: shapes that do not fit together, or the whole batch is a single pair.
        """
        given = queries, documents, teacher_queries, teacher_documents
        return self.prefixes(None, *given, logit_scale)[0]

    def prefixes(
        self,
        widths: Sequence[int] | None,
        queries: Tensor,
        documents: Tensor,
        teacher_queries: Tensor,
        teacher_documents: Tensor,
        logit_scale: Tensor | None = None,
    ) -> list[DistillationOutput]:
        """Compute `forward`, or with widths that of each prefix of the student."""
        teacher = teacher_queries, teacher_documents
        check_pairs(("queries", "documents"), queries, documents)
        check_pairs(("teacher_queries", "teacher_documents"), *teacher)
        _check_teacher(*teacher, queries)
        of_student = {"queries": queries, "documents": documents}
        check_same_everywhere(self.group, **of_student, teacher_queries=teacher_queries)
        check_has_negatives(len(queries) * self.ranks.size)
        q, d = self._prepared(widths, queries, documents)
        scale = self._scale_for(logit_scale, q, d)
        pairing = Pairing(both_ways=self.symmetric)
        each = self._statistics("in_batch_distillation_loss", q, d, scale, pairing, widths)
        sides = [(q, d)] if widths is None else [(unit(q, w), unit(d, w)) for w in widths]
        rows = [rows_of(one) for one in each]
        losses = self._directions(rows, sides, teacher, scale)
        if self.symmetric:
            columns = [columns_of(one) for one in each]
            back = self._directions(columns, [(d, q) for q, d in sides], teacher[::-1], scale)
            losses = [(one + other) / 2 for one, other in zip(losses, back, strict=True)]
        agreements = [one.accuracy() for one in rows]
        return [*map(DistillationOutput, losses, agreements)]

    def _directions(
        self,
        statistics: Sequence[Direction],
        student: Sequence[Sides],
        teacher: Sides,
        scale: Tensor,
    ) -> list[Tensor]:
        """Return the mean over rows of log sum_j exp(S_ij) - sum_j P_ij (S_ij - log P_ij)."""
        expected = self._expected(student, teacher, scale)
        return [
            (torch.logaddexp(log_sum_exp(side), side.positive) - of_teacher).mean()
            for side, of_teacher in zip(statistics, expected, strict=True)
        ]

    def _expected(self, student: Sequence[Sides], teacher: Sides, scale: Tensor) -> list[Tensor]:
        """Return sum_j P_ij (S_ij - log P_ij) of all ranks' rows for each student.

        A cross-entropy leaves log P out. The teacher's softmax is made once.
        """
        values = torch.cat([columns for _, columns in student], 1)
        impl, dtype = resolve_impl(self.impl, values.device, scale.dtype), scale.dtype
        if impl == "triton" and all(each.dtype == values.dtype for each in teacher):
            dtype = values.dtype
        of_rows, of_columns = (each.to(dtype) for each in teacher)
        if impl == "reference":
            return self._reference(student, of_rows, of_columns, scale)
        factor = scale.new_full((), self.teacher_scale)
        seen = soft_average(of_rows, of_columns, values, factor, self.ranks, impl)
        averages = seen.values.split([columns.shape[1] for _, columns in student], 1)
        own_scale = with_summed_gradient(scale, self.group)
        expected = []
        for (rows, _), average in zip(student, averages, strict=True):
            logits = own_negative_logits(rows, average[:, None], own_scale)[:, 0]
            expected.append(logits if self.cross_entropy else logits - seen.negative_entropy)
        return [gather_rows(each, self.group) for each in expected]

    def _reference(
        self, student: Sequence[Sides], of_rows: Tensor, of_columns: Tensor, scale: Tensor
    ) -> list[Tensor]:
        """Return the same from whole matrices."""
        t, u = (gather_rows(each, self.group) for each in (of_rows, of_columns))
        logs = (self.teacher_scale * t @ u.T).log_softmax(1)
        expected = []
        for each in student:
            q, d = (gather_rows(side.to(scale.dtype), self.group) for side in each)
            logits = scale * q @ d.T
            expected.append((logs.exp() * (logits if self.cross_entropy else logits - logs)).sum(1))
        return expected


def _check_teacher(teacher_queries: Tensor, teacher_documents: Tensor, queries: Tensor) -> None:
    if len(teacher_queries) != len(queries):
        raise ValueError(
            f"teacher_queries: expected {len(queries)} rows as queries has, got "
            f"{len(teacher_queries)}; embed the same batch with the teacher"
        )
    if teacher_queries.requires_grad or teacher_documents.requires_grad:
        raise ValueError(
            "teacher_queries: expected constants, got features that require a gradient; embed the "
            "batch with the teacher under torch.no_grad()"
        )
    check_same_device(("queries", "teacher_queries"), queries, teacher_queries)
