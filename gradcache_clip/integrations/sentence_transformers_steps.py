"""Chunked steps over the columns of a batch.

C columns (anchors, positives, negatives), b rows of this rank, D width.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import tqdm
from torch import Tensor, nn

from gradcache_clip.cache import ByLength, GradCache
from gradcache_clip.cache.deferred import deferred_step
from gradcache_clip.cache.graph_budget import MemoryBudget
from gradcache_clip.cache.padding_check import PaddingCountsError
from gradcache_clip.distributed import LocalStrategy
from gradcache_clip.integrations import sentence_transformers_checks as checks
from gradcache_clip.integrations import sentence_transformers_inputs as inputs
from gradcache_clip.integrations.arguments import ENGINE_ARGUMENTS, translate_errors

_OWN_NAMES = ENGINE_ARGUMENTS | {
    f"or pass PackedPatches({name}_token_id=...) for input_ids, or "
    f"PackedPatches({name}s_per_row=...) with a column of counts": f"or pass num_{name}s_per_sample"
    for name in ("image", "video")
}
"""Texts in errors of the engine -> texts for these losses."""

_PADDING_COUNTS = (
    "features of rows padded on the left depend on their padding, as those of a model that numbers "
    "columns from the left; chunks keep the width of the batch. Set padding_side='right' to trim "
    "them"
)

Compare = Callable[..., Tensor]
"""Takes a list of C (b, D) tensors and what else a step is given."""


class Chunking(NamedTuple):
    """How the rows of a batch are cut, and how their chunks are replayed."""

    rows: int
    tokens: int | None
    multiple: int
    memory_budget: MemoryBudget
    check_replay: Literal["error", "warn", "off"]
    show_progress_bar: bool


class Batch(NamedTuple):
    """Columns that are embedded together."""

    features: inputs.Features
    columns: int
    """How many, one after the other."""
    keeps_width: bool
    """Whether its chunks are as wide as it is."""


class ColumnSteps:
    """Steps of one model: all columns chunk by chunk, then `compare` over their embeddings.

    Args:
        name: of the model in messages.
        compare: computes the result of a step from the embeddings of the columns.
    """

    def __init__(self, name: str, compare: Compare) -> None:
        self._name, self._compare = name, compare
        self._padding_counts = False
        self._caches: dict[tuple[Any, ...], GradCache] = {}
        self._bar: Any = None

    def __call__(
        self,
        model: nn.Module,
        columns: list[inputs.Features],
        strategy: LocalStrategy,
        chunking: Chunking,
        given: Mapping[str, Any],
    ) -> Tensor:
        """Return what `compare` does; inside `torch.no_grad()` it has no graph."""
        step = partial(self._step, model, columns, strategy, chunking, given)
        device = device_of(columns)
        self._bar = tqdm.tqdm(desc="Embed", unit="row", disable=not chunking.show_progress_bar)
        try:
            return step(device)
        except PaddingCountsError:
            if not strategy.anywhere(inputs.is_padded_on_the_left(columns), device):
                raise
        warnings.warn(f"{self._name}: {_PADDING_COUNTS}", stacklevel=3)
        self._padding_counts = True
        return step(device)

    def _step(
        self,
        model: nn.Module,
        columns: list[inputs.Features],
        strategy: LocalStrategy,
        chunking: Chunking,
        given: Mapping[str, Any],
        device: torch.device,
    ) -> Tensor:
        batches = self._batches(columns, strategy, device)
        sorting = [
            inputs.sorting(
                batch.features, chunking.tokens, chunking.multiple, whole=batch.keeps_width
            )
            for batch in batches
        ]
        cache = self._cache(model, batches, tuple(sorting), strategy, chunking)
        with translate_errors(_OWN_NAMES):
            step = deferred_step(cache, *map(self._given, batches), loss_kwargs=given)
        result: Tensor = step.loss
        return result

    def _batches(
        self, columns: list[inputs.Features], strategy: LocalStrategy, device: torch.device
    ) -> list[Batch]:
        # Ranks take the same steps, also where rows of one have images and those of another none.
        together = None if self._padding_counts else inputs.merged(columns)
        apart = strategy.anywhere(together is None, device)
        if together is not None and not apart:
            return [Batch(together, len(columns), keeps_width=False)]
        odd = strategy.anywhere(any(map(inputs.keeps_columns, columns)), device)
        return [Batch(each, 1, keeps_width=self._padding_counts or odd) for each in columns]

    def _given(self, batch: Batch) -> dict[str, Any]:
        """Return what the model is called with."""
        return {"input": batch.features}

    def _cache(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        sorting: tuple[ByLength | None, ...],
        strategy: LocalStrategy,
        chunking: Chunking,
    ) -> GradCache:
        """Return the cache for this kind of batch: a cache checks some things in its first step."""
        checks.check_wrapper(model, len(batches))
        counts = tuple(batch.columns for batch in batches)
        kind = sorting, counts, id(model), *chunking
        if kind not in self._caches:
            self._caches[kind] = GradCache(
                [model] * len(batches),
                partial(self._compared, counts),
                chunk_size=chunking.rows,
                get_features=self._embedding,
                memory_budget=chunking.memory_budget,
                rows=inputs.divided,
                sort_by_length=sorting,
                strategy=strategy,
                check_replay=chunking.check_replay,
            )
        return self._caches[kind]

    def _compared(self, counts: Sequence[int], *features: Any, **given: Any) -> Tensor:
        pairs = zip(features, counts, strict=True)
        return self._compare([part for each, n in pairs for part in self._split(each, n)], **given)

    def _split(self, features: Any, columns: int) -> Iterable[Any]:
        """Divide the features of a batch into those of its columns."""
        parts: tuple[Tensor, ...] = features.chunk(columns)
        return parts

    def _embedding(self, output: Any) -> Tensor:
        embedding = checks.sentence_embedding(output)
        self._bar.update(len(embedding))
        return embedding


def device_of(columns: Sequence[inputs.Features]) -> torch.device:
    tensors = (x for features in columns for x in features.values() if isinstance(x, Tensor))
    return next((tensor.device for tensor in tensors), torch.device("cpu"))
