"""A loss for sentence-transformers' trainer: in-batch negatives with gradient caching.

C columns (anchors, positives, negatives), b rows of this rank, D width.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from sentence_transformers.util import cos_sim
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gradcache_clip.cache import ByLength, GradCache
from gradcache_clip.cache.deferred import deferred_step
from gradcache_clip.cache.graph_budget import MemoryBudget
from gradcache_clip.cache.trim_check import PaddingCountsError
from gradcache_clip.distributed import DDPStrategy, LocalStrategy
from gradcache_clip.integrations import sentence_transformers_checks as checks
from gradcache_clip.integrations import sentence_transformers_inputs as inputs
from gradcache_clip.integrations.arguments import ENGINE_ARGUMENTS, translate_errors
from gradcache_clip.losses import InfoNCELoss, MatryoshkaLoss

_OWN_NAMES = ENGINE_ARGUMENTS | {
    f"or pass PackedPatches({name}_token_id=...) for input_ids, or "
    f"PackedPatches({name}s_per_row=...) with a column of counts": f"or pass num_{name}s_per_sample"
    for name in ("image", "video")
}
"""Texts in errors of the engine -> texts for this loss."""

_PADDING_COUNTS = (
    "CachedMultipleNegativesRankingLoss: features of rows padded on the left depend on their "
    "padding, as those of a model that numbers columns from the left; chunks keep the width of the "
    "batch. Set padding_side='right' to trim them"
)


class CachedMultipleNegativesRankingLoss(nn.Module):
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
        directions: ("query_to_doc",), or ("query_to_doc", "doc_to_query") with
            `partition_mode="per_direction"`.
        partition_mode: "joint" or "per_direction", which are the same for one direction.
        matryoshka_dims: widths of embedding prefixes to train, instead of wrapping this loss in
            sentence-transformers' `MatryoshkaLoss`; None for the whole width only.
        matryoshka_weights: weight of the loss at each of these widths; 1 each when None.
        pad_to_multiple_of: keep a multiple of this many tokens in chunks of padded inputs, so that
            a step has few shapes.
        learnable_scale: learn the scale, starting from `scale`, with the trainer's optimizer.
        memory_budget: memory for graphs that need no replay; see `GradCache`.
        replay_check: "error", "warn" or "off": what to do if a replay differs from its embed.

    Raises:
        ValueError: options of another loss.

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

    # Losses that wrap another one read this: the backward repeats the forward.
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
        pad_to_multiple_of: int = 1,
        learnable_scale: bool = False,
        memory_budget: MemoryBudget = None,
        replay_check: Literal["error", "warn", "off"] = "error",
    ) -> None:
        super().__init__()
        checks.check_model(model)
        checks.check_directions(similarity_fct, directions, partition_mode)
        flags = {"gather_across_devices": gather_across_devices, "learnable_scale": learnable_scale}
        checks.check_numbers(scale, mini_batch_size, mini_batch_num_tokens, flags)
        checks.check_multiple(pad_to_multiple_of)
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
        self.pad_to_multiple_of = pad_to_multiple_of
        self.gather_across_devices = gather_across_devices
        self.directions, self.partition_mode = tuple(directions), partition_mode
        self.learnable_scale = learnable_scale
        self.memory_budget, self.replay_check = memory_budget, replay_check
        self._fixed_scale = scale
        self._padding_counts = False
        self._caches: dict[tuple[Any, ...], GradCache] = {}

    def forward(
        self, sentence_features: Iterable[Mapping[str, Any]], labels: Tensor | None = None
    ) -> Tensor:
        """Compute the loss of a batch; its backward replays the chunks.

        Args:
            sentence_features: C columns of b rows each: anchors, positives, and any number of
                columns of negatives, which are negatives of every anchor.
            labels: ignored; row i of anchors and positives form a pair.

        Raises:
            ValueError: fewer than two columns, several processes without `gather_across_devices`,
                or `mini_batch_num_tokens` for a column without tokens.
            TypeError: a model without pooling, or another loss around this one.
        """
        columns = [dict(features) for features in sentence_features]
        checks.check_columns(columns)
        checks.check_not_wrapped_in_a_loss(self.model)
        strategy, device = self._strategy(), _device_of(columns)
        try:
            return self._loss(columns, strategy, device)
        except PaddingCountsError:
            if not strategy.anywhere(inputs.is_padded_on_the_left(columns), device):
                raise
        warnings.warn(_PADDING_COUNTS, stacklevel=2)
        self._padding_counts = True
        return self._loss(columns, strategy, device)

    def _loss(
        self, columns: list[inputs.Features], strategy: LocalStrategy, device: torch.device
    ) -> Tensor:
        # Ranks take the same steps, also where rows of one have images and those of another none.
        together = None if self._padding_counts else inputs.merged(columns)
        apart = strategy.anywhere(together is None, device)
        given = columns if apart or together is None else [together]
        odd = apart and strategy.anywhere(any(map(inputs.keeps_columns, columns)), device)
        budget, whole = self.mini_batch_num_tokens, self._padding_counts or odd
        multiple = self.pad_to_multiple_of
        orders = tuple(inputs.sorting(each, budget, multiple, whole=whole) for each in given)
        cache = self._cache(orders, len(columns), strategy)
        with translate_errors(_OWN_NAMES):
            loss: Tensor = deferred_step(cache, *({"input": each} for each in given)).loss
        return loss

    def _cache(
        self, sorting: tuple[ByLength | None, ...], columns: int, strategy: LocalStrategy
    ) -> GradCache:
        """Return the cache for this kind of batch: a cache checks some things in its first step."""
        checks.check_wrapper(self.model, len(sorting))
        options = self.mini_batch_size, self.memory_budget, self.replay_check
        kind = sorting, columns, id(self.model), *options
        if kind not in self._caches:
            self._caches[kind] = GradCache(
                [self.model] * len(sorting),
                partial(self._contrast, columns=columns),
                chunk_size=self.mini_batch_size,
                get_features=checks.sentence_embedding,
                memory_budget=self.memory_budget,
                rows=inputs.divided,
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

    def _strategy(self) -> LocalStrategy:
        checks.check_place(self.model, gathers=self.gather_across_devices)
        wrapped = isinstance(self.model, DistributedDataParallel)
        # On several processes without a wrapper this is an evaluation, with nothing to reduce.
        return DDPStrategy() if wrapped else LocalStrategy(reduce_myself=True)

    @property
    def calculate_loss(self) -> Callable[..., Tensor]:
        """Raise TypeError: only a loss that wraps this one reads this property."""
        raise TypeError(
            "CachedMultipleNegativesRankingLoss: expected to be used by itself, got another loss "
            "around it, such as MatryoshkaLoss; for that one pass matryoshka_dims= here, for "
            "another wrap sentence-transformers' own loss"
        )

    @property
    def scale(self) -> float:
        """Current multiplier of the cosine similarity."""
        return self.contrast.logit_scale.item() if self.learnable_scale else self._fixed_scale

    @property
    def temperature(self) -> float:
        """1/scale."""
        return 1.0 / self.scale

    def get_config_dict(self) -> dict[str, Any]:
        """Return the options, for the model card."""
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
            "pad_to_multiple_of": self.pad_to_multiple_of,
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


def _device_of(columns: Sequence[inputs.Features]) -> torch.device:
    tensors = (x for features in columns for x in features.values() if isinstance(x, Tensor))
    return next((tensor.device for tensor in tensors), torch.device("cpu"))
