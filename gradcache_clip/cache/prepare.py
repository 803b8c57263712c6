"""A step, checked and cut before anything runs: for `GradCache`, `deferred_step` and `verify`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gradcache_clip.cache.checks import check_inputs, check_strategy
from gradcache_clip.cache.cutting import build_towers
from gradcache_clip.cache.gradient_hooks import held_hooks
from gradcache_clip.cache.graph_budget import GraphBudget
from gradcache_clip.cache.settings import History, Plan, Settings
from gradcache_clip.cache.step import CachedStep
from gradcache_clip.cache.torch_state import refuse_cached_parametrizations
from gradcache_clip.cache.tower import device_of


def prepare(settings: Settings, plan: Plan, inputs: Sequence[Any], history: History) -> CachedStep:
    """Cut a batch and check all that can be known before an encoder runs.

    Raises:
        ValueError, TypeError, RuntimeError: as `GradCache`.
    """
    refuse_cached_parametrizations()
    towers = build_towers(settings, plan, inputs)
    check_inputs(towers)
    check_strategy(plan.strategy, towers)
    hooks = held_hooks(settings.gradient_hooks, towers, plan.strategy)
    agree = plan.strategy.smallest if plan.strategy.collective_forward else None
    budget = GraphBudget(plan.memory_budget, device_of(towers), agree)
    return CachedStep(settings, plan.strategy, towers, hooks, budget, history)
