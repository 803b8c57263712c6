"""Do rows of a chunk depend on each other? Then no caching gives the gradients of the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor, nn

from gradcache_clip.cache.chunks import Chunk, merged
from gradcache_clip.cache.random_state import RandomState, accelerators_among
from gradcache_clip.cache.replay_check import relative_change, tolerance_of
from gradcache_clip.cache.settings import (
    frozen_running_statistics,
    has_batch_statistics,
    kernels_as_with_gradients,
)
from gradcache_clip.cache.tower import Tower
from gradcache_clip.cache.verify_trace import watch
from gradcache_clip.distributed.strategies import LocalStrategy


def check_rows(towers: Sequence[Tower], strategy: LocalStrategy) -> None:
    """Compare the first chunk of each tower, as it was embedded, with its two halves.

    Towers that draw random numbers or normalise by their chunk cannot be compared; the latter have
    a warning of their own. Random state, buffers and running statistics are left as they were.

    Raises:
        ValueError: a row's features change with the rows beside it; on every rank.
    """
    for tower in towers:
        if not _comparable(tower, strategy):
            continue
        again = _again(tower, _otherwise(tower))
        change, tolerance = _change(tower, again), max(map(tolerance_of, tower.features))
        mixes = not change <= tolerance and _repeats(tower, tolerance)
        if strategy.anywhere(mixes, tower.features[0].device):
            raise ValueError(_message(tower, change, tolerance) if mixes else _elsewhere(tower))


def _comparable(tower: Tower, strategy: LocalStrategy) -> bool:
    """Alike on every rank, for a forward may wait for the others."""
    one_row_in_all = len(tower.chunks) == 1 and len(tower.chunks[0]) == 1
    drew = any(chunk.random_state is not None for chunk in tower.chunks[:2])
    cannot = one_row_in_all or drew or any(map(has_batch_statistics, tower.modules))
    return not strategy.anywhere(cannot, tower.features[0].device)


def _otherwise(tower: Tower) -> list[Chunk]:
    """Its first chunk in halves; chunks of one row two at a time."""
    first = tower.chunks[0]
    if len(first) == 1:
        return [merged(tower.chunks[:2])]
    middle = len(first) // 2
    if isinstance(first.rows, Tensor):
        return [Chunk(first.rows[:middle], first.trim), Chunk(first.rows[middle:], first.trim)]
    start, stop = first.rows.start, first.rows.stop
    parts = slice(start, start + middle), slice(start + middle, stop)
    return [Chunk(part, first.trim) for part in parts]


def _as_given(tower: Tower) -> Tower:
    """Before a frozen trunk ran, so that rows of the trunk are looked at as well."""
    return replace(tower, inputs=tower.given, trunk=None, features=[])


@torch.no_grad()
def _again(tower: Tower, chunks: Sequence[Chunk]) -> list[tuple[Chunk, list[Tensor]]]:
    """Features of these chunks, in passes that leave no trace."""
    alone, modules = _as_given(tower), tower.modules
    state = RandomState.capture(accelerators_among(tower.known_tensors()))
    buffers = [(b, b._version, b.clone()) for b in _buffers(modules)]
    try:
        with frozen_running_statistics(modules), kernels_as_with_gradients():
            return [(chunk, alone.forward(tower.bare_module, chunk)) for chunk in chunks]
    finally:
        state.restore()
        for buffer, version, before in buffers:
            if buffer._version != version:
                buffer.copy_(before)


def _buffers(modules: Sequence[nn.Module]) -> list[Tensor]:
    found = {id(b): b for b in chain.from_iterable(module.buffers() for module in modules)}
    return list(found.values())


def _change(tower: Tower, again: Sequence[tuple[Chunk, list[Tensor]]]) -> float:
    """Largest relative change of a row."""
    rows = torch.cat([_indices(chunk) for chunk, _ in again])
    changes = [0.0]
    for index, whole in enumerate(tower.features):
        if whole.is_floating_point():
            parts = torch.cat([features[index] for _, features in again])
            changes.append(float(relative_change(whole[rows.to(whole.device)], parts)))
    # NaN counts as a difference, wherever it stands.
    return max(changes, key=lambda change: (change != change, change))


def _indices(chunk: Chunk) -> Tensor:
    rows = chunk.rows
    return rows if isinstance(rows, Tensor) else torch.arange(rows.start, rows.stop)


def _repeats(tower: Tower, tolerance: float) -> bool:
    """Whether the same chunk gives the same again; what moves by itself says nothing of rows."""
    return _change(tower, _again(tower, tower.chunks[:1])) <= tolerance


def _message(tower: Tower, change: float, tolerance: float) -> str:
    padded = (
        ", and whether padding to the longest row of a list changes the features"
        if isinstance(tower.given, list)
        else ""
    )
    return (
        f"{tower.name}: expected features of a row that do not depend on the other rows of its "
        f"chunk, got features that change by {change:.1e} (relative) when the first chunk is "
        f"embedded in other company{_first_module(tower, tolerance)}. Gradients of chunks are then "
        "not those of the whole batch. Look for statistics or attention over the batch"
        f"{padded}; or pass check_rows=False if chunks are meant to stand alone"
    )


@torch.no_grad()
def _first_module(tower: Tower, tolerance: float) -> str:
    """Where rows first meet, if a look module by module finds it."""
    few, many = sorted([tower.chunks[0], _otherwise(tower)[0]], key=len)
    alone = _as_given(tower)
    try:
        with frozen_running_statistics(tower.modules):
            place = watch(alone, many, expected=watch(alone, few), tolerance=tolerance).difference
    except Exception:  # The search must not hide what was found.
        return ""
    return "" if place is None else f", first in {place.label}"


def _elsewhere(tower: Tower) -> str:
    return (
        f"{tower.name}: expected features of a row that do not depend on the other rows of its "
        "chunk, got another rank where they do, whose error says where"
    )
