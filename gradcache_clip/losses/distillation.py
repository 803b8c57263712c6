"""A teacher's scores of each query's own candidates, matched by similarities.

b queries on this rank, K hard negatives of each, D width.
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
from gradcache_clip.losses.options import check_choice, check_finite
from gradcache_clip.losses.retrieval_arguments import negatives_of
from gradcache_clip.losses.scaled import ScaledLoss, ScaleOptions
from gradcache_clip.ops.arguments import check_floating, check_same_device
from gradcache_clip.ops.info_nce import own_negative_logits

if TYPE_CHECKING:
    from jaxtyping import Float
    from typing_extensions import Unpack

Objective = Literal["kl", "margin_mse"]


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

    In `MatryoshkaLoss` the scores stay whole, and every width of the student must match them.
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

    feature_arguments = "queries", "documents", "hard_negatives"

    def __init__(
        self,
        objective: Objective = "kl",
        *,
        teacher_scale: float = 1.0,
        **options: Unpack[ScaleOptions],
    ) -> None:
        super().__init__(**options)
        check_objective(objective)
        check_finite("teacher_scale", teacher_scale, "1.0 takes the scores as they are")
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
        features = {"queries": queries, "documents": documents, "hard_negatives": negatives}
        check_same_everywhere(self.group, **features, scores=scores)
        queries, documents, negatives = self._prepared(None, queries, documents, negatives)
        scale = self._scale_for(logit_scale, queries, documents, negatives)
        candidates = torch.cat((documents[:, None], negatives), 1)
        logits = own_negative_logits(queries, candidates, with_summed_gradient(scale, self.group))
        student = gather_rows(logits, self.group)
        teacher = self.ranks.joined(scores.to(scale.dtype).T).T * self.teacher_scale
        return score_distillation(self.objective, student, teacher)


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
    check_choice("objective", objective, ("kl", "margin_mse"))


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
