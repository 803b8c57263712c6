"""The base of losses for models that return a vector for each token, and their steps.

C columns (queries, documents, K columns of negatives), b rows of this rank, T tokens of the longest
row of a column, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradcache_clip.cache import GradCache
from gradcache_clip.distributed.wrappers import innermost
from gradcache_clip.integrations.sentence_transformers_base import CachedLoss, CacheOptions
from gradcache_clip.integrations.sentence_transformers_inputs import (
    Features,
    is_padded_on_the_left,
    width_of,
)
from gradcache_clip.integrations.sentence_transformers_steps import Batch, ColumnSteps


class TokenOptions(CacheOptions, total=False):
    """Keywords of all losses over tokens; see `CachedLoss`."""

    mini_batch_size: int
    mini_batch_num_tokens: int | None
    gather_across_devices: bool
    show_progress_bar: bool


class Tokens(NamedTuple):
    """Vectors of the tokens of a column."""

    vectors: Tensor
    """(b, T, D), of K columns (b, K, T, D)."""
    mask: Tensor
    """bool, the shape of the vectors without D: True for tokens that are scored."""

    def padded(self, width: int, *, on_the_left: bool = False) -> Tokens:
        """Pad to `width` tokens at least."""
        missing = max(0, width - self.vectors.shape[1])
        sides = (missing, 0) if on_the_left else (0, missing)
        return Tokens(F.pad(self.vectors, (0, 0, *sides)), F.pad(self.mask, sides))


class TokenSteps(ColumnSteps):
    """Steps of a model with a vector for each token: `compare` is given `Tokens` of each column."""

    def _batches(self, columns: list[Features], *place: Any) -> list[Batch]:
        """Embed queries apart: they are shorter, and have a task of their own."""
        queries, *documents = columns
        return [*super()._batches([queries], *place), *super()._batches(documents, *place)]

    def _given(self, batch: Batch) -> dict[str, Any]:
        task = {"task": batch.features["task"]} if "task" in batch.features else {}
        return {**super()._given(batch), **task}

    def _cache(self, model: nn.Module, batches: Sequence[Batch], *others: Any) -> GradCache:
        cache = super()._cache(model, batches, *others)
        # A step is replayed in its backward, perhaps after that of another one with other widths.
        shapes = [(width_of(x), is_padded_on_the_left([x])) for x, *_ in batches]
        read = [partial(self.read, innermost(model), is_query=i == 0) for i in range(len(batches))]
        pairs = zip(read, shapes, strict=True)
        return cache.with_get_features([partial(self._tokens, *pair) for pair in pairs])

    def _tokens(
        self, read: Callable[[Any], Tokens], shape: tuple[int, bool], output: Any
    ) -> Tokens:
        vectors, mask = read(output)
        self._bar.update(len(mask))
        # Vectors of padding may depend on the chunk. Chunks are trimmed; the cache has one shape.
        tokens = Tokens(vectors.masked_fill(~mask[..., None], 0), mask)
        return tokens.padded(shape[0], on_the_left=shape[1])

    def read(self, model: nn.Module, output: Any, *, is_query: bool) -> Tokens:
        """Take the vectors, and which are scored, from the model's output."""
        given = output if isinstance(output, Mapping) else {}
        vectors, mask = (given.get(key) for key in ("token_embeddings", "attention_mask"))
        if not isinstance(vectors, Tensor) or not isinstance(mask, Tensor):
            got = ", ".join(map(str, given)) or type(output).__name__
            raise TypeError(
                "model: expected an output with token_embeddings and attention_mask, got "
                f"{got}; pass a model with a vector for each token, such as a MultiVectorEncoder"
            )
        return Tokens(vectors, mask.bool())

    def _split(self, features: Tokens, columns: int) -> Iterable[Tokens]:
        return map(Tokens._make, zip(*(each.chunk(columns) for each in features), strict=True))


class TokenLoss(CachedLoss):
    """The base of losses over `Tokens`.

    Args:
        model: the model to train.
        contrast: `MaxSimLoss` or `MaxSimDistillationLoss`.
        options: as in `CachedLoss`; `mini_batch_size` is 32 by default.
    """

    kind_of_steps = TokenSteps
    contrast: Any

    def __init__(self, model: nn.Module, contrast: nn.Module, options: TokenOptions) -> None:
        further: dict[str, Any] = {**options}
        chosen = {
            "mini_batch_size": further.pop("mini_batch_size", 32),
            "mini_batch_num_tokens": further.pop("mini_batch_num_tokens", None),
            "gather_across_devices": further.pop("gather_across_devices", False),
            "show_progress_bar": further.pop("show_progress_bar", False),
        }
        contrast.requires_grad_(False)
        rest = cast("CacheOptions", further)
        super().__init__(model, {"contrast": contrast}, **chosen, options=rest)

    def beside(self, columns: list[Features], labels: Tensor | None) -> Tensor | None:
        """Pass the labels on."""
        return labels


def max_sim(loss: nn.Module, columns: Sequence[Tokens], **given: Any) -> Tensor:
    """Call `MaxSimLoss` or `MaxSimDistillationLoss` with C columns."""
    queries, documents, *rest = columns
    negatives = _stacked(rest) if rest else None
    result: Tensor = loss(
        queries.vectors,
        documents.vectors,
        None if negatives is None else negatives.vectors,
        query_mask=queries.mask,
        document_mask=documents.mask,
        hard_negative_mask=None if negatives is None else negatives.mask,
        **given,
    ).loss
    return result


def _stacked(columns: Sequence[Tokens]) -> Tokens:
    width = max(each.mask.shape[1] for each in columns)
    padded = [each.padded(width) for each in columns]
    return Tokens(*(torch.stack(parts, 1) for parts in zip(*padded, strict=True)))
