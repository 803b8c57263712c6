"""GIST for sentence-transformers' trainer: a guide model decides who is no negative.

C columns (anchors, positives, negatives), b rows of this rank, D width, G width of the guide.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from sentence_transformers.util import batch_to_device
from torch import Tensor, nn

from gradcache_clip.distributed import LocalStrategy
from gradcache_clip.integrations import sentence_transformers_checks as checks
from gradcache_clip.integrations.sentence_transformers_base import (
    CachedLoss,
    CacheOptions,
    fixed_scale,
    stacked,
)
from gradcache_clip.integrations.sentence_transformers_inputs import Features
from gradcache_clip.integrations.sentence_transformers_steps import ColumnSteps
from gradcache_clip.integrations.sentence_transformers_teacher_checks import (
    guide_needs_own_tokens,
    token_rows,
)
from gradcache_clip.losses import RetrievalLoss
from gradcache_clip.losses.options import check_flags

if TYPE_CHECKING:
    from typing_extensions import Unpack


class CachedGISTEmbedLoss(CachedLoss):
    """Replaces sentence-transformers' loss of this name: same gradients, in less time.

    As `CachedMultipleNegativesRankingLoss`, but a candidate that the guide finds more similar than
    the pair less the margin is no negative. The guide embeds the batch in evaluation mode, without
    graphs, in the chunks of the model; it reads the model's tokens if both have one vocabulary, and
    else tokenizes the decoded texts. No matrix of its similarities is stored.

    Args:
        model: the `SentenceTransformer` to train.
        guide: the `SentenceTransformer` that decides.
        temperature: divisor of the cosine similarity.
        mini_batch_size: rows that go through a model at once.
        mini_batch_num_tokens: bound chunks by tokens instead.
        show_progress_bar: count the rows that go through the model.
        margin_strategy: "absolute", or "relative" to the pair's absolute similarity.
        margin: how far below the pair's similarity by the guide a negative must be.
        contrast_anchors: whether the other anchors compete.
        contrast_positives: whether the other positives compete with the positive.
        gather_across_devices: use candidates of all processes. Must be True on several processes;
            each then returns the loss of the whole batch.
        **options: `matryoshka_dims`, `matryoshka_weights`, `pad_to_multiple_of`, `memory_budget`
            and `check_replay`, as in `CachedMultipleNegativesRankingLoss`.

    Raises:
        ValueError: an unknown strategy, or texts that the guide cannot tokenize.

    Source: Solatorio 2024, "GISTEmbed" (arXiv 2402.16829); Gao et al. 2021 (2101.06983).

    Example:
        loss = CachedGISTEmbedLoss(model, guide, mini_batch_size=64, margin=0.05)
        trainer = SentenceTransformerTrainer(model, args, train_dataset=pairs, loss=loss)
    """

    contrast: Any
    guide: Any
    fixed_options = "margin_strategy", "margin", "contrast_anchors", "contrast_positives"

    def __init__(
        self,
        model: nn.Module,
        guide: nn.Module,
        temperature: float = 0.01,
        mini_batch_size: int = 32,
        mini_batch_num_tokens: int | None = None,
        show_progress_bar: bool = False,
        margin_strategy: Literal["absolute", "relative"] = "absolute",
        margin: float = 0.0,
        contrast_anchors: bool = True,
        contrast_positives: bool = True,
        gather_across_devices: bool = False,
        **options: Unpack[CacheOptions],
    ) -> None:
        checks.check_temperature("temperature", temperature)
        checks.check_margin(margin_strategy, margin)
        check_flags(contrast_anchors=contrast_anchors, contrast_positives=contrast_positives)
        further = {"query_to_query": contrast_anchors, "doc_to_doc": contrast_positives}
        contrast = RetrievalLoss(
            directions=("query_to_doc", *(name for name, wanted in further.items() if wanted)),
            negatives_in_doc_to_doc=False,
            guide_margin=margin,
            relative_guide_margin=margin_strategy == "relative",
        ).requires_grad_(False)
        super().__init__(
            model,
            {"contrast": contrast},
            mini_batch_size,
            mini_batch_num_tokens,
            gather_across_devices=gather_across_devices,
            show_progress_bar=show_progress_bar,
            options=options,
        )
        self.must_retokenize = guide_needs_own_tokens(model, guide)
        self.guide, self.temperature = guide, temperature
        self.margin_strategy, self.margin = margin_strategy, margin
        self.contrast_anchors, self.contrast_positives = contrast_anchors, contrast_positives
        self._tokenizer: Any = model.tokenizer
        self._guide_steps = ColumnSteps(f"{type(self).__name__}, guide", torch.stack)

    def beside(self, columns: list[Features], labels: Tensor | None) -> Tensor:
        """Embed the columns by the guide: (C, b, G), normalised."""
        checks.check_temperature("temperature", self.temperature)
        # Modules write their outputs into what they are given.
        texts = [self._retokenized(each) if self.must_retokenize else {**each} for each in columns]
        alone = LocalStrategy(reduce_myself=True)
        chunking = self.chunking._replace(show_progress_bar=False)
        with torch.no_grad(), _evaluating(self.guide):
            guided = self._guide_steps(self.guide, texts, alone, chunking, {})
        wide = torch.promote_types(guided.dtype, torch.float32)
        return nn.functional.normalize(guided.to(wide), dim=-1)

    def compute_loss_from_embeddings(self, columns: Sequence[Tensor], beside: Tensor) -> Tensor:
        """Compute the loss of C (b, D) embeddings and (C, b, G) of the guide."""
        queries, documents, *negatives = columns
        guide = *beside[:2], *([beside[2:].transpose(0, 1)] if negatives else [])
        scale = fixed_scale(1 / self.temperature, queries)
        loss: Tensor = self.contrast(
            queries, documents, stacked(negatives), scale, guide=guide
        ).loss
        return loss

    def _retokenized(self, features: Features) -> Features:
        tokens = token_rows(features)
        texts = self._tokenizer.batch_decode(tokens, skip_special_tokens=True)
        made: Features = batch_to_device(self.guide.preprocess(texts), self.guide.device)
        return made

    def get_config_dict(self) -> dict[str, Any]:
        """Return the options, for the model card."""
        return {
            "guide": self.guide,
            "temperature": self.temperature,
            "margin_strategy": self.margin_strategy,
            "margin": self.margin,
            "contrast_anchors": self.contrast_anchors,
            "contrast_positives": self.contrast_positives,
            "gather_across_devices": self.gather_across_devices,
            **self._shared_config(),
        }

    @property
    def citation(self) -> str:
        """BibTeX of the method, for the model card."""
        return """
@misc{solatorio2024gistembed,
    title={GISTEmbed: Guided In-sample Selection of Training Negatives for Text Embedding Fine-tuning},
    author={Aivin V. Solatorio},
    year={2024},
    eprint={2402.16829},
    archivePrefix={arXiv},
    primaryClass={cs.LG}
}
"""  # noqa: E501


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode; each submodule returns to its own."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True
