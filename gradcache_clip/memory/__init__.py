"""Counting the memory of a training step, and planning it for a card that is not here.

`plan` and what belongs to it are imported on first use, with timm, transformers and NumPy.
"""

from importlib import import_module
from typing import Any

from gradcache_clip.memory.cards import Card, find_card
from gradcache_clip.memory.counter import LiveBytes, cuda_block_bytes
from gradcache_clip.memory.plain_step import StepMemory, count_cached_step, count_plain_step
from gradcache_clip.memory.plan_options import Plan, PlanOptions
from gradcache_clip.memory.resident import (
    peak_resident_bytes,
    reset_peak_resident_bytes,
    resident_bytes,
)

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
    if name in ("plan", "plan_config"):
        return getattr(import_module("gradcache_clip.memory.planner"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
