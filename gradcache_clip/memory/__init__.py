"""Counting the memory of a training step."""

from gradcache_clip.memory.counter import LiveBytes, cuda_block_bytes
from gradcache_clip.memory.plain_step import StepMemory, count_cached_step, count_plain_step
from gradcache_clip.memory.resident import (
    peak_resident_bytes,
    reset_peak_resident_bytes,
    resident_bytes,
)

__all__ = [
    "LiveBytes",
    "StepMemory",
    "count_cached_step",
    "count_plain_step",
    "cuda_block_bytes",
    "peak_resident_bytes",
    "reset_peak_resident_bytes",
    "resident_bytes",
]
