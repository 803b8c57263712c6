"""The steps that a verification compares: the cached one, and plain ones in a single graph."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gradcache_clip.cache.checks import (
    check_inputs,
    check_plain_backward,
    check_strategy,
    one_for_each,
    scalar_loss_of,
)
from gradcache_clip.cache.chunks import Chunk, row_count
from gradcache_clip.cache.grad_cache import GradCache
from gradcache_clip.cache.nested import count_rows
from gradcache_clip.cache.random_state import RandomState
from gradcache_clip.cache.retained import GraphBudget
from gradcache_clip.cache.settings import (
    autocast_off,
    forget_autocast_casts,
    kernels_as_with_gradients,
)
from gradcache_clip.cache.step import CachedStep, trained_modules
from gradcache_clip.cache.tower import Tower, device_of
from gradcache_clip.cache.verify_state import Gradients, Start
from gradcache_clip.distributed.graph import leaves_behind
from gradcache_clip.distributed.strategies import innermost

# Over a single chunk nothing could go wrong.
_AT_LEAST_CHUNKS = 4

Cut = list[list[Chunk]]
"""The chunks of every input."""


class Outcome(NamedTuple):
    """What a step came to; features in the order of the caller's rows."""

    gradients: Gradients
    loss: Tensor
    features: list[Tensor]
    before_loss: RandomState


class Trial:
    """One batch, and the steps that are taken on it; each starts from the same state."""

    def __init__(
        self, cache: GradCache, inputs: tuple[Any, ...], loss_kwargs: Mapping[str, Any]
    ) -> None:
        check_plain_backward(cache.strategy, "verify", "verify the encoders before wrapping them")
        self._cache = _with_small_chunks(cache, inputs)
        self._inputs, self._loss_kwargs = inputs, loss_kwargs
        self.strategy = cache.strategy
        towers = self.towers()
        check_inputs(towers)
        check_strategy(self.strategy, towers)
        self.start = Start(self._cache._modules_with_gradients(towers), towers)
        self.device = device_of(towers)
        self.cut = [tower.chunks for tower in towers]

    def towers(self) -> list[Tower]:
        """Newly made, for a step leaves things behind in its towers."""
        return self._cache._towers(self._inputs)

    def whole(self) -> Cut:
        """All rows of an input at once."""
        return [[Chunk(slice(0, row_count(chunks)))] for chunks in self.cut]

    def named_leaves(self) -> dict[int, tuple[str, Tensor]]:
        """Leaves that got a gradient so far, by id, with the names that a person knows them by."""
        named = {id(kept.tensor): path for path, kept in self.start.inputs.items()}
        for prefix, module in self._named_modules():
            for name, parameter in innermost(module).named_parameters():
                named.setdefault(id(parameter), f"{prefix}{name}")
        return {
            id(leaf): (named.get(id(leaf), f"a tensor of a function ({number})"), leaf)
            for number, leaf in enumerate(self.start.leaves)
        }

    def _named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        one = isinstance(self._cache.encoders, nn.Module)
        for index, tower in enumerate(self.towers()):
            yield "" if one else f"encoder {index}: ", tower.bare_module
            if isinstance(tower.get_features, nn.Module):
                yield f"get_features {index}: ", tower.get_features
        if isinstance(self._cache.loss, nn.Module):
            yield "loss: ", self._cache.loss

    def cached(self) -> tuple[Outcome, list[Tower]]:
        """The step of the engine, and its towers, whose chunks know their random state."""
        self.start.restore()
        towers = self.towers()
        step = CachedStep(
            towers, self._cache.loss, self.strategy, snapshot=self.start, check_replay=False
        )
        output, _ = step.run(GraphBudget(None, self.device), self._loss_kwargs)
        features = [feature.detach() for tower in towers for feature in tower.features]
        outcome = Outcome(
            self.start.gradients(), output.loss.detach(), features, self.start.random_state()
        )
        return outcome, towers

    def plain(
        self,
        cut: Cut,
        *,
        over_chunks: bool = False,
        like: Outcome | None = None,
        rounded_as: Sequence[Tensor] = (),
    ) -> Outcome:
        """One graph, one backward.

        `over_chunks`: a frozen trunk runs first and chunks repeat their draws, as in the engine.
        `like`: the loss draws the random numbers that it drew there. `rounded_as`: the loss is
        given these features, equal up to rounding; those returned are the step's own.
        """
        self.start.restore()
        forget_autocast_casts()
        towers = self.towers()
        modules = [tower.module for tower in towers]
        with (
            self.strategy.stepping(trained_modules(towers)),
            self.strategy.replaying(modules, finished={*modules}),
            kernels_as_with_gradients(),
        ):
            flat = [
                self._features(tower, chunks, over_chunks)
                for tower, chunks in zip(towers, cut, strict=True)
            ]
            before_loss = self.start.random_state()
            if like is not None:
                like.before_loss.restore()
            all_features = [feature for parts in flat for feature in parts]
            given = iter(_with_values(all_features, rounded_as) if rounded_as else all_features)
            features = [
                pytree.tree_unflatten([next(given) for _ in parts], tower.structure)
                for tower, parts in zip(towers, flat, strict=True)
            ]
            loss = scalar_loss_of(self._cache.loss(*features, **self._loss_kwargs))
            self.start.set_aside(leaves_behind([loss]))
            with autocast_off({feature.device.type for feature in all_features} | {"cpu"}):
                self.strategy.scale_loss(loss).backward()
        detached = [feature.detach() for feature in all_features]
        return Outcome(self.start.gradients(), loss.detach(), detached, before_loss)

    def _features(self, tower: Tower, chunks: Sequence[Chunk], over_chunks: bool) -> list[Tensor]:
        if over_chunks:
            tower._run_trunk()
        parts = []
        for chunk in chunks:
            if over_chunks:
                # A cast that chunks share would gather their gradients in 16 bits.
                forget_autocast_casts()
                # By number, for chunks that are views of one tensor could not be written to.
                chunk = replace(chunk, rows=indices(chunk))
            parts.append(tower.replay(chunk))
        features = [torch.cat(part) for part in zip(*parts, strict=True)]
        factor = self.strategy.gradient_factor()
        return [_times(_in_order(feature, chunks), factor) for feature in features]


