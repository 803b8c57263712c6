"""Decide which graphs a step keeps from its embed, and in which order chunks are replayed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

from torch import nn

from gradcache_clip.cache.chunks import Chunk
from gradcache_clip.cache.graph_budget import GraphBudget, Retention
from gradcache_clip.cache.random_state import RandomState
from gradcache_clip.cache.tower import Tower
from gradcache_clip.distributed.strategies import LocalStrategy

T = TypeVar("T")
Group = list[tuple[Tower, Chunk]]


class Turn(NamedTuple):
    """Chunks whose features go through one backward."""

    group: Group
    kept: bool
    """Whether their graph is there from the embed."""
    modules: list[nn.Module]
    """Their encoders, as they were given."""
    finished: set[nn.Module]
    """Those of them that no later turn runs."""


def retentions(
    towers: Sequence[Tower], budget: GraphBudget, strategy: LocalStrategy
) -> list[Retention]:
    """Choose the chunks of each tower whose graphs may be kept; one is kept in any case."""
    counts = [len(tower.chunks) for tower in towers]
    if strategy.joint_first_and_last:
        # The first and the last replay go through the wrapper that exchanges gradients.
        between = [range(1, count - 1) for count in counts]
        return [Retention(budget, t.chunks, r) for t, r in zip(towers, between, strict=True)]
    # Where all are unknown the last one may turn out to be frozen; then none is kept.
    trained = [index for index, tower in enumerate(towers) if tower.trainable]
    last = trained[-1] if trained else len(towers) - 1
    return [
        Retention(budget, tower.chunks, range(count), always=count - 1 if index == last else None)
        for index, (tower, count) in enumerate(zip(towers, counts, strict=True))
    ]


def turns(towers: Sequence[Tower], strategy: LocalStrategy) -> list[Turn]:
    """List the turns of a step, in order."""
    found: list[Turn] = []
    later: set[nn.Module] = set()
    for group in reversed(groups(towers, strategy)):
        modules = [tower.module for tower, _ in group]
        found.append(Turn(group, bool(group[0][1].graph), modules, {*modules} - later))
        later.update(modules)
    return found[::-1]


def groups(towers: Sequence[Tower], strategy: LocalStrategy) -> list[Group]:
    """Group chunks that share one backward; kept graphs go alone, and early."""
    kept = [[(tower, chunk)] for tower in towers for chunk in tower.chunks if chunk.graph]
    left = [[(tower, chunk) for chunk in tower.chunks if not chunk.graph] for tower in towers]
    replays = replay_order(left, strategy.joint_first_and_last)
    first = 0 if strategy.kept_graphs_first else 1
    return [*replays[:first], *kept, *replays[first:]]


def replay_order(chunks: Sequence[Sequence[T]], joint_first_and_last: bool) -> list[list[T]]:
    """Group the chunks of every tower by the backward that they share.

    With `joint_first_and_last` the first and the last group carry a chunk of every tower: ZeRO-3
    overwrites gradients in the first backward of a step, and DDP's reducer waits for every
    parameter in the last. A tower with a single chunk is in the last group. All other chunks go one
    by one, tower by tower, which holds the fewest graphs at once.

    Example:
        >>> replay_order(["ab", "xyz"], joint_first_and_last=True)
        [['a', 'x'], ['y'], ['b', 'z']]
    """
    if not joint_first_and_last:
        return [[chunk] for tower in chunks for chunk in tower]
    last = [tower[-1] for tower in chunks if tower]
    first = [tower[0] for tower in chunks if len(tower) > 1]
    between = [[chunk] for tower in chunks for chunk in tower[1:-1]]
    return [group for group in [first, *between, last] if group]


@contextmanager
def draws_repeated(order: Sequence[Turn]) -> Iterator[None]:
    """Afterwards set generators to where the embed left off."""
    replayed = [chunk for turn in order if not turn.kept for _, chunk in turn.group]
    states = [chunk.random_state for chunk in replayed if chunk.random_state is not None]
    devices = {device for state in states for device, _ in state.devices}
    after_embed = RandomState.capture(sorted(devices, key=str)) if states else None
    try:
        yield
    finally:
        if after_embed is not None:
            after_embed.restore()
