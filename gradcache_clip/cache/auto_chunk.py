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
from gradcache_clip.cache.checks import check_inputs, check_plain_backward
from gradcache_clip.cache.chunks import Chunk, row_count
from gradcache_clip.cache.gradient_hooks import HeldHooks, hooked_leaves
from gradcache_clip.cache.graph_budget import SavedBytes, budget_bytes
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

_FIRST_SIZE = 8
# Less than this is no reason to spend twice the memory.
_WORTHWHILE_GAIN = 1.05
# A graph may take half of its memory: the gradients on the way back take room as well.
_SHARE_OF_MEMORY = 0.5
_REPEATS = 3


class Measured(NamedTuple):
    """Throughput and graph size of one chunk size."""

    rows_per_s: float
    graph_bytes: int


def find_chunk_size(measure: Callable[[int], Measured | None], rows: int, limit_bytes: int) -> int:
    """Double the size while it gets faster and fits; `measure` returns None when out of memory.

    Example:
        >>> find_chunk_size(lambda rows: Measured(min(rows, 32.0), 100 * rows), 1000, 10**6)
        32
    """
    best, size = 1, min(_FIRST_SIZE, rows)
    best_rate = 0.0
    while True:
        measured = measure(size)
        if measured is None or measured.rows_per_s < _WORTHWHILE_GAIN * best_rate:
            return best
        best, best_rate = size, measured.rows_per_s
        if size == rows or 2 * measured.graph_bytes > limit_bytes:
            return best
        size = min(2 * size, rows)


def measured_chunk_size(tower: Tower, rows: int, modules: Sequence[nn.Module]) -> int:
    """Find the size at which forward and backward of a tower take the least time per row.

    Gradients (of all `modules`, and of whatever else the tower's graph ends in), random
    generators and running statistics are afterwards as before.
    """
    snapshot = StepSnapshot(modules, [tower])
    try:
        device = device_of([tower])
        limit = int(_SHARE_OF_MEMORY * budget_bytes("auto", device))
        measure = partial(_measure, tower, device=device, snapshot=snapshot)
        return find_chunk_size(measure, rows, limit)
    finally:
        snapshot.restore()
        snapshot.finish()


def measured(plan: Settings, inputs: Sequence[Any], record: ChunkRecord) -> Settings:
    """Fill in a size for each encoder, recorded or measured, the same on every rank."""
    refuse_cached_parametrizations()
    check_plain_backward(plan.strategy, "chunk_size='auto'", "pass a number")
    towers = build_towers(replace(plan, chunk_size=1), inputs)
    check_inputs(towers)
    modules, sizes = modules_of(towers, plan.loss), []
    with HeldHooks(hooked_leaves(towers)).held():
        for tower in towers:
            key, rows = record_key(tower), row_count(tower.chunks)
            size = record.get(key) or measured_chunk_size(tower, rows, modules)
            sizes.append(plan.strategy.smallest(size))
            record.put(key, sizes[-1])
    return replace(plan, chunk_size=tuple(sizes))


def _measure(
    tower: Tower, size: int, device: torch.device, snapshot: StepSnapshot
) -> Measured | None:
    chunk, times = Chunk(slice(0, size)), []
    saved = SavedBytes(tower.known_tensors())
    try:
        for repeat in range(_REPEATS):
            with saved.counting(repeat == 0):
                times.append(_forward_and_backward(tower, chunk, device, snapshot))
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return None
    return Measured(size / min(times), saved.total)


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


def record_key(tower: Tower) -> str:
    """Build the key of a size: model, shape of a row, device and precision."""
    module, device = tower.bare_module, device_of([tower])
    parameters = sum(p.numel() for p in module.parameters())
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    shapes = ",".join("x".join(map(str, t.shape[1:])) for t in tensors_in(tower.inputs))
    autocast = torch.is_autocast_enabled(device.type)
    precision = torch.get_autocast_dtype(device.type) if autocast else "as it is"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    mode = "train" if module.training else "eval"
    return f"{tower.name}|{parameters}|{trained}|{mode}|{shapes}|{name}|{precision}"


def _read(path: Path) -> dict[str, int]:
    """Read recorded sizes; a damaged file counts as empty."""
    found: dict[str, int] = {}
    with contextlib.suppress(json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        content: Any = json.loads(path.read_text())
        if isinstance(content, dict):
            found = {k: v for k, v in content.items() if type(v) is int and v > 0}
    return found
