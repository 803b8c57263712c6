"""Distillation from a teacher's scores, for sentence-transformers' trainer.

C columns (anchors, positives, K columns of negatives), b rows of this rank, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from sentence_transformers.util import (
    check_teacher_targets,
    pairwise_cos_sim,
    pairwise_dot_score,
)
from torch import Tensor, nn

from gradcache_clip.integrations import sentence_transformers_checks as checks
from gradcache_clip.integrations.sentence_transformers_base import (
    CachedLoss,
    CacheOptions,
    fixed_scale,
    stacked,
)
from gradcache_clip.integrations.sentence_transformers_inputs import Features
from gradcache_clip.integrations.sentence_transformers_teacher_checks import (
    margins_of,
    scores_of,
)
from gradcache_clip.losses import RetrievalLoss, ScoreDistillationLoss
from gradcache_clip.losses.distillation import Objective

if TYPE_CHECKING:
    from typing_extensions import Unpack

Similarity = Callable[[Tensor, Tensor], Tensor]


class _CachedDistillation(CachedLoss):
    """The base of both losses: the teacher's scores, and in-batch negatives beside them.

    Args:
        objective: how scores are matched.
        teacher_scale: multiplier of the scores.
        student_scale: multiplier of the similarities.
        in_batch: weight and scale of the loss of in-batch negatives.
    """

    least_columns = 3
    contrast: Any
    distill: Any
    fixed_options = "similarity_fct", "temperature", "student_temperature", "teacher_temperature"

    def __init__(
        self,
        model: nn.Module,
        similarity_fct: Similarity,
        objective: Objective,
        teacher_scale: float,
        student_scale: float,
        chunks: tuple[int, int | None],
        in_batch: tuple[float, float],
        *,
        show_progress_bar: bool,
        options: CacheOptions,
    ) -> None:
        checks.check_similarity(similarity_fct, pairwise_dot_score, pairwise_cos_sim)
        checks.check_in_batch(*in_batch)
        cosine = similarity_fct is pairwise_cos_sim
        distill = ScoreDistillationLoss(objective, teacher_scale=teacher_scale, normalize=cosine)
        contrasts = {"distill": distill, "contrast": RetrievalLoss()}
        super().__init__(
            model,
            {name: each.requires_grad_(False) for name, each in contrasts.items()},
            *chunks,
            # The mean over the rows of all processes is what data parallelism gives anyway.
            gather_across_devices=True,
            show_progress_bar=show_progress_bar,
            options=options,
        )
        self.similarity_fct = similarity_fct
        self._student_scale = student_scale
        self.in_batch_weight, self.in_batch_scale = in_batch

    def beside(self, columns: list[Features], labels: Tensor | None) -> Tensor | None:
        """Pass the labels on: how many rows there are is known with the embeddings."""
        return labels

    def compute_loss_from_embeddings(self, columns: Sequence[Tensor], beside: Any) -> Tensor:
        """Compute the loss of C (b, D) embeddings and the scores."""
        queries, documents, *rest = columns
        negatives, scale = stacked(rest), fixed_scale(self._student_scale, queries)
        scores = self.scores(beside, len(queries), len(columns) - 1)
        loss: Tensor = self.distill(
            queries, documents, negatives, scores=scores, logit_scale=scale
        ).loss
        # As Hinton et al. have it: gradients at any temperature are of one size.
        loss = loss / self._student_scale**2
        if self.in_batch_weight:
            scale = fixed_scale(self.in_batch_scale, queries)
            beside = self.contrast(queries, documents, negatives, scale).loss
            loss = loss + self.in_batch_weight * beside
        return loss

    def scores(self, labels: Any, rows: int, candidates: int) -> Tensor:
        """Return the scores of the positive and of each negative, (b, 1 + K)."""
        return scores_of(labels, rows, candidates)

    def _shared_config(self) -> dict[str, Any]:
        return {
            "similarity_fct": self.similarity_fct.__name__,
            "in_batch_weight": self.in_batch_weight,
            "in_batch_scale": self.in_batch_scale,
            **super()._shared_config(),
        }


class CachedMarginMSELoss(_CachedDistillation):
    """sentence-transformers' `MarginMSELoss` with gradient caching: same loss, same gradients.

    Mean over anchors and negatives of ((s_0 - s_k) - (t_0 - t_k))^2, with similarities s and scores
    t of the positive and of negative k; see `ScoreDistillationLoss`. The labels are the scores
    (b, 1 + K), or their differences t_0 - t_k, (b, K) or (b,). On several processes the loss is
    that of the whole batch.

    Args:
        model: the `SentenceTransformer` to train.
        similarity_fct: `pairwise_dot_score` or `pairwise_cos_sim` of `sentence_transformers.util`.
        mini_batch_size: rows that go through the model at once.
        mini_batch_num_tokens: bound chunks by tokens instead.
        show_progress_bar: count the rows that go through the model.
        in_batch_weight: weight of `CachedMultipleNegativesRankingLoss` of the same batch beside it.
        in_batch_scale: its multiplier of the cosine similarity.
        **options: `matryoshka_dims`, `matryoshka_weights`, `pad_to_multiple_of`, `memory_budget`
            and `check_replay`, as in `CachedMultipleNegativesRankingLoss`.

    Source: Hofstätter et al. 2020 (arXiv 2010.02666); Gao et al. 2021 (2101.06983).

    Example:
        loss = CachedMarginMSELoss(model, mini_batch_size=64, in_batch_weight=0.1)
        trainer = SentenceTransformerTrainer(model, args, train_dataset=scored, loss=loss)
    """

    def __init__(
        self,
        model: nn.Module,
        similarity_fct: Similarity = pairwise_dot_score,
        mini_batch_size: int = 32,
        mini_batch_num_tokens: int | None = None,
        show_progress_bar: bool = False,
        *,
        in_batch_weight: float = 0.0,
        in_batch_scale: float = 20.0,
        **options: Unpack[CacheOptions],
    ) -> None:
        super().__init__(
            model,
            similarity_fct,
            "margin_mse",
            1.0,
            1.0,
            (mini_batch_size, mini_batch_num_tokens),
            (in_batch_weight, in_batch_scale),
            show_progress_bar=show_progress_bar,
            options=options,
        )

    def scores(self, labels: Any, rows: int, candidates: int) -> Tensor:
        """Return the scores of the positive and of each negative, (b, 1 + K)."""
        return margins_of(labels, rows, candidates)

    def get_config_dict(self) -> dict[str, Any]:
        """Return the options, for the model card."""
        return self._shared_config()

    @property
    def citation(self) -> str:
        """BibTeX of the method, for the model card."""
        return """
