"""Losses for sentence-transformers' trainer, with gradient caching; this one: in-batch negatives.

C columns (anchors, positives, negatives), b rows of this rank, D width.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from sentence_transformers.util import cos_sim
from torch import Tensor, nn

from gradcache_clip.integrations import sentence_transformers_checks as checks
from gradcache_clip.integrations.sentence_transformers_base import (
    CachedLoss,
    CacheOptions,
    fixed_scale,
    stacked,
)
from gradcache_clip.integrations.sentence_transformers_distillation import (
    CachedDistillKLDivLoss,
    CachedMarginMSELoss,
)
from gradcache_clip.integrations.sentence_transformers_guided import CachedGISTEmbedLoss
from gradcache_clip.losses import RetrievalLoss
from gradcache_clip.losses.options import check_flags
from gradcache_clip.losses.retrieval import HardnessMode, PartitionMode

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "CachedDistillKLDivLoss",
    "CachedGISTEmbedLoss",
    "CachedMarginMSELoss",
    "CachedMultipleNegativesRankingLoss",
]


class CachedMultipleNegativesRankingLoss(CachedLoss):
    """Replaces sentence-transformers' loss of this name: same gradients, in less time.

    The candidates of each anchor are the positives and hard negatives of the whole batch. `forward`
    embeds chunk by chunk without graphs; the trainer's backward replays the chunks, so scaling the
    loss scales the gradient of every parameter. Rows of similar length share a chunk, which is
    trimmed to its longest row, on the side of the padding. Columns that are padded on the right and
    have the same kinds of tensors are embedded together. Unpadded inputs and packed image patches
    are cut where their rows end. Each chunk's replay is compared with its embed.

    Args:
        model: the `SentenceTransformer` to train.
        scale: multiplier of the cosine similarity, 1/temperature.
        similarity_fct: must be `sentence_transformers.util.cos_sim`.
        mini_batch_size: rows that go through the model at once.
        mini_batch_num_tokens: bound chunks by tokens instead: rows times the longest row, or the
            sum over the rows of unpadded inputs.
        gather_across_devices: use candidates of all processes. Must be True on several processes;
            each then returns the loss of the whole batch.
        directions: "query_to_doc", and any of "doc_to_query", "query_to_query" and "doc_to_doc";
            see `RetrievalLoss`.
        partition_mode: "joint", one softmax over all directions, or "per_direction", the mean of
            one for each.
        show_progress_bar: count the rows that go through the model.
        hardness_mode: negatives whose logits grow by hardness_strength times their similarity:
            "in_batch_negatives", "hard_negatives" or "all_negatives"; None for none.
        hardness_strength: 0 or more; of no effect without a mode.
        learnable_scale: learn the scale, starting from `scale`, with the trainer's optimizer.
        **options: `matryoshka_dims=None`, widths of embedding prefixes to train, instead of
            wrapping this loss in sentence-transformers' `MatryoshkaLoss`;
            `matryoshka_weights=None`, their weights, 1 each;
            `pad_to_multiple_of=1`, a multiple of tokens that chunks of padded inputs keep, so that
            a step has few shapes; `memory_budget=None`, for graphs that need no replay, see
            `GradCache`; `check_replay="error"`, "warn" or "off", what to do if a replay differs
            from its embed.

    Raises:
        ValueError: options of another loss, or that contradict each other.

    Source: Henderson et al. 2017 (arXiv 1705.00652), section 4.4; Gao et al. 2021 (2101.06983);
    for the widths Kusupati et al. 2022 (2205.13147), equation 1; for directions and hardness see
    `RetrievalLoss`.

    Example:
        from gradcache_clip.integrations.sentence_transformers import (
            CachedMultipleNegativesRankingLoss,
        )
        loss = CachedMultipleNegativesRankingLoss(model, mini_batch_size=64)
        trainer = SentenceTransformerTrainer(model, args, train_dataset=pairs, loss=loss)
        trainer.train()
    """

    contrast: Any
    fixed_options = (
        *("directions", "partition_mode", "hardness_mode", "hardness_strength"),
        *("learnable_scale", "similarity_fct"),
    )

    def __init__(
        self,
        model: nn.Module,
        scale: float = 20.0,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] = cos_sim,
        mini_batch_size: int = 32,
        mini_batch_num_tokens: int | None = None,
        gather_across_devices: bool = False,
        directions: Sequence[str] = ("query_to_doc",),
        partition_mode: PartitionMode = "joint",
        show_progress_bar: bool = False,
        hardness_mode: HardnessMode | None = None,
        hardness_strength: float = 0.0,
        *,
        learnable_scale: bool = False,
        **options: Unpack[CacheOptions],
    ) -> None:
        checks.check_scale(scale)
        checks.check_similarity(similarity_fct, cos_sim)
        check_flags(learnable_scale=learnable_scale)
        contrast = RetrievalLoss(
            directions=directions,
            partition_mode=partition_mode,
            hardness_mode=hardness_mode,
            hardness_strength=hardness_strength if hardness_mode else 0.0,
            init_logit_scale=scale,
            max_logit_scale=max(100.0, scale),
        ).requires_grad_(learnable_scale)
        if hardness_mode is not None and hardness_strength == 0:
            warnings.warn(
                f"hardness_strength: expected more than 0 with hardness_mode={hardness_mode!r}, "
                "got 0, which has no effect; set it, such as to 9.0",
                stacklevel=2,
            )
        super().__init__(
            model,
            {"contrast": contrast},
            mini_batch_size,
            mini_batch_num_tokens,
            gather_across_devices=gather_across_devices,
            show_progress_bar=show_progress_bar,
            options=options,
        )
        self.similarity_fct = similarity_fct
        self.directions, self.partition_mode = tuple(directions), partition_mode
        self.hardness_mode, self.hardness_strength = hardness_mode, hardness_strength
        self.learnable_scale = learnable_scale
        self._fixed_scale = scale

    def compute_loss_from_embeddings(
        self, columns: Sequence[Tensor], beside: None = None
    ) -> Tensor:
        """Compute the loss of C (b, D) embeddings."""
        queries, documents, *negatives = columns
        scale = None if self.learnable_scale else fixed_scale(self._fixed_scale, queries)
        loss: Tensor = self.contrast(queries, documents, stacked(negatives), scale).loss
        return loss

    @property
    def scale(self) -> float:
        """Current multiplier of the cosine similarity."""
        return self.contrast.logit_scale.item() if self.learnable_scale else self._fixed_scale

    @scale.setter
    def scale(self, value: float) -> None:
        checks.check_scale(value)
        if self.learnable_scale:
            raise ValueError(
                f"scale: expected a fixed one, got learnable_scale=True and {value}; build a new "
                "loss that starts from there"
            )
        self._fixed_scale = value

    @property
    def temperature(self) -> float:
        """1/scale."""
        return 1.0 / self.scale

    def get_config_dict(self) -> dict[str, Any]:
        """Return the options, for the model card."""
        return {
            "scale": self.scale,
            "similarity_fct": cos_sim.__name__,
            "gather_across_devices": self.gather_across_devices,
            "directions": self.directions,
            "partition_mode": self.partition_mode,
            "hardness_mode": self.hardness_mode,
            "hardness_strength": self.hardness_strength,
            "learnable_scale": self.learnable_scale,
            **self._shared_config(),
        }

    @property
    def citation(self) -> str:
        """BibTeX of the method, for the model card."""
        return """
@misc{gao2021scaling,
    title={Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup},
    author={Luyu Gao and Yunyi Zhang and Jiawei Han and Jamie Callan},
    year={2021},
    eprint={2101.06983},
    archivePrefix={arXiv},
    primaryClass={cs.LG}
}
"""
