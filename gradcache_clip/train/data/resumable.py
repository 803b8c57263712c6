"""Batches of a rank out of a stream of groups: for ever, counted, and exactly resumable."""

from __future__ import annotations

import math
import signal
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, IterableDataset

from gradcache_clip.train.data.broken import BrokenReport, BrokenTally
from gradcache_clip.train.data.position import EpochLeft, Lanes, Taken, all_seen, left_after

STATE_FORMAT = 2


class Group(Protocol):
    """Neighbours in a stream; what a worker sends at once."""

    @property
    def broken(self) -> Sequence[BrokenReport]:
        """What was skipped."""

    @property
    def seen(self) -> int:
        """Samples that went in, broken ones included."""

    def __len__(self) -> int: ...


class Builder(ABC):
    """Fills a batch group by group.

    Args:
        batch_size: rows of the batch.
    """

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size

    @property
    @abstractmethod
    def filled(self) -> int:
        """Rows so far."""

    @property
    def is_full(self) -> bool:
        return self.filled == self.batch_size

    def end_of(self, group: Group, row: int) -> int:
        """The first row of a group from `row` on for which there is no place."""
        return min(len(group), row + self.batch_size - self.filled)

    @abstractmethod
    def take(self, group: Any, row: int) -> int:
        """Copy samples of a group from a row on; returns the first row that found no place."""

    @abstractmethod
    def batch(self) -> Any:
        """The batch, once it is full."""


def this_rank_alone(flag: bool) -> bool:
    """Of one process: its own flag."""
    return flag