@misc{hofstätter2021improving,
    title={Improving Efficient Neural Ranking Models with Cross-Architecture Knowledge Distillation},
    author={Sebastian Hofstätter and Sophia Althammer and Michael Schröder and Mete Sertkan and Allan Hanbury},
    year={2021},
    eprint={2010.02666},
    archivePrefix={arXiv},
    primaryClass={cs.IR}
}
"""  # noqa: E501


class CachedDistillKLDivLoss(_CachedDistillation):
    """sentence-transformers' `DistillKLDivLoss` with gradient caching: same loss, same gradients.

    student_temperature^2 times the mean over anchors of KL(softmax(t / teacher_temperature) ||
    softmax(s / student_temperature)), with similarities s and scores t of an anchor's own positive
    and negatives; see `ScoreDistillationLoss`. The labels are the scores (b, 1 + K); -inf leaves a
    candidate out. On several processes the loss is that of the whole batch.

    Args:
        model: the `SentenceTransformer` to train.
        similarity_fct: `pairwise_dot_score` or `pairwise_cos_sim` of `sentence_transformers.util`.
        temperature: divisor of similarities and scores.
        student_temperature: divisor of the similarities instead.
        teacher_temperature: divisor of the scores instead.
        mini_batch_size: rows that go through the model at once.
        mini_batch_num_tokens: bound chunks by tokens instead.
        show_progress_bar: count the rows that go through the model.
        in_batch_weight: weight of `CachedMultipleNegativesRankingLoss` of the same batch beside it.
        in_batch_scale: its multiplier of the cosine similarity.
        **options: `matryoshka_dims`, `matryoshka_weights`, `pad_to_multiple_of`, `memory_budget`
            and `check_replay`, as in `CachedMultipleNegativesRankingLoss`.

    Source: Hinton et al. 2015; Lin et al. 2020 (arXiv 2010.11386); Gao et al. 2021 (2101.06983).

    Example:
        loss = CachedDistillKLDivLoss(model, temperature=2.0, mini_batch_size=64)
        trainer = SentenceTransformerTrainer(model, args, train_dataset=scored, loss=loss)
    """

    def __init__(
        self,
        model: nn.Module,
        similarity_fct: Similarity = pairwise_dot_score,
        temperature: float = 1.0,
        student_temperature: float | None = None,
        teacher_temperature: float | None = None,
        mini_batch_size: int = 32,
        mini_batch_num_tokens: int | None = None,
        show_progress_bar: bool = False,
        *,
        in_batch_weight: float = 0.0,
        in_batch_scale: float = 20.0,
        **options: Unpack[CacheOptions],
    ) -> None:
        student, teacher = checks.temperatures(
            temperature, student_temperature, teacher_temperature
        )
        super().__init__(
            model,
            similarity_fct,
            "kl",
            1 / teacher,
            1 / student,
            (mini_batch_size, mini_batch_num_tokens),
            (in_batch_weight, in_batch_scale),
            show_progress_bar=show_progress_bar,
            options=options,
        )
        self.temperature = temperature
        self.student_temperature, self.teacher_temperature = student, teacher
        self._checked_scores = False

    def scores(self, labels: Any, rows: int, candidates: int) -> Tensor:
        """Return the scores; look at those of the first batch, as the library does."""
        scores, T = scores_of(labels, rows, candidates), self.teacher_temperature
        if not self._checked_scores:
            check_teacher_targets(torch.softmax(scores / T, 1), scores, T, type(self).__name__)
        self._checked_scores = True
        return scores

    def get_config_dict(self) -> dict[str, Any]:
        """Return the options, for the model card."""
        return {
            "temperature": self.temperature,
            "student_temperature": self.student_temperature,
            "teacher_temperature": self.teacher_temperature,
            **self._shared_config(),
        }

    @property
    def citation(self) -> str:
        """BibTeX of the method, for the model card."""
        return """
@misc{lin2020distillingdenserepresentationsranking,
      title={Distilling Dense Representations for Ranking using Tightly-Coupled Teachers},
      author={Sheng-Chieh Lin and Jheng-Hong Yang and Jimmy Lin},
      year={2020},
      eprint={2010.11386},
      archivePrefix={arXiv},
      primaryClass={cs.IR},
      url={https://arxiv.org/abs/2010.11386},
}
"""
