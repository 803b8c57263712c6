"""A teacher's scores of each query's own candidates, matched by MaxSim scores.

b queries on this rank, K hard negatives of each, Q tokens of a query, P and R of a document and a
hard negative, D width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gradcache_clip.distributed.collectives import check_same_everywhere
from gradcache_clip.losses.distillation import (
    DistillationOutput,
    Objective,
    check_objective,
    check_scores,
    score_distillation,
)
from gradcache_clip.losses.options import check_finite, check_flags
from gradcache_clip.losses.scaled import LossOptions, ScaledLoss
from gradcache_clip.losses.token_batch import GivenTokens, TokenBatch, check_token_inputs
from gradcache_clip.losses.token_contrast import own_logits
from gradcache_clip.ops.implementations import resolve_impl
from gradcache_clip.ops.late_interaction import check_token_reduction
from gradcache_clip.ops.late_interaction_op import TokenRules
from gradcache_clip.ops.token_pieces import TokenReduction

if TYPE_CHECKING:
    from typing_extensions import Unpack

# PyLate's, where all candidates have one score.
_EPSILON = 1e-8


class MaxSimDistillationLoss(ScaledLoss):
    """Match given scores of each query's own candidates by MaxSim, over the queries of all ranks.

    The objectives are those of `ScoreDistillationLoss`, with the logits of `MaxSimLoss`: S_i0 of
    the query and its document, S_ik of the query and its hard negative k. ColBERTv2 trains with
    "kl", beside `MaxSimLoss` over the batch. In `MatryoshkaLoss` tokens are cut, and the scores
    stay whole. Source: Santhanam et al. 2022, "ColBERTv2", section 3.2.

    Args:
        objective: "kl" or "margin_mse".
        teacher_scale: multiplier of the scores.
        token_reduction: "sum" over the tokens of the query, as in ColBERT, or "mean".
        unit_range: move and scale the MaxSim scores of each query to [0, 1], as PyLate does.
        init_logit_scale: initial multiplier of the MaxSim scores.
        max_logit_scale: its upper bound.
        **options: `normalize=True` (each token), `impl="auto"`, `group=None`; see `ScaledLoss`.
            Nothing is exchanged but scores.

    Example:
        >>> import torch
        >>> from gradcache_clip import MaxSimDistillationLoss
        >>> tokens, scores = torch.eye(6).view(2, 3, 6), torch.tensor([[5.0, 2.0]] * 2)
        >>> loss = MaxSimDistillationLoss("margin_mse")
        >>> loss(tokens, tokens, torch.zeros(2, 1, 4, 6), scores).loss.item()
        0.0
    """

    feature_arguments = "query_tokens", "document_tokens", "hard_negatives"

    def __init__(
        self,
        objective: Objective = "kl",
        *,
        teacher_scale: float = 1.0,
        token_reduction: TokenReduction = "sum",
        unit_range: bool = False,
        init_logit_scale: float = 1.0,
        max_logit_scale: float = 100.0,
        **options: Unpack[LossOptions],
    ) -> None:
        super().__init__(
            init_logit_scale=init_logit_scale, max_logit_scale=max_logit_scale, **options
        )
        check_objective(objective)
        check_token_reduction(token_reduction)
        check_finite("teacher_scale", teacher_scale, "1.0 takes the scores as they are")
        check_flags(unit_range=unit_range)
        self.objective: Objective = objective
        self.teacher_scale = teacher_scale
        self.token_reduction: TokenReduction = token_reduction
        self.unit_range = unit_range

    def forward(
        self,
        query_tokens: Tensor,
        document_tokens: Tensor,
        hard_negatives: Tensor,
        scores: Tensor,
        logit_scale: Tensor | None = None,
        *,
        query_mask: Tensor | None = None,
        document_mask: Tensor | None = None,
        hard_negative_mask: Tensor | None = None,
        query_lengths: Tensor | None = None,
        document_lengths: Tensor | None = None,
        hard_negative_lengths: Tensor | None = None,
    ) -> DistillationOutput:
        """Compute the loss of all queries.

        Args:
            query_tokens: (b, Q, D) floating tensor, or (T, D) with query_lengths.
            document_tokens: (b, P, D), or (T, D) with document_lengths.
            hard_negatives: (b, K, R, D), or (T, D), query by query, with hard_negative_lengths.
            scores: (b, 1 + K), the teacher's of the document and of each hard negative; constants.
            logit_scale: a scale of the caller's own in place of the module's.
            query_mask: bool in the shape of the tokens without D, True for tokens that count.
            document_mask: True for the tokens that a query may find.
            hard_negative_mask: the same.
            query_lengths: (b,) integers, the number of tokens of each query, of packed tokens.
            document_lengths: (b,).
            hard_negative_lengths: (b, K).

        Raises:
            TypeError: tokens, scores, masks or lengths of a wrong type.
            ValueError: shapes that do not fit together, a sample without any token that counts.
        """
        of_negatives = hard_negative_mask, None, hard_negative_lengths
        given = (
            GivenTokens("query", query_tokens, query_mask, None, query_lengths),
            GivenTokens("document", document_tokens, document_mask, None, document_lengths),
            GivenTokens("hard_negative", hard_negatives, *of_negatives),
        )
        check_token_inputs(*given)
        shape = given[0].samples[0], 1 + given[2].samples[1]
        check_scores(scores, ("query_tokens", query_tokens), shape)
        check_same_everywhere(self.group, scores=scores)
        scale = self._scale_for(logit_scale, query_tokens, document_tokens)
        queries, documents, negatives = (self._batch(each) for each in given)
        student = torch.cat([self._logits(queries, x, scale) for x in (documents, negatives)], 1)
        if self.unit_range:
            least, most = student.aminmax(dim=1, keepdim=True)
            student = (student - least) / (most - least + _EPSILON)
        teacher = self.ranks.joined(scores.to(scale.dtype).T).T * self.teacher_scale
        return score_distillation(self.objective, student, teacher)

    def _batch(self, given: GivenTokens) -> TokenBatch:
        batch = given.batch(both_ways=False)
        return batch._replace(values=self._unit(batch.values))

    def _logits(self, queries: TokenBatch, candidates: TokenBatch, scale: Tensor) -> Tensor:
        rules = TokenRules(None, None, one_way=True, token_reduction=self.token_reduction)
        dtype = torch.promote_types(queries.values.dtype, candidates.values.dtype)
        impl = resolve_impl(self.impl, scale.device, dtype)
        return own_logits(queries, candidates, scale, rules, impl, self.ranks)