class ResumableLoader(ABC):
    """Batches of one rank, for ever: each epoch in a new order, the last incomplete batch dropped.

    `state_dict` describes the batches that the caller has received, so a new loader that loads it
    goes on with the very next batch, and with another world size or number of workers the loaders
    together go on with the samples that are left of the epoch. Iterate once at a time.

    Args:
        source: of the samples, for messages.
        batch_size: rows a batch of this rank.
        lanes: that a new epoch is read from.
        workers: processes that read; 0: this one.
        max_broken_share: share of broken samples above which loading stops with an error.
        rank: of this process.
        world_size: number of processes; each sees its own part of an epoch.
        on_every_rank: tells whether a flag is true on all ranks, and is called by all of them
            before each batch: with it, an epoch ends for all when one has no full batch left.
            Without it each rank begins its next epoch when its own part is used up.

    Attributes:
        broken: a `BrokenTally` of the samples skipped so far, in worker processes too.

    Raises:
        ValueError: a size or rank out of range. While iterating: too many broken samples, or a set
            smaller than one batch.
    """

    def __init__(
        self,
        source: str | Path,
        batch_size: int,
        *,
        lanes: Lanes,
        workers: int,
        max_broken_share: float,
        rank: int,
        world_size: int,
        on_every_rank: Callable[[bool], bool],
    ) -> None:
        if batch_size < 1:
            raise ValueError(
                f"batch_size: expected a positive integer, got {batch_size}; pass e.g. 1024"
            )
        if not 0 <= rank < world_size:
            raise ValueError(
                f"rank: expected 0 <= rank < world_size, got rank={rank}, world_size={world_size}"
            )
        self._source = source
        self._batch_size = batch_size
        self._workers, self._max_broken_share = workers, max_broken_share
        self._rank, self._world_size = rank, world_size
        self._on_every_rank = on_every_rank
        self._lanes = lanes
        self._left, self._taken = EpochLeft(0, lanes), Taken()
        self.broken = BrokenTally()

    @abstractmethod
    def _identity(self) -> dict[str, Any]:
        """Settings that must match on resume, because the order depends on them."""

    @abstractmethod
    def _stream(self, left: EpochLeft, first: int) -> IterableDataset[Any]:
        """The groups of this rank's share of an epoch from one on; None where there is none."""

    @abstractmethod
    def _builder(self) -> Builder:
        """Of an empty batch."""

    @property
    def epoch(self) -> int:
        """Epoch of the last batch received, from 0."""
        return self._left.number

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield from self._epoch_batches()
            self._left = EpochLeft(self._left.number + 1, self._lanes)
            self._taken = self._taken_at(0)

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands after the last batch that was received: numbers and strings.

        With several ranks it is the state of this one; `join_states` makes that of all.
        """
        return {
            "format": STATE_FORMAT,
            "stream": self._identity(),
            "world_size": self._world_size,
            "epoch": self._left.to_dict(),
            "taken": [self._taken.to_dict()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the loaders of the same samples stood.

        With the world size of the state every rank goes on with the very next batch. With another
        one the ranks share out what is left of the epoch. The batch size may differ.

        Raises:
            ValueError: the state is of another stream (other data, seed, ...), or of one rank of
                several.
        """
        self._check_state(state)
        left = EpochLeft.from_dict(state["epoch"])
        taken = [Taken(**each) for each in state["taken"]]
        if len(taken) == self._world_size:
            self._left, self._taken = left, taken[self._rank]
        else:
            self._left = left_after(left, taken)
            self._taken = all_seen(taken) if self._rank == 0 else Taken()
        self.broken = BrokenTally(Counter(self._taken.broken), self._taken.seen)

    def _check_state(self, state: Mapping[str, Any]) -> None:
        if state.get("format") != STATE_FORMAT:
            raise ValueError(
                f"state: expected a loader state of format {STATE_FORMAT}, got "
                f"{state.get('format')!r}; resume with the version of gradcache-clip that wrote it"
            )
        for name, got in self._identity().items():
            if (expected := state["stream"].get(name)) != got:
                raise ValueError(
                    f"{name}: expected {expected!r} as in the saved state, got {got!r}; the order "
                    "of the samples depends on it, so resume with the same value"
                )
        if len(state["taken"]) != state["world_size"]:
            raise ValueError(
                f"state: expected that of all {state['world_size']} ranks, got that of "
                f"{len(state['taken'])}; gather them and pass join_states(states)"
            )

    def _epoch_batches(self) -> Iterator[Any]:
        start, batches = self._taken, 0
        builder = self._builder()
        for number, row, group in self._groups(start):
            before = self._taken_at(number)
            self.broken.add(group.seen, group.broken)
            self.broken.check(self._max_broken_share)
            while row < len(group):
                row = builder.take(group, row)
                if builder.is_full:
                    if not self._on_every_rank(True):
                        self._check_not_too_small(start, batches, builder)
                        return
                    self._taken = replace(before, row=row)
                    batches += 1
                    yield builder.batch()
                    builder = self._builder()
        self.broken.check(self._max_broken_share, at_end=True)
        self._on_every_rank(False)
        self._check_not_too_small(start, batches, builder)

    def _check_size(self, least: int) -> None:
        """Raise unless so many samples, the fewest of a rank, fill a batch."""
        if least < self._batch_size:
            raise self._too_small(least)

    def _check_not_too_small(self, start: Taken, batches: int, builder: Builder) -> None:
        """An epoch without a batch would repeat itself for ever."""
        began_here = self._left.is_whole and start.groups == start.row == 0
        if not batches and began_here:
            raise self._too_small(builder.filled)

    def _groups(self, start: Taken) -> Iterator[tuple[int, int, Group]]:
        """The groups of this rank's share from the start on, each with its number in the share and
        its first row that is left, until all lanes of the share end."""
        workers, world_size = self._workers, self._world_size
        loader = DataLoader(
            self._stream(self._left, start.groups),
            batch_size=None,
            num_workers=workers,
            collate_fn=_unchanged,
            # Else it would draw from torch's own generator and alter the dropout of a resumed run.
            generator=torch.Generator(),
            worker_init_fn=_leave_signals_to_the_parent,
        )
        # So many groups of a share go once through all the lanes that it is read from.
        round_of_lanes = math.lcm(self._left.lanes.count, world_size) // world_size
        missing = 0
        for number, group in enumerate(loader, start.groups):
            missing = missing + 1 if group is None else 0
            place = self._rank + number * world_size
            if group is not None:
                row = start.row if number == start.groups else 0
                yield number, max(row, self._left.at(place)[1]), group
            if missing == round_of_lanes + len(self._left.pending):
                return

    def _taken_at(self, number: int) -> Taken:
        return Taken(number, 0, self.broken.seen, dict(self.broken.counts))

    def _too_small(self, found: int) -> ValueError:
        ranks = f" for each of {self._world_size} ranks" if self._world_size > 1 else ""
        return ValueError(
            f"batch_size: expected a data set of one batch or more, got {found} samples{ranks} in "
            f"{self._source} with batch_size={self._batch_size}; lower batch_size or add samples"
        )


def join_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The state of all ranks from the `state_dict()` of each, in the order of the ranks."""
    return {**states[0], "taken": [taken for state in states for taken in state["taken"]]}


def _leave_signals_to_the_parent(_worker: int) -> None:
    """A signal to the whole process group must not kill what the parent still reads from."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _unchanged(group: Any) -> Any:
    return group
