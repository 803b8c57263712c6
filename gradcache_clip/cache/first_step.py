"""What the first step finds out: whether features of a row depend on the other rows.

Passes leave generators, buffers, running statistics and attributes of modules as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradcache_clip.cache.batch_tree import parts_with_rows
from gradcache_clip.cache.chunks import Chunk, all_columns, row_count
from gradcache_clip.cache.module_state import evaluating, restored
from gradcache_clip.cache.random_state import HostState, RandomState, accelerators_among
from gradcache_clip.cache.recovery import is_out_of_memory
from gradcache_clip.cache.rounding import (
    largest_change,
    relative_change,
    tolerance_between_sizes,
    tolerance_of,
)
from gradcache_clip.cache.torch_state import (
    batch_norms_of,
    forget_autocast_casts,
    frozen_running_statistics,
    has_batch_statistics,
    kernels_as_with_gradients,
)
from gradcache_clip.cache.tower import Tower, device_of
from gradcache_clip.cache.trace import Operations, eager, watch
from gradcache_clip.distributed.strategies import LocalStrategy

# Repeats of a pass that shows how far rows move by themselves, and how many times as far they may.
_REPEATS, _NOISE_FACTOR = 3, 10
_EPSILONS = 64


class Passes(NamedTuple):
    """Features of chunks, losses of the encoder last, and whether any drew random numbers."""

    features: list[list[Tensor]]
    losses: tuple[str, ...]
    drew: bool

    def without_losses(self) -> list[list[Tensor]]:
        return [each[: len(each) - len(self.losses)] for each in self.features]


class _Company(NamedTuple):
    """As many rows twice, of which some are the same, in the same places."""

    first: Chunk
    other: Chunk
    same: Tensor
    """Places of the rows that both have."""


def check_rows(
    towers: Sequence[Tower],
    strategy: LocalStrategy,
    found: Callable[[Exception], None],
    later: Callable[[Exception], None],
    warn: Callable[[str], None],
) -> frozenset[str]:
    """Embed chunk 0 twice, once with half of its rows exchanged, and compare those that stay.

    Shapes are equal, so kernels and random draws are: rows that are their own stay to the bit, with
    dropout as well. Only where the company changes the shapes inside (rows padded to the longest of
    a list, tokens sent to experts) rounding of other sizes is allowed for, in eval mode if the
    encoder draws random numbers. Batch norms, which have a warning of their own, are in eval mode.

    `later` receives what the embed may raise with better reason: an encoder that does not run.

    Returns:
        Names of the towers that need not be asked again in a later step; a single row has no
        company.
    """
    checked = [t for t in towers if not strategy.anywhere(row_count(t.chunks) == 1, device_of([t]))]
    for tower in checked:
        if not strategy.anywhere(_normalises_in_eval(tower), device_of([tower])):
            _check_rows(tower, strategy, found, later, warn)
    return frozenset(tower.name for tower in checked)


def _normalises_in_eval(tower: Tower) -> bool:
    with evaluating(tower.modules):
        return any(map(has_batch_statistics, tower.modules))


def _check_rows(
    tower: Tower,
    strategy: LocalStrategy,
    found: Callable[[Exception], None],
    later: Callable[[Exception], None],
    warn: Callable[[str], None],
) -> None:
    """Every rank runs the same passes, also those after a difference on another one."""
    company = _company(tower)
    try:
        change, tolerance, losses = _moved(tower, company, strategy)
        for message in _losses_that_are_no_means(tower, company.first) if losses else ():
            warn(message)
    except Exception as error:
        # Two rows may be more than memory holds.
        if is_out_of_memory(error) and not (strategy.recovers and len(tower.chunks[0]) == 1):
            raise
        if not is_out_of_memory(error):
            later(ValueError(_needs_other_rows(tower, error)))
        return
    mixes = not change <= tolerance
    if strategy.anywhere(mixes, device_of([tower])):
        place = _first_module(tower, company.first)
        found(ValueError(_rows_message(tower, change, place) if mixes else _rows_elsewhere(tower)))


def _company(tower: Tower) -> _Company:
    """Exchange half of the first rows of the batch for others.

    Every other one, for a row may see those before it alone; of lists, which the encoder may pad to
    the longest, the longest for those of most other lengths.
    """
    rows, size = row_count(tower.chunks), max(2, len(tower.chunks[0]))
    lengths = _lengths(tower)
    exchanged = torch.arange(0, size, 2)
    if lengths is not None:
        exchanged = lengths[:size].argsort(descending=True)[: len(exchanged)]
    same = torch.tensor([place for place in range(size) if place not in exchanged.tolist()])
    others = torch.cat([torch.arange(size, rows), same])
    if lengths is not None:
        longest = lengths[:size].max()
        others = others[(lengths[others] - longest).abs().argsort(descending=True)]
        spread = torch.arange(len(exchanged)) % len(others)
    else:
        step = max(1, len(others) // len(exchanged))
        spread = torch.arange(len(exchanged)) * step % len(others)
    together = torch.arange(size).index_put((exchanged,), others[spread])
    # Cut in the same way, too.
    columns = all_columns(tower.chunks)
    return _Company(Chunk(torch.arange(size), columns), Chunk(together, columns), same)


def _lengths(tower: Tower) -> Tensor | None:
    parts = [part.value for part in parts_with_rows(tower.given, tower.name)]
    lists = [part for part in parts if isinstance(part, list) and all(map(_has_length, part))]
    return torch.tensor([[len(row) for row in part] for part in lists]).sum(0) if lists else None


def _has_length(row: Any) -> bool:
    return hasattr(row, "__len__") and (not isinstance(row, Tensor) or row.ndim > 0)


def _moved(
    tower: Tower, company: _Company, strategy: LocalStrategy
) -> tuple[float, float, tuple[str, ...]]:
    """Return how far rows moved in other company, how far they may have, and losses that came."""
    pair = [company.first, company.other]
    for everything in (False, True):
        found = passes(tower, pair, everything)
        change, device = _change(found, company.same), found.features[0][0].device
        if not strategy.anywhere(change != 0, device):
            return 0.0, 0.0, found.losses
        noise, features = _noise(tower, company.first, everything), found.without_losses()[0]
        if strategy.anywhere(noise > max(map(tolerance_of, features)), device):
            # What moves by itself says nothing of rows; the replay will tell.
            return 0.0, 0.0, found.losses
        tolerance = max(noise * _NOISE_FACTOR, max(map(_least_tolerance, features)))
        first, other = (operations(tower, chunk, everything) for chunk in pair)
        if not strategy.anywhere(first.kernels != other.kernels, device):
            return change, tolerance, found.losses
        if not strategy.anywhere(found.drew, device):
            tolerance = max(tolerance, tolerance_between_sizes(features, first.dtypes))
            return change, tolerance, found.losses
        # Other shapes draw other numbers; in eval mode there may be none.
    return 0.0, 0.0, found.losses


def _least_tolerance(feature: Tensor) -> float:
    """Rounding of sums in another order, which the same kernel may take for another address."""
    is_double = feature.dtype is torch.float64
    return _EPSILONS * torch.finfo(torch.float64 if is_double else torch.float32).eps


def _noise(tower: Tower, chunk: Chunk, everything: bool) -> float:
    """Return the largest change between passes over the very same rows."""
    found = passes(tower, [chunk] * (1 + _REPEATS), everything)
    first, *others = found.without_losses()
    changes = [largest_change(first, other) for other in others]
    # Not finite where a pass gives NaN: nothing can be compared then.
    return max(changes) if all(change == change for change in changes) else float("inf")


def _change(found: Passes, rows: Tensor) -> float:
    one, other = ([f[rows.to(f.device)] for f in each] for each in found.without_losses())
    return largest_change(one, other)


def passes(tower: Tower, chunks: Sequence[Chunk], everything: bool) -> Passes:
    """Return the features of chunks, each drawn with the same random numbers.

    Args:
        everything: puts all modules in eval mode, and not batch norms alone.
    """
    # A frozen trunk is a part of the encoder.
    alone, modules = replace(tower, inputs=tower.given, trunk=None, features=[]), tower.modules
    quiet = modules if everything else batch_norms_of(modules)
    devices = accelerators_among(tower.known_tensors())
    state, host = RandomState.capture(devices), HostState.capture()
    features, drew = list[list[Tensor]](), False
    try:
        with restored(modules), evaluating(quiet), frozen_running_statistics(modules):
            for chunk in chunks:
                state.restore()
                host.restore()
                forget_autocast_casts()
                features.append(_copies(alone, chunk))
                drew = drew or not state.equals(RandomState.capture(devices))
    finally:
        state.restore()
        host.restore()
    return Passes(features, alone.losses, drew)


@torch.no_grad()
def _copies(alone: Tower, chunk: Chunk) -> list[Tensor]:
    """Copy features, for an encoder may write every output into the same memory."""
    with kernels_as_with_gradients(), eager(alone.bare_module):
        return [part.detach().clone() for part in alone.forward(alone.bare_module, chunk)]


def operations(tower: Tower, chunk: Chunk, everything: bool = False) -> Operations:
    operations = Operations()
    with operations:
        passes(tower, [chunk], everything)
    return operations


def _losses_that_are_no_means(tower: Tower, chunk: Chunk) -> Iterator[str]:
    """Say of which losses of the encoder the mean over chunks depends on the cut."""
    half = len(chunk) // 2
    parts = [chunk, part_of(chunk, 0, half), part_of(chunk, half, len(chunk))]
    found = passes(tower, parts, everything=True)
    whole, *halves = found.features
    # A mean over rows rounds less than they do.
    tolerance = max(map(tolerance_of, whole)) / 10
    for index, name in enumerate(found.losses, len(whole) - len(found.losses)):
        before = whole[index].mean()
        after = torch.cat([features[index] for features in halves]).mean()
        changes = not float(relative_change(before[None], after[None])) <= tolerance
        if tower.weights[name] and changes:
            yield (
                f"{tower.name}: the auxiliary loss {name!r} is not a mean over rows, so what is "
                f"minimised is the mean of the chunks' own: {before:.6g} over the first rows, "
                f"{after:.6g} when they are cut differently. For that of the whole batch return "
                'its sums per row as features, and let the loss add them up; check_rows="off" '
                "turns this warning off"
            )


def part_of(chunk: Chunk, start: int, stop: int) -> Chunk:
    rows = chunk.rows
    part = (
        slice(rows.start + start, rows.start + stop)
        if isinstance(rows, slice)
        else rows[start:stop]
    )
    return replace(chunk, rows=part, random_state=None, graph=None)


@torch.no_grad()
def _first_module(tower: Tower, chunk: Chunk) -> str:
    """Name the first module in which half of a chunk is other than within all of it."""
    alone = replace(tower, inputs=tower.given, trunk=None, features=[])
    half = part_of(chunk, 0, len(chunk) // 2)
    try:
        found = passes(tower, [half], everything=False)
        quiet = tower.modules if found.drew else batch_norms_of(tower.modules)
        tolerance = tolerance_between_sizes(found.without_losses()[0])
        with restored(tower.modules), evaluating(quiet), frozen_running_statistics(tower.modules):
            few = watch(alone, half)
            place = watch(alone, chunk, expected=few, tolerance=tolerance).difference
    except Exception:  # The search must not hide what was found.
        return ""
    return "" if place is None else f", first in {place.label}"


def _rows_message(tower: Tower, change: float, place: str) -> str:
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
        f'{padded}; or pass check_rows="off" if chunks are meant to stand alone'
    )


def _needs_other_rows(tower: Tower, error: Exception) -> str:
    return (
        f"{tower.name}: expected an encoder that takes any rows of the batch together, by which "
        "the first step finds out whether rows depend on each other, got "
        f'{type(error).__name__} ({error}); pass check_rows="off"'
    )


def _rows_elsewhere(tower: Tower) -> str:
    return (
        f"{tower.name}: expected features of a row that do not depend on the other rows of its "
        "chunk, got another rank where they do, whose error says where"
    )
