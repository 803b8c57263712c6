"""Losses that teach a pair of encoders what a teacher thinks of the candidates.

b queries on this rank, B on all, K hard negatives of each query, D width, G width of the teacher.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from gradcache_clip.distributed.collectives import (
    check_same_everywhere,
    gather_rows,
    with_summed_gradient,
)
from gradcache_clip.losses.retrieval_arguments import negatives_of
from gradcache_clip.losses.scaled import ScaledLoss, ScaleOptions, check_has_negatives
from gradcache_clip.losses.soft_average import soft_average
from gradcache_clip.ops.arguments import check_floating, check_pairs, check_same_device
from gradcache_clip.ops.implementations import resolve_impl
from gradcache_clip.ops.info_nce import own_negative_logits
from gradcache_clip.ops.pairing import Pairing
from gradcache_clip.ops.softmax import columns_of, log_sum_exp, rows_of

if TYPE_CHECKING:
    from jaxtyping import Float
    from typing_extensions import Unpack

Objective = Literal["kl", "margin_mse"]
_OBJECTIVES = "kl", "margin_mse"


class DistillationOutput(NamedTuple):
    """The loss of queries over candidates, and how often both prefer the same one."""

    loss: Tensor
    agreement: Tensor
    """Share of the queries whose document ranks first in the batch, as for `RetrievalOutput`; of
    `ScoreDistillationLoss`, those whose best candidate is the teacher's. No gradient."""


class ScoreDistillationLoss(ScaledLoss):
    """Match given scores of each query's own candidates, over the queries of all ranks.

    With student logits S_i = logit_scale <q_i, [d_i, n_i1 ... n_iK]> and scores T_i,

        kl:         mean_i KL(softmax(teacher_scale T_i) || softmax(S_i))
        margin_mse: mean_ik ((S_i0 - S_ik) - teacher_scale (T_i0 - T_ik))^2

    Sources: Hinton et al. 2015, "Distilling the knowledge in a neural network"; Hofstätter et al.
    2020, "Improving efficient neural ranking models with cross-architecture knowledge
    distillation" (MarginMSE).

    Args:
        objective: "kl" or "margin_mse".
        teacher_scale: multiplier of the scores.
        **options: `init_logit_scale=1/0.07`, `max_logit_scale=100`, `normalize=True`, `group=None`;
            see `ScaledLoss`. There are no tiles, so impl and exchange have no effect.

    Example:
        >>> import torch
        >>> from gradcache_clip.losses import ScoreDistillationLoss
        >>> queries, documents = torch.eye(2), torch.eye(2)
        >>> scores = torch.tensor([[9.0, 1.0], [9.0, 1.0]])
        >>> loss = ScoreDistillationLoss("margin_mse", init_logit_scale=8.0)
        >>> loss(queries, documents, torch.zeros(2, 1, 2), scores).loss.item()
        0.0
    """

    def __init__(
        self,
        objective: Objective = "kl",
        *,
        teacher_scale: float = 1.0,
        **options: Unpack[ScaleOptions],
    ) -> None:
        super().__init__(**options)
        check_objective(objective)
        self.objective = objective
        self.teacher_scale = teacher_scale

    def forward(
        self,
        queries: Tensor,
        documents: Tensor,
        hard_negatives: Tensor,
        scores: Tensor,
        logit_scale: Tensor | None = None,
        *,
        negatives_per_query: int | None = None,
    ) -> DistillationOutput:
        """Compute the loss of all queries.

        Args:
            queries: (b, D) floating tensor.
            documents: (b, D) floating tensor.
            hard_negatives: (b, K, D), or (b*K, D) with negatives_per_query=K.
            scores: (b, 1 + K), the teacher's of the document and of each hard negative; constants.
            logit_scale: a scale of the caller's own in place of the module's.
            negatives_per_query: K of hard negatives that are a matrix.

        Raises:
            TypeError: features or scores of a wrong type.
            ValueError: shapes that do not fit together.
        """
        negatives = negatives_of(queries, documents, hard_negatives, negatives_per_query)
        if negatives is None:
            raise ValueError("hard_negatives: expected some, got None; scores compare candidates")
        check_scores(scores, ("queries", queries), (len(queries), 1 + negatives.shape[1]))
        check_same_everywhere(self.group, queries=queries, negatives=negatives, scores=scores)
        queries, documents, negatives = self._prepared(None, queries, documents, negatives)
        scale = self._scale_for(logit_scale, queries, documents, negatives)
        candidates = torch.cat((documents[:, None], negatives), 1)
        logits = own_negative_logits(queries, candidates, with_summed_gradient(scale, self.group))
        student = gather_rows(logits, self.group)
        teacher = self.ranks.joined(scores.to(scale.dtype).T).T * self.teacher_scale
        return score_distillation(self.objective, student, teacher)


