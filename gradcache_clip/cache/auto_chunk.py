"""Measure chunk sizes on the first batch (chunk_size="auto"), and remember them."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from gradcache_clip.cache.batch_tree import tensors_in
from gradcache_clip.cache.checks import check_inputs, check_plain_backward, one_for_each
from gradcache_clip.cache.chunks import Chunk, row_count
from gradcache_clip.cache.gradient_hooks import HeldHooks, hooked_leaves
from gradcache_clip.cache.graph_budget import SavedBytes, budget_bytes
from gradcache_clip.cache.lengths import ByLength
from gradcache_clip.cache.prepare import build_towers
from gradcache_clip.cache.recovery import StepSnapshot, is_out_of_memory
from gradcache_clip.cache.settings import Settings
from gradcache_clip.cache.torch_state import (
    autocast_off,
    forget_autocast_casts,
    refuse_cached_parametrizations,
)
from gradcache_clip.cache.tower import Tower, device_of, modules_of
from gradcache_clip.distributed.graph import leaves_behind

_FIRST_ROWS = 8
_MORE_THAN_ALL = 2**62
# Less than this is no reason to spend twice the memory.
_WORTHWHILE_GAIN = 1.05
# A graph may take half of its memory: the gradients on the way back take room as well.
_SHARE_OF_MEMORY = 0.5
_REPEATS = 3


class Measured(NamedTuple):
    """Throughput and graph size of one chunk size."""

    per_s: float
    graph_bytes: int


class Sizes(NamedTuple):
    """Sizes that are tried on one tower: rows of a chunk, or what a budget counts."""

    tower: Tower
    by_length: ByLength | None
    passed: Any
    """The input before it was divided into rows."""

    @property
    def by_budget(self) -> bool:
        return self.by_length is not None and self.by_length.budget is not None

    def chunk(self, size: int) -> Chunk:
        """Return the first chunk of this size; of sorted rows that is the longest ones."""
        rows, by_length = row_count(self.tower.chunks), self.by_length
        if by_length is None:
            return Chunk(slice(0, size))
        if self.by_budget:
            by_length, size = by_length.with_budget(size), rows
        return by_length.chunks(self.tower.inputs, size, 1, self.tower.name, self.passed)[0]

    def first_and_last(self) -> tuple[int, int]:
        """Return the size of a few rows and that of all rows."""
        rows = row_count(self.tower.chunks)
        whole = self.chunk(_MORE_THAN_ALL).size if self.by_budget else rows
        return max(1, whole * min(_FIRST_ROWS, rows) // rows), whole

    def measured_of(self, chunk: Chunk) -> int:
        return chunk.size if self.by_budget else len(chunk)


def find_chunk_size(
    measure: Callable[[int], Measured | None], first: int, last: int, limit_bytes: int
) -> int:
    """Double the size while it gets faster and fits; `measure` returns None when out of memory.

    Example:
        >>> find_chunk_size(lambda rows: Measured(min(rows, 32.0), 100 * rows), 8, 1000, 10**6)
        32
    """
    best, size = 1, first
    best_rate = 0.0
    while True:
        measured = measure(size)
        if measured is None or measured.per_s < _WORTHWHILE_GAIN * best_rate:
            return best
        best, best_rate = size, measured.per_s
        if size == last or 2 * measured.graph_bytes > limit_bytes:
            return best
        size = min(2 * size, last)


def measured_size(sizes: Sizes, modules: Sequence[nn.Module]) -> int:
    """Find the size at which forward and backward of a tower take the least time per row or cost.

    Gradients (of all `modules`, and of whatever else the tower's graph ends in), random
    generators and running statistics are afterwards as before.
    """
    snapshot = StepSnapshot(modules, [sizes.tower])
    try:
        device = device_of([sizes.tower])
        limit = int(_SHARE_OF_MEMORY * budget_bytes("auto", device))
        measure = partial(_measure, sizes, device=device, snapshot=snapshot)
        return find_chunk_size(measure, *sizes.first_and_last(), limit)
    finally:
        snapshot.restore()
        snapshot.finish()


def measured(plan: Settings, inputs: Sequence[Any], record: ChunkRecord) -> Settings:
    """Fill in the sizes and budgets that are "auto", recorded or measured, equal on all ranks."""
    refuse_cached_parametrizations()
    check_plain_backward(plan.strategy, "chunk_size='auto'", "pass a number")
    towers = build_towers(replace(plan, chunk_size=1, sort_by_length=None), inputs)
    check_inputs(towers)
    modules, found = modules_of(towers, plan.loss), list[int]()
    sorting = one_for_each(plan.sort_by_length, len(towers), "sort_by_length")
    with HeldHooks(hooked_leaves(towers)).held():
        for sizes in map(Sizes, towers, sorting, inputs):
            if isinstance(sizes.by_length and sizes.by_length.budget, int):
                found.append(row_count(sizes.tower.chunks))
                continue
            key = record_key(sizes)
            size = record.get(key) or measured_size(sizes, modules)
            found.append(plan.strategy.smallest(size))
            record.put(key, found[-1])
    return replace(
        plan,
        chunk_size=tuple(found),
        sort_by_length=tuple(map(_with_budget, sorting, found)),
    )


def _with_budget(by_length: ByLength | None, found: int) -> ByLength | None:
    if by_length is None or by_length.budget != "auto":
        return by_length
    return by_length.with_budget(found)


def _measure(
    sizes: Sizes, size: int, device: torch.device, snapshot: StepSnapshot
) -> Measured | None:
    tower, chunk, times = sizes.tower, sizes.chunk(size), []
    saved = SavedBytes(tower.known_tensors())
    try:
        for repeat in range(_REPEATS):
            with saved.counting(repeat == 0):
                times.append(_forward_and_backward(tower, chunk, device, snapshot))
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return None
    return Measured(sizes.measured_of(chunk) / min(times), saved.total)


def _forward_and_backward(
    tower: Tower, chunk: Chunk, device: torch.device, snapshot: StepSnapshot
) -> float:
    forget_autocast_casts()
    start = _now(device)
    features = [f for f in tower.forward(tower.bare_module, chunk) if f.requires_grad]
    snapshot.set_aside(leaves_behind(features))
    with autocast_off({device.type, "cpu"}):
        torch.autograd.backward(features, [torch.zeros_like(feature) for feature in features])
    return _now(device) - start


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class ChunkRecord:
    """Chunk sizes by model, input shape, device and precision, kept in a JSON file."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._sizes: dict[str, int] = {}
        if path is not None and path.exists():
            self._sizes = _read(path)

    def get(self, key: str) -> int | None:
        return self._sizes.get(key)

    def put(self, key: str, size: int) -> None:
        self._sizes[key] = size
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial = self.path.with_suffix(f".{os.getpid()}.part")
            partial.write_text(json.dumps(self._sizes, indent=1, sort_keys=True) + "\n")
            partial.replace(self.path)


def record_key(sizes: Sizes) -> str:
    """Build the key of a size: model, shape of a row, device and precision."""
    tower, unit = sizes.tower, "|cost" if sizes.by_budget else ""
    module, device = tower.bare_module, device_of([tower])
    parameters = sum(p.numel() for p in module.parameters())
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    shapes = ",".join("x".join(map(str, t.shape[1:])) for t in tensors_in(tower.inputs))
    autocast = torch.is_autocast_enabled(device.type)
    precision = torch.get_autocast_dtype(device.type) if autocast else "as it is"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    mode = "train" if module.training else "eval"
    return f"{tower.name}|{parameters}|{trained}|{mode}|{shapes}|{name}|{precision}{unit}"


def _read(path: Path) -> dict[str, int]:
    """Read recorded sizes; a damaged file counts as empty."""
    found: dict[str, int] = {}
    with contextlib.suppress(json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        content: Any = json.loads(path.read_text())
        if isinstance(content, dict):
            found = {k: v for k, v in content.items() if type(v) is int and v > 0}
    return found
