"""Find rows that depend on other rows of their chunk, which no gradient cache gets right."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from gradcache_clip.cache.chunks import Chunk, indices, merged
from gradcache_clip.cache.random_state import RandomState, accelerators_among
from gradcache_clip.cache.recovery import is_out_of_memory
from gradcache_clip.cache.rounding import relative_change, tolerance_of
from gradcache_clip.cache.torch_state import (
    frozen_running_statistics,
    has_batch_statistics,
    kernels_as_with_gradients,
)
from gradcache_clip.cache.tower import Tower
from gradcache_clip.cache.trace import eager, watch
from gradcache_clip.distributed.strategies import LocalStrategy


def check_rows(towers: Sequence[Tower], strategy: LocalStrategy) -> frozenset[str]:
    """Compare the first chunk of each tower, as it was embedded, with its two halves.

    Towers that draw random numbers or normalise by their chunk cannot be compared; the latter have
    a warning of their own. Random state, buffers and running statistics are left as they were.

    Returns:
        Names of the towers that need not be asked again in a later step. Of those with a single
        chunk rows may well meet.

    Raises:
        ValueError: a row's features change with the rows beside it; on every rank.
    """
    several = [tower for tower in towers if not _single_chunk(tower, strategy)]
    for tower in several:
        if _comparable(tower, strategy):
            _check(tower, strategy)
    return frozenset(tower.name for tower in several)


def _single_chunk(tower: Tower, strategy: LocalStrategy) -> bool:
    return strategy.anywhere(len(tower.chunks) == 1, tower.features[0].device)


def _check(tower: Tower, strategy: LocalStrategy) -> None:
    """Every rank runs the same passes, also those after a difference on another one."""
    device, tolerance = tower.features[0].device, tolerance_between_sizes(tower)
    otherwise = _otherwise(tower, strategy)
    try:
        again = compute_again(tower, otherwise)
    except Exception as error:
        if not is_out_of_memory(error):
            raise ValueError(_needs_whole_chunks(tower, error)) from error
        # Two chunks of one row may be more than memory holds.
        if not (strategy.recovers and len(tower.chunks[0]) == 1):
            raise
        return
    change = _change(tower, again)
    if not strategy.anywhere(not change <= tolerance, device):
        _warn_of_losses(tower, again)
        return
    mixes = _repeats(tower, tolerance) and not change <= tolerance
    if strategy.anywhere(mixes, device):
        place = _first_module(tower, otherwise[0], tolerance)
        raise ValueError(_message(tower, change, place) if mixes else _elsewhere(tower))


def tolerance_between_sizes(tower: Tower) -> float:
    """Allow more than a replay: kernels for another number of rows round differently."""
    tolerance = max(map(tolerance_of, tower.features))
    return min(10 * tolerance, max(0.1, tolerance))


def _comparable(tower: Tower, strategy: LocalStrategy) -> bool:
    """Whether it can be compared; the same answer on every rank, as forwards may be joint."""
    drew = any(chunk.random_state is not None for chunk in tower.chunks[:2])
    cannot = drew or any(map(has_batch_statistics, tower.modules))
    return not strategy.anywhere(cannot, tower.features[0].device)


def _otherwise(tower: Tower, strategy: LocalStrategy) -> list[Chunk]:
    """Cut the first chunk into halves; put two chunks of one row together."""
    first = tower.chunks[0]
    one_row = len(first) == 1
    # One pass rather than two on every rank, where a pass waits for the others.
    once = strategy.collective_forward and strategy.anywhere(one_row, tower.features[0].device)
    if one_row:
        return [merged(tower.chunks[:2])]
    halves = [part_of(first, 0, len(first) // 2), part_of(first, len(first) // 2, len(first))]
    return halves[:1] if once else halves


def part_of(chunk: Chunk, start: int, stop: int) -> Chunk:
    rows = chunk.rows
    if isinstance(rows, Tensor):
        return replace(chunk, rows=rows[start:stop], random_state=None, graph=None)
    part = slice(rows.start + start, rows.start + stop)
    return replace(chunk, rows=part, random_state=None, graph=None)


def _as_given(tower: Tower) -> Tower:
    """Return the tower before its frozen trunk ran, to check rows of the trunk as well."""
    return replace(tower, inputs=tower.given, trunk=None, features=[])


@torch.no_grad()
def compute_again(tower: Tower, chunks: Sequence[Chunk]) -> list[tuple[Chunk, list[Tensor]]]:
    """Compute the features of chunks; leave no trace in generators and buffers."""
    alone, modules = _as_given(tower), tower.modules
    state = RandomState.capture(accelerators_among(tower.known_tensors()))
    try:
        with _kept_buffers(modules), frozen_running_statistics(modules):
            return [(chunk, _copies(alone, chunk)) for chunk in chunks]
    finally:
        state.restore()


def _copies(alone: Tower, chunk: Chunk) -> list[Tensor]:
    """Copy features, for an encoder may write every output into the same memory."""
    with kernels_as_with_gradients(), eager(alone.bare_module):
        return [part.detach().clone() for part in alone.forward(alone.bare_module, chunk)]


@contextmanager
def _kept_buffers(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Put back buffers that an encoder changes, in place or by another tensor."""
    parts = {id(part): part for module in modules for part in module.modules()}.values()
    before = [(p, n, b, b._version, b.clone()) for p in parts for n, b in _own_buffers(p)]
    try:
        yield
    finally:
        for part, name, buffer, version, value in before:
            if buffer._version != version:
                buffer.copy_(value)
            if part._buffers.get(name) is not buffer:
                part._buffers[name] = buffer