def reversed_rows(cut: Cut) -> Cut:
    """A whole batch, last row first: the same sums in another order."""
    return [[Chunk(torch.arange(row_count(chunks) - 1, -1, -1))] for chunks in cut]


def reversed_chunks(cut: Cut) -> Cut:
    """The last chunk first."""
    return [chunks[::-1] for chunks in cut]


def indices(chunk: Chunk) -> Tensor:
    """Rows of a chunk as numbers."""
    rows = chunk.rows
    return rows if isinstance(rows, Tensor) else torch.arange(rows.start, rows.stop)


def _with_small_chunks(cache: GradCache, inputs: Sequence[Any]) -> GradCache:
    """A copy that cuts each input into several chunks and remembers no chunk size."""
    cache._modules_for(len(inputs))
    small = copy.copy(cache)
    rows = [count_rows(given, f"input {index}") for index, given in enumerate(inputs)]
    wished = rows if cache.chunk_size == "auto" else cache.chunk_size
    sizes = one_for_each(wished, len(inputs), "chunk_size")
    small.chunk_size = tuple(
        min(size, _small_size(count)) for size, count in zip(sizes, rows, strict=True)
    )
    sorting = one_for_each(cache.sort_by_length, len(inputs), "sort_by_length")
    small.sort_by_length = [each and replace(each, max_tokens=None) for each in sorting]
    return small


def _small_size(rows: int) -> int:
    size = max(1, -(-rows // _AT_LEAST_CHUNKS))
    # Batch norm refuses a last chunk of one row.
    return size + 1 if size > 1 and rows % size == 1 else size


def _in_order(feature: Tensor, chunks: Sequence[Chunk]) -> Tensor:
    if all(isinstance(chunk.rows, slice) for chunk in chunks):
        starts = [chunk.rows.start for chunk in chunks if isinstance(chunk.rows, slice)]
        if starts == sorted(starts):
            return feature
    order = torch.cat([indices(chunk) for chunk in chunks])
    return feature[order.argsort().to(feature.device)]


def _with_values(features: Sequence[Tensor], values: Sequence[Tensor]) -> list[Tensor]:
    """The values of others, and the gradients of these."""
    pairs = zip(features, values, strict=True)
    return [
        feature + (value - feature.detach()) if feature.is_floating_point() else feature
        for feature, value in pairs
    ]


def _times(feature: Tensor, factor: float) -> Tensor:
    """The same features, whose gradient is multiplied; DDP will divide by the world size."""
    if factor != 1 and feature.requires_grad:
        feature.register_hook(lambda gradient: gradient * factor)
    return feature
