"""Image-caption batches out of webdataset shards: shuffled, split, exactly resumable, safe."""

from __future__ import annotations

import hashlib
import math
import random
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from gradcache_clip.train.data.batch import Batch, BatchBuilder
from gradcache_clip.train.data.broken import BrokenReport, BrokenTally
from gradcache_clip.train.data.decode import ImageTransform
from gradcache_clip.train.data.position import EpochLeft, Lanes, Taken, all_seen, left_after
from gradcache_clip.train.data.shard_reader import read_shard
from gradcache_clip.train.data.shard_urls import Shard, find_shards
from gradcache_clip.train.data.stream import (
    DecodedSample,
    Group,
    GroupStream,
    LoaderOptions,
    StreamPlan,
    decode_sample,
)

__all__ = [
    "Batch",
    "DecodedSample",
    "ImageCaptionLoader",
    "LoaderOptions",
    "join_states",
    "read_all",
]

STATE_FORMAT = 2


def _this_rank_alone(flag: bool) -> bool:
    return flag


class ImageCaptionLoader:
    """Batches of one rank, for ever: each epoch in a new order, the last incomplete batch dropped.

    The order depends on the seed, the epoch and the shards, and on the world size and the number of
    workers with which the epoch began. `state_dict` describes the batches that the caller has
    received, so a new loader that loads it goes on with the very next batch, and with another world
    size or number of workers the loaders together go on with the samples that are left of the
    epoch. Iterate once at a time.

    Args:
        source: folder of shards, path, glob, brace pattern or URLs; see `find_shards`.
        batch_size: pairs a batch of this rank.
        options: see `LoaderOptions`.
        rank: of this process.
        world_size: number of processes; each sees its own part of an epoch.
        on_every_rank: tells whether a flag is true on all ranks, and is called by all of them
            before each batch: with it, an epoch ends for all when one has no full batch left.
            Without it each rank begins its next epoch when its own part is used up.

    Attributes:
        broken: a `BrokenTally` of the samples skipped so far, in worker processes too.

    Raises:
        FileNotFoundError, ValueError: no shards, or shards that may not be opened. While iterating:
            ValueError for too many broken samples and for a set smaller than one batch.

    Example:
        >>> import tempfile
        >>> from gradcache_clip.train.sources.glyphs import make_glyphs
        >>> with tempfile.TemporaryDirectory() as out:
        ...     _ = make_glyphs(Path(out), characters=40)
        ...     batch = next(iter(ImageCaptionLoader(Path(out) / "train", 8)))
        >>> batch.images.shape
        torch.Size([8, 3, 64, 64])
    """

    def __init__(
        self,
        source: str | Path,
        batch_size: int,
        *,
        options: LoaderOptions | None = None,
        rank: int = 0,
        world_size: int = 1,
        on_every_rank: Callable[[bool], bool] = _this_rank_alone,
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
        self._options = options = options or LoaderOptions()
        self._on_every_rank = on_every_rank
        shards = find_shards(source, allow_url_schemes=options.allow_url_schemes)
        self._plan = StreamPlan(shards, options, rank, world_size)
        self._lanes = Lanes(world_size, max(1, options.workers))
        self._left, self._taken = EpochLeft(0, self._lanes), Taken()
        self.broken = BrokenTally()
        counts = [shard.samples for shard in self._plan.shards]
        known = sum(count for count in counts if count is not None)
        if None not in counts and known < batch_size * world_size:
            raise self._too_small(known // world_size)

    @property
    def epoch(self) -> int:
        """Epoch of the last batch received, from 0."""
        return self._left.number

    def __iter__(self) -> Iterator[Batch]:
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
            "world_size": self._plan.world_size,
            "epoch": self._left.to_dict(),
            "taken": [self._taken.to_dict()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the loaders of the same samples stood.

        With the world size of the state every rank goes on with the very next batch. With another
        one the ranks share out what is left of the epoch. The batch size may differ.

        Raises:
            ValueError: the state is of another stream (other shards, seed, ...), or of one rank of
                several.
        """
        self._check_state(state)
        left = EpochLeft.from_dict(state["epoch"])
        taken = [Taken(**each) for each in state["taken"]]
        if len(taken) == self._plan.world_size:
            self._left, self._taken = left, taken[self._plan.rank]
        else:
            self._left = left_after(left, taken)
            self._taken = all_seen(taken) if self._plan.rank == 0 else Taken()
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

    def _identity(self) -> dict[str, Any]:
        """What a state is worth nothing without: all that lanes are made of."""
        return {
            "seed": self._options.seed,
            "group_size": self._options.group_size,
            "shuffle_buffer": self._options.shuffle_buffer,
            "shards": _fingerprint(self._plan.shards),
        }

    def _epoch_batches(self) -> Iterator[Batch]:
        start, batches = self._taken, 0
        builder = BatchBuilder(self._batch_size)
        for number, row, group in self._groups(start):
            before = self._taken_at(number)
            self.broken.add(group.seen, group.broken)
            self.broken.check(self._options.max_broken_share)
            while row < len(group):
                row = builder.take(group, row)
                if builder.is_full:
                    if not self._on_every_rank(True):
                        self._check_not_too_small(start, batches, builder)
                        return
                    self._taken = replace(before, row=row)
                    batches += 1
                    yield builder.batch()
                    builder = BatchBuilder(self._batch_size)
        self.broken.check(self._options.max_broken_share, at_end=True)
        self._on_every_rank(False)
        self._check_not_too_small(start, batches, builder)

    def _check_not_too_small(self, start: Taken, batches: int, builder: BatchBuilder) -> None:
        """An epoch without a batch would repeat itself for ever."""
        began_here = self._left.is_whole and start.groups == start.row == 0
        if not batches and began_here:
            raise self._too_small(builder.filled)

    def _groups(self, start: Taken) -> Iterator[tuple[int, int, Group]]:
        """The groups of this rank's share from the start on, each with its number in the share and
        its first row that is left, until all lanes of the share end."""
        workers, world_size = self._options.workers, self._plan.world_size
        loader = DataLoader(
            GroupStream(self._plan, self._left, start.groups),
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
            place = self._plan.rank + number * world_size
            if group is not None:
                row = start.row if number == start.groups else 0
                yield number, max(row, self._left.at(place)[1]), group
            if missing == round_of_lanes + len(self._left.pending):
                return

    def _taken_at(self, number: int) -> Taken:
        return Taken(number, 0, self.broken.seen, dict(self.broken.counts))

    def _too_small(self, found: int) -> ValueError:
        ranks = f" for each of {self._plan.world_size} ranks" if self._plan.world_size > 1 else ""
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


def read_all(
    source: str | Path, *, options: LoaderOptions | None = None
) -> Iterator[DecodedSample]:
    """Every sample once, in the shards' order, with all captions of each image; for evaluation.

    Args:
        source: as for `ImageCaptionLoader`.
        options: image size, allowed schemes, the broken share and whether there must be captions
            are used; crops and views are not.

    Yields:
        `DecodedSample`: image uint8 (3, H, W), captions, key, group, label. Only broken samples are
        left out, and they are logged.

    Raises:
        FileNotFoundError, ValueError: as `find_shards`; ValueError for too many broken samples and
            for a source without any sample.
    """
    options = options or LoaderOptions()
    transform, draw = ImageTransform(options.image_size), random.Random(options.seed)
    decode = partial(decode_sample, transform=transform, draw=draw, captions=options.captions)
    tally = BrokenTally()
    for shard in find_shards(source, allow_url_schemes=options.allow_url_schemes):
        for item in read_shard(shard, options.allow_url_schemes):
            found = item if isinstance(item, BrokenReport) else decode(item)
            if isinstance(found, BrokenReport):
                tally.add(found.count, [found])
            else:
                tally.add(1)
                yield found
            tally.check(options.max_broken_share)
    tally.check(options.max_broken_share, at_end=True)
    if not tally.seen:
        raise ValueError(f"source: expected at least one sample in {source}, got none")


def _fingerprint(shards: tuple[Shard, ...]) -> str:
    """Digest of names and counts, without folders: a moved set is the same set."""
    named = [(Path(shard.url).name, shard.samples) for shard in shards]
    return hashlib.sha256(repr(named).encode()).hexdigest()[:16]


def _unchanged(group: Any) -> Any:
    return group
