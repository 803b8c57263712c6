"""Counts the memory of a training step, and plans a step for a card that is not at hand."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradcache_clip.memory.cards import Card, find_card
    from gradcache_clip.memory.counter import LiveBytes, cuda_block_bytes
    from gradcache_clip.memory.plan_named import plan
    from gradcache_clip.memory.plan_options import Plan, PlanOptions
    from gradcache_clip.memory.planner import plan_config
    from gradcache_clip.memory.resident import (
        peak_resident_bytes,
        reset_peak_resident_bytes,
        resident_bytes,
    )
    from gradcache_clip.memory.step_memory import StepMemory, count_cached_step, count_plain_step

# Imported on first use: plans need timm and transformers when made, options not even torch.
_HOMES = {
    "cards": ("Card", "find_card"),
    "counter": ("LiveBytes", "cuda_block_bytes"),
    "step_memory": ("StepMemory", "count_cached_step", "count_plain_step"),
    "plan_named": ("plan",),
    "plan_options": ("Plan", "PlanOptions"),
    "planner": ("plan_config",),
    "resident": ("peak_resident_bytes", "reset_peak_resident_bytes", "resident_bytes"),
}

__all__ = [
    "Card",
    "LiveBytes",
    "Plan",
    "PlanOptions",
    "StepMemory",
    "count_cached_step",
    "count_plain_step",
    "cuda_block_bytes",
    "find_card",
    "peak_resident_bytes",
    "plan",
    "plan_config",
    "reset_peak_resident_bytes",
    "resident_bytes",
]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"gradcache_clip.memory.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