class InBatchDistillationLoss(ScaledLoss):
    """Match a teacher's softmax over the documents of all ranks.

    With student logits S_ij = logit_scale <q_i, d_j>, a teacher's T_ij = teacher_scale <t_i, u_j>
    and their softmaxes P = softmax(T), Q = softmax(S) over j,

        loss = mean_i sum_j P_ij log(P_ij / Q_ij)

    and, if symmetric, the mean of that and of the same over i. Neither matrix is stored:
    sum_j P_ij S_ij = logit_scale <q_i, sum_j P_ij d_j>, and the average of documents is made tile
    by tile as in attention. Sources: Hinton et al. 2015; for two towers, the affinity mimicking of
    Wu et al. 2023, "TinyCLIP".

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

    def __init__(
        self,
        *,
        teacher_scale: float,
        symmetric: bool = False,
        cross_entropy: bool = False,
        **options: Unpack[ScaleOptions],
    ) -> None:
        super().__init__(**options)
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
        check_pairs(("queries", "documents"), queries, documents)
        check_pairs(("teacher_queries", "teacher_documents"), teacher_queries, teacher_documents)
        _check_teacher(teacher_queries, teacher_documents, queries)
        check_same_everywhere(self.group, queries=queries, teacher_queries=teacher_queries)
        check_has_negatives(len(queries) * self.ranks.size)
        queries, documents = self._prepared(None, queries, documents)
        scale = self._scale_for(logit_scale, queries, documents)
        pairing = Pairing(both_ways=self.symmetric)
        name = "in_batch_distillation_loss"
        (statistics,) = self._statistics(name, queries, documents, scale, pairing, None)
        rows = rows_of(statistics)
        teacher = teacher_queries, teacher_documents
        loss = self._direction(log_sum_exp(rows), rows.positive, queries, documents, teacher, scale)
        if self.symmetric:
            back, turned = log_sum_exp(columns_of(statistics)), teacher[::-1]
            other = self._direction(back, rows.positive, documents, queries, turned, scale)
            loss = (loss + other) / 2
        return DistillationOutput(loss, rows.accuracy())

    def _direction(
        self,
        negative_lse: Tensor,
        positive: Tensor,
        rows: Tensor,
        columns: Tensor,
        teacher: tuple[Tensor, ...],
        scale: Tensor,
    ) -> Tensor:
        """Return the mean over rows of log sum_j exp(S_ij) - sum_j P_ij (S_ij - log P_ij)."""
        impl, dtype = resolve_impl(self.impl, columns.device, scale.dtype), scale.dtype
        if impl == "triton" and all(each.dtype == columns.dtype for each in teacher):
            dtype = columns.dtype
        of_rows, of_columns = (each.to(dtype) for each in teacher)
        given = rows, columns, of_rows, of_columns
        if impl == "reference":
            expected = self._reference(scale, *(gather_rows(each, self.group) for each in given))
        else:
            expected = self._in_tiles(impl, scale, *given)
        return (torch.logaddexp(negative_lse, positive) - expected).mean()

    def _in_tiles(
        self,
        impl: str,
        scale: Tensor,
        rows: Tensor,
        columns: Tensor,
        of_rows: Tensor,
        of_columns: Tensor,
    ) -> Tensor:
        """Return sum_j P_ij (S_ij - log P_ij) of all ranks' rows, each rank's by itself.

        A cross-entropy leaves log P out.
        """
        factor = scale.new_tensor(self.teacher_scale)
        seen = soft_average(of_rows, of_columns, columns, factor, self.ranks, impl)
        own_scale = with_summed_gradient(scale, self.group)
        logits = own_negative_logits(rows, seen.values[:, None], own_scale)[:, 0]
        expected = logits if self.cross_entropy else logits - seen.negative_entropy
        return gather_rows(expected, self.group)

    def _reference(
        self, scale: Tensor, rows: Tensor, columns: Tensor, of_rows: Tensor, of_columns: Tensor
    ) -> Tensor:
        """Return the same from whole matrices."""
        logs = (self.teacher_scale * of_rows @ of_columns.T).log_softmax(1)
        student = scale * rows.to(scale.dtype) @ columns.to(scale.dtype).T
        return (logs.exp() * (student if self.cross_entropy else student - logs)).sum(1)


def score_distillation(
    objective: Objective, student: Float[Tensor, "b c"], teacher: Float[Tensor, "b c"]
) -> DistillationOutput:
    """Match the logits of all queries with their own candidates, of which the first is right."""
    agreement = (student.argmax(1) == teacher.argmax(1)).to(student.dtype).mean()
    if objective == "margin_mse":
        margins = [each[:, :1] - each[:, 1:] for each in (student, teacher)]
        return DistillationOutput((margins[0] - margins[1]).square().mean(), agreement)
    # Not of logarithms: a score of -inf leaves its candidate out.
    loss = kl_div(student.log_softmax(1), teacher.softmax(1), reduction="batchmean")
    return DistillationOutput(loss, agreement)


def check_objective(objective: str) -> None:
    if objective not in _OBJECTIVES:
        raise ValueError(f"objective: expected kl or margin_mse, got {objective!r}")


def check_scores(scores: Tensor, beside: tuple[str, Tensor], shape: tuple[int, int]) -> None:
    """Raise unless they are constants, one for each candidate, on the device of the features."""
    check_floating("scores", scores)
    if tuple(scores.shape) != shape or scores.requires_grad:
        raise ValueError(
            f"scores: expected constants of shape {shape}, got {tuple(scores.shape)}"
            f"{' that require a gradient' if scores.requires_grad else ''}; one for the document "
            "and for each hard negative of a query"
        )
    check_same_device((beside[0], "scores"), beside[1], scores)


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