def _own_buffers(part: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, buffer) for name, buffer in part._buffers.items() if buffer is not None]


def _change(tower: Tower, again: Sequence[tuple[Chunk, list[Tensor]]]) -> float:
    """Return the largest relative change of a row."""
    rows = torch.cat([indices(chunk) for chunk, _ in again])
    changes = [0.0]
    for index, whole in enumerate(tower.features[: len(tower.features) - len(tower.losses)]):
        if whole.is_floating_point():
            parts = torch.cat([features[index] for _, features in again])
            changes.append(float(relative_change(whole[rows.to(whole.device)], parts)))
    # NaN counts as a difference, wherever it stands.
    return max(changes, key=lambda change: (change != change, change))


def _warn_of_losses(tower: Tower, again: Sequence[tuple[Chunk, list[Tensor]]]) -> None:
    """Warn of losses of the encoder that are no means over rows, so that the cut counts."""
    rows = torch.cat([indices(chunk) for chunk, _ in again])
    if len(rows) < len(tower.chunks[0]):
        return
    for index, name in enumerate(tower.losses, len(tower.features) - len(tower.losses)):
        if not tower.weights[name]:
            continue
        before = tower.features[index][rows.to(tower.features[index].device)].mean()
        after = torch.cat([features[index] for _, features in again]).mean()
        # A mean over rows rounds less than they do.
        tolerance = max(map(tolerance_of, tower.features)) / 10
        if not float(relative_change(before[None], after[None])) <= tolerance:
            warnings.warn(
                f"{tower.name}: the auxiliary loss {name!r} is not a mean over rows, so what is "
                f"minimised is the mean of the chunks' own: {before:.6g} over the first rows, "
                f"{after:.6g} when they are cut differently. For that of the whole batch return "
                "its sums per row as features, and let the loss add them up; check_rows=False "
                "turns this warning off",
                stacklevel=8,
            )


def _repeats(tower: Tower, tolerance: float) -> bool:
    """Whether the same chunk gives the same again; what moves by itself says nothing of rows."""
    return _change(tower, compute_again(tower, tower.chunks[:1])) <= tolerance


def _message(tower: Tower, change: float, place: str) -> str:
    padded = (
        ", and whether padding to the longest row of a list changes the features"
        if isinstance(tower.given, list)
        else ""
    )
    return (
        f"{tower.name}: expected features of a row that do not depend on the other rows of its "
        f"chunk, got features that change by {change:.1e} (relative) when the first chunk is "
        f"embedded in other company{place}. Gradients of chunks are then "
        "not those of the whole batch. Look for statistics or attention over the batch"
        f"{padded}; or pass check_rows=False if chunks are meant to stand alone"
    )


@torch.no_grad()
def _first_module(tower: Tower, other: Chunk, tolerance: float) -> str:
    """Name the first module in which rows meet, if a trace finds it."""
    few, many = sorted([tower.chunks[0], other], key=len)
    alone = _as_given(tower)
    try:
        with _kept_buffers(tower.modules), frozen_running_statistics(tower.modules):
            place = watch(alone, many, expected=watch(alone, few), tolerance=tolerance).difference
    except Exception:  # The search must not hide what was found.
        return ""
    return "" if place is None else f", first in {place.label}"


def _needs_whole_chunks(tower: Tower, error: Exception) -> str:
    return (
        f"{tower.name}: expected an encoder that takes other numbers of rows than a chunk's, by "
        "which the first step finds out whether rows depend on each other, got "
        f"{type(error).__name__} ({error}); pass check_rows=False"
    )


def _elsewhere(tower: Tower) -> str:
    return (
        f"{tower.name}: expected features of a row that do not depend on the other rows of its "
        "chunk, got another rank where they do, whose error says where"
    )
