"""Image-caption batches out of webdataset shards: shuffled, split, exactly resumable, safe."""

from __future__ import annotations

import hashlib
import random
import signal
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from gradcache_clip.train.data.broken import BrokenReport, BrokenTally
from gradcache_clip.train.data.decode import ImageTransform
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

__all__ = ["Batch", "DecodedSample", "ImageCaptionLoader", "LoaderOptions", "read_all"]

STATE_FORMAT = 1


@dataclass(frozen=True)
class Batch:
    """Image-caption pairs, row by row.

    Args:
        images: uint8 (B, 3, H, W); scaled to floats later, so that a batch stays small.
        captions: B captions; of several an image, one is drawn anew each epoch.
        keys: B names of samples.
        groups: B match groups; rows of equal group match each other.
    """

    images: Tensor
    captions: list[str]
    keys: list[str]
    groups: list[str]

    def __len__(self) -> int:
        return len(self.keys)


@dataclass(frozen=True)
class _Progress:
    """The state: every group of the epoch before `group`, and `offset` samples of it, are used.

    `seen` and `broken` count what the groups before it held, over all epochs.
    """

    epoch: int = 0
    group: int = 0
    offset: int = 0
    seen: int = 0
    broken: Mapping[str, int] = field(default_factory=dict)


class ImageCaptionLoader:
    """Batches of one rank, for ever: each epoch in a new order, the last incomplete batch dropped.

    The order depends on the seed, the epoch, the rank, the world size, the number of workers and
    the shards alone. `state_dict` describes the batches that the caller has received, so a new
    loader that loads it goes on with the very next batch. Iterate once at a time.

    Args:
        source: folder of shards, path, glob, brace pattern or URLs; see `find_shards`.
        batch_size: pairs a batch of this rank.
        options: see `LoaderOptions`.
        rank: of this process.
        world_size: number of processes; each sees its own part of an epoch.

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
        shards = find_shards(source, allow_url_schemes=options.allow_url_schemes)
        self._plan = StreamPlan(shards, options, rank, world_size)
        self._progress = _Progress()
        self.broken = BrokenTally()
        counts = [shard.samples for shard in self._plan.shards]
        known = sum(count for count in counts if count is not None)
        if None not in counts and known < batch_size * world_size:
            raise self._too_small(known // world_size)

    @property
    def epoch(self) -> int:
        """Epoch of the last batch received, from 0."""
        return self._progress.epoch

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield from self._epoch_batches()
            self._progress = self._progress_at(self._progress.epoch + 1, 0)

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands after the last batch that was received: numbers and strings."""
        progress = self._progress
        return {
            "format": STATE_FORMAT,
            "epoch": progress.epoch,
            "group": progress.group,
            "offset": progress.offset,
            "seen": progress.seen,
            "broken": dict(progress.broken),
            "stream": self._identity(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another loader of the same stream stood; the batch size may differ.

        Raises:
            ValueError: the state is of another stream (other shards, seed, workers, rank, ...).
        """
        if state.get("format") != STATE_FORMAT:
            raise ValueError(
                f"state: expected a loader state of format {STATE_FORMAT}, "
                f"got {state.get('format')!r}"
            )
        for name, got in self._identity().items():
            if (expected := state["stream"].get(name)) != got:
                raise ValueError(
                    f"{name}: expected {expected!r} as in the saved state, got {got!r}; the order "
                    "of the samples depends on it, so resume with the same value"
                )
        broken = dict(state["broken"])
        self._progress = _Progress(
            state["epoch"], state["group"], state["offset"], state["seen"], broken
        )
        self.broken = BrokenTally(Counter(broken), state["seen"])

    def _identity(self) -> dict[str, Any]:
        """All that the order depends on: a state is worth nothing where any of it differs."""
        return {
            "seed": self._options.seed,
            "workers": max(1, self._options.workers),
            "group_size": self._options.group_size,
            "shuffle_buffer": self._options.shuffle_buffer,
            "rank": self._plan.rank,
            "world_size": self._plan.world_size,
            "shards": _fingerprint(self._plan.shards),
        }

    def _epoch_batches(self) -> Iterator[Batch]:
        start, row, batches = self._progress, self._progress.offset, 0
        builder = _BatchBuilder(self._batch_size)
        for position, group in self._groups(start):
            before = self._progress_at(start.epoch, position)
            self.broken.add(group.seen, group.broken)
            self.broken.check(self._options.max_broken_share)
            while row < len(group):
                row = builder.take(group, row)
                if builder.is_full:
                    self._progress = replace(before, offset=row)
                    batches += 1
                    yield builder.batch()
                    builder = _BatchBuilder(self._batch_size)
            row = 0
        self.broken.check(self._options.max_broken_share, at_end=True)
        if not batches and start.group == start.offset == 0:
            raise self._too_small(builder.filled)

    def _groups(self, start: _Progress) -> Iterator[tuple[int, Group]]:
        """The groups of the epoch from the start on with their positions, until all workers end."""
        stream = GroupStream(self._plan, start.epoch, start.group)
        workers = self._options.workers
        loader = DataLoader(
            stream,
            batch_size=None,
            num_workers=workers,
            collate_fn=_unchanged,
            # Else it would draw from torch's own generator and alter the dropout of a resumed run.
            generator=torch.Generator(),
            worker_init_fn=_leave_signals_to_the_parent,
        )
        ended = 0
        for position, group in enumerate(loader, start.group):
            ended = ended + 1 if group is None else 0
            if group is not None:
                yield position, group
            if ended == max(1, workers):
                return

    def _progress_at(self, epoch: int, group: int) -> _Progress:
        return _Progress(epoch, group, 0, self.broken.seen, dict(self.broken.counts))

    def _too_small(self, found: int) -> ValueError:
        ranks = f" for each of {self._plan.world_size} ranks" if self._plan.world_size > 1 else ""
        return ValueError(
            f"batch_size: expected a data set of one batch or more, got {found} samples{ranks} in "
            f"{self._source} with batch_size={self._batch_size}; lower batch_size or add samples"
        )


class _BatchBuilder:
    """Fills a batch group by group, so that no batch is ever held twice.

    Copying also frees each group's shared memory at once; thousands would exhaust file handles.
    """

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size
        self._images: Tensor | None = None
        self._captions: list[str] = []
        self._keys: list[str] = []
        self._groups: list[str] = []

    @property
    def filled(self) -> int:
        return len(self._keys)

    @property
    def is_full(self) -> bool:
        return self.filled == self._batch_size

    def take(self, group: Group, row: int) -> int:
        """Copy samples of a group from a row on; returns the first row that found no place."""
        stop = min(len(group), row + self._batch_size - self.filled)
        if self._images is None:
            self._images = group.images.new_empty(self._batch_size, *group.images.shape[1:])
        self._images[self.filled : self.filled + stop - row] = group.images[row:stop]
        self._captions += group.captions[row:stop]
        self._groups += group.groups[row:stop]
        self._keys += group.keys[row:stop]
        return stop

    def batch(self) -> Batch:
        """The batch, once it is full."""
        assert self._images is not None and self.is_full
        return Batch(self._images, self._captions, self._keys, self._groups)


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
        options: image size, allowed schemes and the broken share are used; crops are not.

    Yields:
        `DecodedSample`: image uint8 (3, H, W), captions, key, group. Only broken samples are left
        out, and they are logged.

    Raises:
        FileNotFoundError, ValueError: as `find_shards`; ValueError for too many broken samples and
            for a source without any sample.
    """
    options = options or LoaderOptions()
    transform = ImageTransform(options.image_size)
    tally, draw = BrokenTally(), random.Random(options.seed)
    for shard in find_shards(source, allow_url_schemes=options.allow_url_schemes):
        for item in read_shard(shard, options.allow_url_schemes):
            found = item if isinstance(item, BrokenReport) else decode_sample(item, transform, draw)
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
