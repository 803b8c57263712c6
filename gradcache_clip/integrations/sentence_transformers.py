"""A loss for sentence-transformers' trainer: in-batch negatives by gradient caching.

C columns (anchors, positives, negatives), b rows of this rank, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from sentence_transformers.base.losses.merged_forward import merge_feature_batches
from sentence_transformers.util import cos_sim
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gradcache_clip.cache import ByLength, GradCache
from gradcache_clip.cache.deferred import deferred_step
from gradcache_clip.cache.graph_budget import MemoryBudget
from gradcache_clip.distributed import DDPStrategy, LocalStrategy
from gradcache_clip.integrations import sentence_transformers_checks as checks
from gradcache_clip.integrations.arguments import ENGINE_ARGUMENTS, translate_errors
from gradcache_clip.losses import InfoNCELoss, MatryoshkaLoss

Features = dict[str, Any]
"""A column as the model takes it: token ids and whatever else its tokenizer returned."""


_TOKENS = {"attention_mask", "input_ids", "token_type_ids", "position_ids", "inputs_embeds"}


class CachedMultipleNegativesRankingLoss(nn.Module):
    """In place of sentence-transformers' loss of this name: the same gradients, sooner.

    Each anchor looks for its positive among the positives and hard negatives of the whole batch.
    `forward` embeds chunk by chunk without graphs; the trainer's backward replays the chunks, so a
    factor that the trainer puts on the loss reaches every parameter. Columns that the tokenizer
    returns alike are cut together, rows of similar length into one chunk, and each chunk is
    trimmed to its longest row. Each chunk's replay is compared with its embed.

    Args:
        model: the `SentenceTransformer` that is trained.
        scale: multiplier of the cosine similarity, 1/temperature.
        similarity_fct: only `sentence_transformers.util.cos_sim`.
        mini_batch_size: rows that go through the model at once.
        mini_batch_num_tokens: instead, rows times the longest of them, padding included.
        gather_across_devices: columns of all processes are candidates. On several processes it
            must be True, and the loss is that of the whole batch on each of them.
        directions: ("query_to_doc",), or ("query_to_doc", "doc_to_query") with
            `partition_mode="per_direction"`.
        partition_mode: "joint" or "per_direction", which for one direction are the same.
        matryoshka_dims: widths whose prefixes are to work by themselves, in place of
            sentence-transformers' `MatryoshkaLoss` around this loss; None for the whole width.
        matryoshka_weights: of the loss of each of these widths; 1 each when None.
        learnable_scale: learn the scale, from `scale` on; the trainer's optimizer finds it.
        memory_budget: memory for graphs that need no replay; see `GradCache`.
        replay_check: "error", "warn" or "off", if a replay differs from its embed.

    Raises:
        ValueError: options that would be another loss, or a model whose inputs have no rows.

    Source: Henderson et al. 2017 (arXiv 1705.00652), section 4.4; Gao et al. 2021 (2101.06983);
    for the widths Kusupati et al. 2022 (2205.13147), equation 1.

    Example:
        from gradcache_clip.integrations.sentence_transformers import (
            CachedMultipleNegativesRankingLoss,
        )
        loss = CachedMultipleNegativesRankingLoss(model, mini_batch_size=64)
        trainer = SentenceTransformerTrainer(model, args, train_dataset=pairs, loss=loss)
        trainer.train()
    """

    # The forward is repeated in the backward, which losses that wrap another one ask about.
    uses_gradient_cache = True

    def __init__(
        self,
        model: nn.Module,
        scale: float = 20.0,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] = cos_sim,
        mini_batch_size: int = 32,
        mini_batch_num_tokens: int | None = None,
        gather_across_devices: bool = False,
        directions: Sequence[str] = ("query_to_doc",),
        partition_mode: str = "joint",
        *,
        matryoshka_dims: Sequence[int] | None = None,
        matryoshka_weights: Sequence[float] | None = None,
        learnable_scale: bool = False,
        memory_budget: MemoryBudget = None,
        replay_check: Literal["error", "warn", "off"] = "error",
    ) -> None:
        super().__init__()
        checks.check_model(model)
        checks.check_directions(similarity_fct, directions, partition_mode)
        flags = {"gather_across_devices": gather_across_devices, "learnable_scale": learnable_scale}
        checks.check_numbers(scale, mini_batch_size, mini_batch_num_tokens, flags)
        checks.check_engine_options(memory_budget, replay_check)
        checks.check_widths(matryoshka_dims, matryoshka_weights, model)
        self.model = model
        contrast = InfoNCELoss(
            symmetric=set(directions) == checks.BOTH_WAYS,
            init_logit_scale=scale,
            max_logit_scale=max(100.0, scale),
        ).requires_grad_(learnable_scale)
        self.contrast = _over_widths(contrast, matryoshka_dims, matryoshka_weights)
        self.matryoshka_dims, self.matryoshka_weights = matryoshka_dims, matryoshka_weights
        self.mini_batch_size, self.mini_batch_num_tokens = mini_batch_size, mini_batch_num_tokens
        self.gather_across_devices = gather_across_devices
        self.directions, self.partition_mode = tuple(directions), partition_mode
        self.learnable_scale = learnable_scale
        self.memory_budget, self.replay_check = memory_budget, replay_check
        self._fixed_scale = scale
        self._caches: dict[tuple[Any, ...], GradCache] = {}

    def forward(
        self, sentence_features: Iterable[Mapping[str, Any]], labels: Tensor | None = None
    ) -> Tensor:
        """Loss of a batch, whose backward replays the chunks.

        Args:
            sentence_features: C columns of b rows each: anchors, positives, and any number of
                columns of negatives, which are negatives of every anchor.
            labels: not used; row i of anchors and positives belongs together.

        Raises:
            ValueError: fewer than two columns, flattened inputs, processes that are not joined, or
                rows padded on the left under `mini_batch_num_tokens`.
            TypeError: a model without pooling, or another loss around this one.
        """
        columns = [dict(features) for features in sentence_features]
        checks.check_columns(columns)
        checks.check_not_wrapped_in_a_loss(self.model)
        given = _merged(columns)
        cache = self._cache(tuple(map(self._sorting, given)), len(columns))
        with translate_errors(ENGINE_ARGUMENTS):
            loss: Tensor = deferred_step(cache, *({"input": features} for features in given)).loss
        return loss

    def _cache(self, sorting: tuple[ByLength | None, ...], columns: int) -> GradCache:
        """One for each kind of batch, for what a cache checks in its first step only."""
        inputs = len(sorting)
        strategy = self._strategy(inputs)
        options = self.mini_batch_size, self.memory_budget, self.replay_check
        kind = sorting, columns, id(self.model), *options
        if kind not in self._caches:
            self._caches[kind] = GradCache(
                [self.model] * inputs,
                partial(self._contrast, columns=columns),
                chunk_size=self.mini_batch_size,
                get_features=checks.sentence_embedding,
                memory_budget=self.memory_budget,
                sort_by_length=sorting,
                strategy=strategy,
                replay_check=self.replay_check,
            )
        return self._caches[kind]

    def _contrast(self, *features: Tensor, columns: int) -> Tensor:
        queries, documents, *negatives = torch.cat(features).chunk(columns)
        scale = None
        if not self.learnable_scale:
            scale = torch.full((), self._fixed_scale, dtype=torch.float64, device=queries.device)
        hard = torch.cat(negatives) if negatives else None
        loss: Tensor = self.contrast(queries, documents, hard, scale).loss
        return loss

    def _sorting(self, features: Features) -> ByLength | None:
        """By length where rows of tokens, and of nothing else, are padded on the right."""
        if not _padded_on_the_right(features):
            checks.check_no_tokens(self.mini_batch_num_tokens)
            return None
        return ByLength(max_tokens=self.mini_batch_num_tokens)

    def _strategy(self, inputs: int) -> LocalStrategy:
        checks.check_place(self.model, gathers=self.gather_across_devices)
        checks.check_wrapper(self.model, inputs)
        wrapped = isinstance(self.model, DistributedDataParallel)
        # Several processes without a wrapper only evaluate: there is nothing to reduce.
        return DDPStrategy() if wrapped else LocalStrategy(reduce_myself=True)

    @property
    def calculate_loss(self) -> Callable[..., Tensor]:
        """None: losses that wrap a cached loss look here for its parts."""
        raise TypeError(
            "CachedMultipleNegativesRankingLoss: expected to be used by itself, got another loss "
            "around it, such as MatryoshkaLoss; for that one pass matryoshka_dims= here, for "
            "another wrap sentence-transformers' own loss"
        )

    @property
    def scale(self) -> float:
        """The multiplier of the cosine similarity, as it is now."""
        return self.contrast.logit_scale.item() if self.learnable_scale else self._fixed_scale

    @property
    def temperature(self) -> float:
        """1/scale."""
        return 1.0 / self.scale

    def get_config_dict(self) -> dict[str, Any]:
        """The options, for the model card."""
        return {
            "scale": self.scale,
            "similarity_fct": cos_sim.__name__,
            "mini_batch_size": self.mini_batch_size,
            "mini_batch_num_tokens": self.mini_batch_num_tokens,
            "gather_across_devices": self.gather_across_devices,
            "directions": self.directions,
            "partition_mode": self.partition_mode,
            "matryoshka_dims": self.matryoshka_dims,
            "matryoshka_weights": self.matryoshka_weights,
            "learnable_scale": self.learnable_scale,
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


def _over_widths(
    loss: InfoNCELoss, dims: Sequence[int] | None, weights: Sequence[float] | None
) -> InfoNCELoss | MatryoshkaLoss:
    return loss if dims is None else MatryoshkaLoss(loss, dims, weights)


def _merged(columns: list[Features]) -> list[Features]:
    """All columns as one, below each other, if they are alike and can be trimmed again."""
    trimmed = all(map(_padded_on_the_right, columns))
    merged = merge_feature_batches(columns) if trimmed else None
    return columns if merged is None else [merged]


def _padded_on_the_right(features: Features) -> bool:
    """Whether tokens are, and nothing else has as many columns, which must not be trimmed."""
    mask = features.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return False
    wide = (name for name, x in features.items() if isinstance(x, Tensor) and x.ndim > 1)
    if any(features[name].shape[1] == mask.shape[1] for name in {*wide} - _TOKENS):
        return False
    kept = mask != 0
    return not bool((kept[:, 1:] & ~kept[:, :-1]).any())
