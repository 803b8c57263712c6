"""Prepare a step before anything runs: for `GradCache`, `deferred_step` and `verify`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import nn

from gradcache_clip.cache.batch_tree import count_rows
from gradcache_clip.cache.checks import (
    check_inputs,
    check_strategy,
    module_for_each,
    one_for_each,
)
from gradcache_clip.cache.chunks import Chunk, even_chunks
from gradcache_clip.cache.gradient_hooks import held_hooks
from gradcache_clip.cache.graph_budget import GraphBudget
from gradcache_clip.cache.own_rows import with_own_rows
from gradcache_clip.cache.settings import History, Settings
from gradcache_clip.cache.sorted_rows import in_order
from gradcache_clip.cache.step import CachedStep
from gradcache_clip.cache.torch_state import refuse_cached_parametrizations
from gradcache_clip.cache.tower import Encode, Tower, device_of, surely_trainable
from gradcache_clip.cache.trunk import call_encoder, frozen_trunk_of


def prepare(plan: Settings, inputs: Sequence[Any], history: History) -> CachedStep:
    """Cut a batch and check all that can be known before an encoder runs.

    Raises:
        ValueError, TypeError, RuntimeError: as `GradCache`.
    """
    refuse_cached_parametrizations()
    towers = build_towers(plan, inputs)
    check_inputs(towers)
    check_strategy(plan.strategy, towers)
    hooks = held_hooks(plan.gradient_hooks, towers, plan.strategy)
    agree = plan.strategy.smallest if plan.strategy.collective_forward else None
    budget = GraphBudget(plan.memory_budget, device_of(towers), agree)
    return CachedStep(plan, towers, hooks, budget, history)


def build_towers(plan: Settings, inputs: Sequence[Any]) -> list[Tower]:
    """Build one tower per input, with its chunks."""
    modules = module_for_each(plan.encoders, len(inputs))
    passed, inputs = inputs, divided(plan, inputs)
    extractors = one_for_each(plan.get_features, len(inputs), "get_features")
    embed_sizes = one_for_each(plan.embed_chunk_size, len(inputs), "embed_chunk_size")
    one_for_all = isinstance(plan.encoders, nn.Module)
    cut, towers = cut_all(plan, inputs, passed), []
    for index, (module, given) in enumerate(zip(modules, inputs, strict=True)):
        encode: Encode = partial(_call_tower, index) if one_for_all else call_encoder
        unwrapped = plan.strategy.unwrap(module)
        # A trunk cannot be called by itself where a forward gathers the parameters.
        own = index if one_for_all and not plan.strategy.collective_forward else None
        held = in_order(given, cut[index])
        towers.append(
            Tower(
                name=f"encoder {index} ({type(unwrapped).__name__})",
                module=module,
                bare_module=unwrapped,
                encode=encode,
                get_features=extractors[index],
                inputs=held.inputs,
                chunks=held.chunks,
                passed=given,
                order=held.order,
                replaced=held.passed,
                # One module for all inputs may be frozen for this one; only its graph tells.
                trainable=True if not one_for_all and surely_trainable(module, given) else None,
                embed_chunk_size=embed_sizes[index],
                trunk=frozen_trunk_of(unwrapped, own),
                weights=plan.auxiliary_losses,
            )
        )
    return towers


def divided(plan: Settings, inputs: Sequence[Any]) -> list[Any]:
    """Let every input say what its rows are, as `rows` divides it or as its types do."""
    divisions = one_for_each(plan.rows, len(inputs), "rows")
    return [
        with_own_rows(given if divide is None else divide(given), f"input {index}")
        for index, (divide, given) in enumerate(zip(divisions, inputs, strict=True))
    ]


def cut_all(plan: Settings, inputs: Sequence[Any], passed: Sequence[Any]) -> list[list[Chunk]]:
    """Cut every input; into two chunks at least if the strategy asks and any input has two.

    `passed` are the inputs before they were divided, for functions of the caller.
    """
    sizes = one_for_each(plan.chunk_size, len(inputs), "chunk_size")
    sorting = one_for_each(plan.sort_by_length, len(inputs), "sort_by_length")
    names = [f"input {index}" for index in range(len(inputs))]
    rows = [count_rows(given, name) for given, name in zip(inputs, names, strict=True)]

    def chunks(at_least: int) -> list[list[Chunk]]:
        return [
            even_chunks(count, size, at_least)
            if by_length is None
            else by_length.chunks(given, size, at_least, name, before)
            for given, before, size, by_length, count, name in zip(
                inputs, passed, sizes, sorting, rows, names, strict=True
            )
        ]

    cut = chunks(1)
    # The first and the last replay under such a strategy carry a chunk of every input.
    several = plan.strategy.joint_first_and_last and any(len(each) > 1 for each in cut)
    return chunks(2) if several else cut


def _call_tower(index: int, module: nn.Module, inputs: Any) -> Any:
    return module(index, inputs)
