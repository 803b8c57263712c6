"""Losses with gradient caching for PyLate's `ColBERT` models.

C columns (queries, documents, K columns of negatives), b rows of this rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradcache_clip.integrations import sentence_transformers_checks as checks
from gradcache_clip.integrations.sentence_transformers_base import fixed_scale
from gradcache_clip.integrations.sentence_transformers_inputs import Features
from gradcache_clip.integrations.sentence_transformers_steps import Batch, ColumnSteps
from gradcache_clip.integrations.sentence_transformers_teacher_checks import scores_of
from gradcache_clip.integrations.sentence_transformers_tokens import (
    TokenLoss,
    TokenOptions,
    Tokens,
    TokenSteps,
    max_sim,
)
from gradcache_clip.losses import MaxSimDistillationLoss, MaxSimLoss
from gradcache_clip.losses.options import check_flags

if TYPE_CHECKING:
    from typing_extensions import Unpack


class _ColBERTSteps(TokenSteps):
    """Steps of a model that leaves skiplist and normalisation to the loss."""

    def _batches(self, columns: list[Features], *place: Any) -> list[Batch]:
        apart = [ColumnSteps._batches(self, [column], *place)[0] for column in columns]
        # Query expansion scores tokens that the attention mask leaves out.
        return [apart[0]._replace(keeps_width=True), *apart[1:]]

    def read(self, model: Any, output: Any, *, is_query: bool) -> Tokens:
        """Take the vectors, and which are scored, from the model's output."""
        vectors, mask = super().read(model, output, is_query=is_query)
        if not is_query:
            skipped = torch.tensor(model.skiplist, dtype=torch.long, device=mask.device)
            mask = mask & ~torch.isin(output["input_ids"], skipped)
        elif model.do_query_expansion:
            mask = torch.ones_like(mask)
        return Tokens(F.normalize(vectors, dim=-1), mask)


class _ColBERTLoss(TokenLoss):
    """The base of these losses."""

    kind_of_steps = _ColBERTSteps

    def __init__(
        self, model: nn.Module, contrast: nn.Module, score_metric: None, options: TokenOptions
    ) -> None:
        if missing := [x for x in ("skiplist", "do_query_expansion") if not hasattr(model, x)]:
            raise TypeError(
                f"model: expected PyLate's ColBERT, got {type(model).__name__} without "
                f"{missing[0]}; for sentence-transformers' MultiVectorEncoder use "
                "gradcache_clip.integrations.sentence_transformers_multi_vector"
            )
        if score_metric is not None:
            raise ValueError(
                f"score_metric: expected None, which is MaxSim, got {score_metric!r}; leave it "
                "out, and use PyLate's own loss for another one"
            )
        super().__init__(model, contrast, options)


class CachedContrastive(_ColBERTLoss):
    """Replaces PyLate's `CachedContrastive` and `Contrastive`, with the gradients of the latter.

    Cross-entropy of each query with the documents and hard negatives of the whole batch; see
    `MaxSimLoss`. Gradients of PyLate's cached loss (1.6.0) are those of the sum over the b queries
    where its value is their mean, hence b times as large as these.

    Args:
        model: the `ColBERT` model to train.
        score_metric: None, MaxSim. A masked token is never found; in PyLate its similarity is 0.
        score_mini_batch_size: has no effect, since scores are computed in tiles.
        temperature: divisor of the scores.
        **options: `mini_batch_size=32`, `mini_batch_num_tokens=None`,
            `gather_across_devices=False`, `show_progress_bar=False`, `matryoshka_dims=None`,
            `matryoshka_weights=None`, `pad_to_multiple_of=1`, `memory_budget=None` and
            `check_replay="error"`, as in `CachedMultipleNegativesRankingLoss`.

    Source: Khattab and Zaharia 2020 (arXiv 2004.12832), section 3; Gao et al. 2021 (2101.06983).

    Example:
        loss = CachedContrastive(model, mini_batch_size=32, temperature=0.02)
        trainer = SentenceTransformerTrainer(
            model, args, train_dataset=triplets, loss=loss,
            data_collator=ColBERTCollator(tokenize_fn=model.tokenize),
        )
    """

    def __init__(
        self,
        model: nn.Module,
        score_metric: None = None,
        *,
        score_mini_batch_size: int | None = None,
        temperature: float = 1.0,
        **options: Unpack[TokenOptions],
    ) -> None:
        checks.check_temperature("temperature", temperature)
        checks.check_score_rows(score_mini_batch_size)
        super().__init__(model, MaxSimLoss(normalize=False), score_metric, options)
        self.temperature, self.score_mini_batch_size = temperature, score_mini_batch_size

    def compute_loss_from_embeddings(self, columns: Sequence[Any], beside: Any = None) -> Tensor:
        """Compute the loss of C columns of `Tokens`."""
        scale = fixed_scale(1 / self.temperature, columns[0].vectors)
        return max_sim(self.contrast, columns, logit_scale=scale)


class Distillation(_ColBERTLoss):
    """Replaces PyLate's `Distillation`, with gradient caching.

    Mean over queries of KL(softmax(t) || softmax(S)), with a teacher's scores t (b, n), the labels,
    and MaxSim scores S of the n documents of a query, which lie query by query in the second
    column; see `MaxSimDistillationLoss`. On several processes the loss is that of the whole batch.

    Args:
        model: the `ColBERT` model to train.
        score_metric: None, MaxSim. A masked token is never found; in PyLate its similarity is 0.
        normalize_scores: move and scale the scores S of each query to [0, 1].
        **options: as in `CachedContrastive`.

    Source: Santhanam et al. 2022, "ColBERTv2", section 3.2; Gao et al. 2021 (arXiv 2101.06983).
    """

    def __init__(
        self,
        model: nn.Module,
        score_metric: None = None,
        *,
        normalize_scores: bool = True,
        **options: Unpack[TokenOptions],
    ) -> None:
        check_flags(normalize_scores=normalize_scores)
        contrast = MaxSimDistillationLoss("kl", unit_range=normalize_scores, normalize=False)
        # The mean over the rows of all processes is what data parallelism gives anyway.
        super().__init__(model, contrast, score_metric, {**options, "gather_across_devices": True})
        self.normalize_scores = normalize_scores

    def compute_loss_from_embeddings(self, columns: Sequence[Any], beside: Any) -> Tensor:
        """Compute the loss of queries, n documents of each, and the labels."""
        queries, documents = columns[:2]
        rows, found = len(queries.mask), len(documents.mask)
        if found % rows or len(columns) > 2:
            raise ValueError(
                f"sentence_features: expected one column with n documents for each of {rows} "
                f"queries, got {len(columns) - 1} columns, the first with {found} documents; give "
                "each row of the dataset a list of n"
            )
        scores = scores_of(beside, rows, found // rows)
        of_query = (each.unflatten(0, scores.shape).unbind(1) for each in documents)
        own = map(Tokens._make, zip(*of_query, strict=True))
        return max_sim(self.contrast, [queries, *own], scores=scores)
