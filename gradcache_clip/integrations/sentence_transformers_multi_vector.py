"""Losses with gradient caching for sentence-transformers' `MultiVectorEncoder`: ColBERT, ColPali.

C columns (queries, documents, K columns of negatives), b rows of this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.multi_vector_encoder import losses as theirs
from sentence_transformers.multi_vector_encoder import scoring
from sentence_transformers.util import check_teacher_targets, similarity_fct_name
from torch import Tensor, nn

from gradcache_clip.distributed.wrappers import innermost
from gradcache_clip.integrations import sentence_transformers_checks as checks
from gradcache_clip.integrations.sentence_transformers_base import fixed_scale
from gradcache_clip.integrations.sentence_transformers_teacher_checks import margins_of, scores_of
from gradcache_clip.integrations.sentence_transformers_tokens import (
    TokenLoss,
    TokenOptions,
    max_sim,
)
from gradcache_clip.losses import MaxSimDistillationLoss, MaxSimLoss
from gradcache_clip.losses.options import check_positive

if TYPE_CHECKING:
    from typing_extensions import Unpack

Similarity = Callable[..., Tensor]


class _MultiVectorLoss(TokenLoss):
    """The base of these losses; the first column are queries, and the model is told so."""

    fixed_options = "similarity_fct", "student_temperature", "teacher_temperature"
    counterpart: Any
    """The loss of sentence-transformers whose gradients these are."""
    similarity: str
    """The similarity it may be given, besides `mean_` and this name."""
    shown: tuple[str, ...] = ()
    """Further options in the model card, by the names of their attributes."""

    def __init__(
        self,
        model: nn.Module,
        contrast: nn.Module,
        similarity_fct: Similarity | None,
        options: TokenOptions,
    ) -> None:
        if isinstance(model, SentenceTransformer):
            raise TypeError(
                f"model: expected a MultiVectorEncoder, got {type(model).__name__}, which pools; "
                "use the losses of gradcache_clip.integrations.sentence_transformers"
            )
        known = [getattr(scoring, each) for each in (self.similarity, f"mean_{self.similarity}")]
        if similarity_fct not in (None, *known):
            got = getattr(similarity_fct, "__name__", type(similarity_fct).__name__)
            raise ValueError(
                f"similarity_fct: expected {' or '.join(each.__name__ for each in known)} of "
                f"sentence_transformers, got {got}; use sentence-transformers' own loss for "
                "another one"
            )
        super().__init__(model, contrast, options)
        # Since sentence-transformers 6.3 its default is None: the similarity of the model.
        self.similarity_fct = similarity_fct or self.counterpart(model).similarity_fct

    def forward(
        self, sentence_features: Iterable[Mapping[str, Any]], labels: Tensor | None = None
    ) -> Tensor:
        """Compute the loss of a batch; its backward replays the chunks.

        Args:
            sentence_features: C columns of b rows each: queries, documents, and any number of
                columns of negatives.
            labels: scores of a teacher for the losses that distil, ignored by the other.
        """
        columns = [
            {"task": "document" if index else "query", **features}
            for index, features in enumerate(sentence_features)
        ]
        return super().forward(columns, labels)

    def get_config_dict(self) -> dict[str, Any]:
        """Return the options, for the model card."""
        given = self.similarity_fct
        similarity = {"similarity_fct": None if given is None else similarity_fct_name(given)}
        return similarity | {key: getattr(self, key) for key in self.shown} | self._shared_config()

    def _max_sim(self, columns: Sequence[Any], **given: Any) -> Tensor:
        contrast = getattr(self.contrast, "loss", self.contrast)
        contrast.token_reduction = self._token_reduction()
        return max_sim(self.contrast, columns, **given)

    def _token_reduction(self) -> Literal["mean", "sum"]:
        if self.similarity_fct is not None:
            return "mean" if self.similarity_fct.__name__.startswith("mean_") else "sum"
        chosen = getattr(innermost(self.model), "similarity_fn_name", "maxsim")
        return "mean" if chosen == "meanmaxsim" else "sum"


class CachedMultiVectorMultipleNegativesRankingLoss(_MultiVectorLoss):
    """Replaces sentence-transformers' loss of this name: same gradients, chunk by chunk.

    Cross-entropy of each query with the documents and hard negatives of the whole batch, scored by
    `MaxSimLoss`, which stores no more than a tile of token similarities and skips padding. The
    model's `MultiVectorMask` says what is scored: query expansion, skiplists, image tokens.

    Args:
        model: the `MultiVectorEncoder` to train.
        scale: multiplier of the scores, 1/temperature.
        similarity_fct: `colbert_scores` or `mean_colbert_scores` of
            `sentence_transformers.multi_vector_encoder.scoring`. The default is that of the
            installed sentence-transformers: the model's `similarity_fn_name` since 6.3, before
            `colbert_scores`.
        score_mini_batch_size: has no effect, since scores are computed in tiles.
        **options: `mini_batch_size=32`, `mini_batch_num_tokens=None`,
            `gather_across_devices=False`, `show_progress_bar=False`, `matryoshka_dims=None`,
            `matryoshka_weights=None`, `pad_to_multiple_of=1`, `memory_budget=None` and
            `check_replay="error"`, as in `CachedMultipleNegativesRankingLoss`.

    Raises:
        TypeError: a `SentenceTransformer`, which pools.
        ValueError: another similarity.

    Source: Khattab and Zaharia 2020 (arXiv 2004.12832), section 3; Gao et al. 2021 (2101.06983).

    Example:
        loss = CachedMultiVectorMultipleNegativesRankingLoss(model, mini_batch_size=32)
        trainer = MultiVectorEncoderTrainer(model, args, train_dataset=pairs, loss=loss)
    """

    shown = "scale", "score_mini_batch_size", "gather_across_devices"
    similarity = "colbert_scores"
    counterpart = theirs.CachedMultiVectorMultipleNegativesRankingLoss
    citation = counterpart.citation

    def __init__(
        self,
        model: nn.Module,
        *,
        scale: float = 1.0,
        similarity_fct: Similarity | None = None,
        score_mini_batch_size: int | None = None,
        **options: Unpack[TokenOptions],
    ) -> None:
        check_positive("scale", scale, "1.0 is a temperature of 1")
        checks.check_score_rows(score_mini_batch_size)
        contrast = MaxSimLoss(normalize=False)
        super().__init__(model, contrast, similarity_fct, options)
        self.scale, self.score_mini_batch_size = scale, score_mini_batch_size

    def compute_loss_from_embeddings(self, columns: Sequence[Any], beside: Any = None) -> Tensor:
        """Compute the loss of C columns of `Tokens`."""
        scale = fixed_scale(self.scale, columns[0].vectors)
        return self._max_sim(columns, logit_scale=scale)


class CachedMultiVectorMarginMSELoss(_MultiVectorLoss):
    """sentence-transformers' `MultiVectorMarginMSELoss` with gradient caching.

    Mean over queries and negatives of ((S_0 - S_k) - (t_0 - t_k))^2, with MaxSim scores S and
    scores t of the document and of negative k; see `MaxSimDistillationLoss`. The labels are the
    scores (b, 1 + K), or their differences t_0 - t_k, (b, K) or (b,). On several processes the loss
    is that of the whole batch.

    Args:
        model: the `MultiVectorEncoder` to train.
        similarity_fct: `colbert_scores_pairwise` or `mean_colbert_scores_pairwise`; by default as
            in `CachedMultiVectorMultipleNegativesRankingLoss`.
        **options: as in `CachedMultiVectorMultipleNegativesRankingLoss`.

    Source: Hofstätter et al. 2020 (arXiv 2010.02666); Gao et al. 2021 (2101.06983).
    """

    least_columns = 3
    similarity = "colbert_scores_pairwise"
    counterpart = theirs.MultiVectorMarginMSELoss
    citation = counterpart.citation

    def __init__(
        self,
        model: nn.Module,
        *,
        similarity_fct: Similarity | None = None,
        **options: Unpack[TokenOptions],
    ) -> None:
        contrast = MaxSimDistillationLoss("margin_mse", normalize=False)
        # The mean over the rows of all processes is what data parallelism gives anyway.
        super().__init__(
            model, contrast, similarity_fct, {**options, "gather_across_devices": True}
        )

    def compute_loss_from_embeddings(self, columns: Sequence[Any], beside: Any) -> Tensor:
        """Compute the loss of C columns of `Tokens` and the labels."""
        scores = margins_of(beside, len(columns[0].mask), len(columns) - 1)
        return self._max_sim(columns, scores=scores)


class CachedMultiVectorDistillKLDivLoss(_MultiVectorLoss):
    """sentence-transformers' `MultiVectorDistillKLDivLoss` with gradient caching.

    student_temperature^2 times the mean over queries of KL(softmax(t / teacher_temperature) ||
    softmax(S / student_temperature)), with MaxSim scores S and scores t of a query's own document
    and negatives; see `MaxSimDistillationLoss`. The labels are the scores (b, 1 + K); -inf leaves a
    candidate out. On several processes the loss is that of the whole batch.

    Args:
        model: the `MultiVectorEncoder` to train.
        similarity_fct: `colbert_kd_scores` or `mean_colbert_kd_scores`; by default as
            in `CachedMultiVectorMultipleNegativesRankingLoss`.
        temperature: divisor of both kinds of scores.
        student_temperature: divisor of the MaxSim scores instead.
        teacher_temperature: divisor of the teacher's scores instead.
        **options: as in `CachedMultiVectorMultipleNegativesRankingLoss`.

    Source: Hinton et al. 2015; Santhanam et al. 2022, "ColBERTv2", section 3.2; Gao et al. 2021
    (arXiv 2101.06983).
    """

    least_columns = 3
    shown = "temperature", "student_temperature", "teacher_temperature"
    similarity = "colbert_kd_scores"
    counterpart = theirs.MultiVectorDistillKLDivLoss
    citation = counterpart.citation

    def __init__(
        self,
        model: nn.Module,
        *,
        similarity_fct: Similarity | None = None,
        temperature: float = 1.0,
        student_temperature: float | None = None,
        teacher_temperature: float | None = None,
        **options: Unpack[TokenOptions],
    ) -> None:
        student, teacher = checks.temperatures(
            temperature, student_temperature, teacher_temperature
        )
        contrast = MaxSimDistillationLoss("kl", teacher_scale=1 / teacher, normalize=False)
        super().__init__(
            model, contrast, similarity_fct, {**options, "gather_across_devices": True}
        )
        self.temperature = temperature
        self.student_temperature, self.teacher_temperature = student, teacher
        self._checked_scores = False

    def compute_loss_from_embeddings(self, columns: Sequence[Any], beside: Any) -> Tensor:
        """Compute the loss of C columns of `Tokens` and the labels."""
        scores = scores_of(beside, len(columns[0].mask), len(columns) - 1)
        T, scale = self.teacher_temperature, 1 / self.student_temperature
        if not self._checked_scores:
            check_teacher_targets(torch.softmax(scores / T, 1), scores, T, type(self).__name__)
        self._checked_scores = True
        scale_of_student = fixed_scale(scale, columns[0].vectors)
        loss = self._max_sim(columns, scores=scores, logit_scale=scale_of_student)
        # As Hinton et al. have it: gradients at any temperature are of one size.
        return loss / scale**2
