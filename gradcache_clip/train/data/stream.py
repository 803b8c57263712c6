"""The order of samples, and the worker side of loading: groups of decoded samples.

The order is a pure function of seed, epoch and lanes. A group is formed of raw samples before any
is decoded, so that a resumed stream skips groups unread by the decoder, and a broken sample makes
its group smaller and moves no other sample.
"""

from __future__ import annotations

import itertools
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from gradcache_clip.train.data.augment import Augmentation
from gradcache_clip.train.data.broken import BrokenReport
from gradcache_clip.train.data.decode import (
    BrokenSample,
    ImageTransform,
    captions_and_group,
    image_bytes,
    label_of,
)
from gradcache_clip.train.data.position import EpochLeft, Lanes
from gradcache_clip.train.data.shard_reader import RawSample, read_shard
from gradcache_clip.train.data.shard_urls import Shard

RawItem = RawSample | BrokenReport

# Ranks that differ by one shard of this many would drift an eighth of an epoch apart.
MIN_SHARDS_A_RANK = 8


@dataclass(frozen=True)
class DecodedSample:
    """One image with all its captions.

    Args:
        image: uint8 (3, image_size, image_size), or (2, 3, image_size, image_size) for two views.
        captions: all captions, the main one first.
        key: its name in the shard.
        group: samples of equal group match each other.
        label: its class, if the shard tells and captions are not required.
    """

    image: Tensor
    captions: tuple[str, ...]
    key: str
    group: str
    label: str = ""


@dataclass(frozen=True)
class Group:
    """Decoded neighbours in the stream; what a worker sends at once.

    Args:
        images: uint8 (n, 3, image_size, image_size), or (n, 2, 3, image_size, image_size) for two
            views; n is smaller by the broken samples.
        captions: n captions, one an image.
        keys: n names.
        groups: n match groups.
        broken: what was skipped.
    """

    images: Tensor
    captions: list[str]
    keys: list[str]
    groups: list[str]
    broken: list[BrokenReport] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def seen(self) -> int:
        """Samples that went in, broken ones included."""
        return len(self) + sum(report.count for report in self.broken)


@dataclass(frozen=True)
class LoaderOptions:
    """How samples are shuffled, decoded and checked.

    Args:
        image_size: height and width in pixels.
        crop_scale: area range of random crops such as (0.8, 1.0); None keeps the centre.
        augmentation: of two views of each image; None gives one view, which is only cropped.
        seed: of shard order, shuffling, caption choice, crops and views.
        workers: processes that decode; 0 decodes in this one.
        shuffle_buffer: raw samples that a worker holds to shuffle; 0 keeps the shards' order.
        max_broken_share: share of broken samples above which loading stops with an error.
        captions: whether an image without one is a broken sample.
        allow_url_schemes: URL schemes that may be opened beside local files, by name.
        group_size: samples that a worker decodes and sends at once.

    Raises:
        ValueError: a value outside its range.
    """

    image_size: int = 64
    crop_scale: tuple[float, float] | None = None
    augmentation: Augmentation | None = None
    seed: int = 0
    workers: int = 0
    shuffle_buffer: int = 5000
    max_broken_share: float = 0.05
    captions: bool = True
    allow_url_schemes: tuple[str, ...] = ()
    group_size: int = 32

    def __post_init__(self) -> None:
        for name, least in (("workers", 0), ("shuffle_buffer", 0), ("group_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"{name}: expected an integer of {least} or more, got {getattr(self, name)}"
                )
        if not 0 <= self.max_broken_share <= 1:
            raise ValueError(
                f"max_broken_share: expected a number from 0 to 1, got {self.max_broken_share}; "
                "pass e.g. 0.05"
            )
        ImageTransform(self.image_size, self.crop_scale)


@dataclass(frozen=True)
class StreamPlan:
    """What every rank reads, how, and which of the ranks this is."""

    shards: tuple[Shard, ...]
    options: LoaderOptions
    rank: int
    world_size: int


def raw_stream(plan: StreamPlan, epoch: int, lanes: Lanes, group: int) -> Iterator[RawItem]:
    """The raw samples of the lane that a group of an epoch lies in, in order."""
    seed, shards = plan.options.seed, list(plan.shards)
    random.Random(f"{seed}:{epoch}:shards").shuffle(shards)
    rank, worker = lanes.of(group)
    draw = random.Random(f"{seed}:{epoch}:samples:{rank * lanes.workers + worker}")
    parts = _parts(shards, lanes, rank, worker)
    items = _read(parts, plan.options.allow_url_schemes)
    return shuffled(items, plan.options.shuffle_buffer, draw)


def shuffled(items: Iterable[RawItem], buffer_size: int, draw: random.Random) -> Iterator[RawItem]:
    """Items in random order: each leaves from a random place of a buffer."""
    buffer: list[RawItem] = []
    for item in items:
        buffer.append(item)
        if len(buffer) > buffer_size:
            place = draw.randrange(len(buffer))
            buffer[place], buffer[-1] = buffer[-1], buffer[place]
            yield buffer.pop()
    if buffer_size:
        draw.shuffle(buffer)
    yield from buffer


def decode_sample(
    raw: RawSample, transform: ImageTransform, draw: random.Random, *, captions: bool = True
) -> DecodedSample | BrokenReport:
    """The image and all captions of a raw sample, or why it cannot be used."""
    try:
        texts, group = captions_and_group(raw, required=captions)
        # Of captioned images nobody asks for it, and their metadata is read once.
        label = "" if captions else label_of(raw)
        image = transform(image_bytes(raw), draw)
    except BrokenSample as error:
        return BrokenReport(str(error), raw["__url__"], raw["__key__"])
    return DecodedSample(image, texts, raw["__key__"], group, label)


class GroupStream(IterableDataset[Group | None]):
    """The groups of a rank's share of an epoch from one on; None for each that does not exist.

    It goes on with None for ever, because nobody knows how many groups a lane has. Over W workers
    group n of the share comes from worker n modulo W.
    """

    def __init__(self, plan: StreamPlan, epoch: EpochLeft, first: int) -> None:
        self._plan = plan
        options = plan.options
        self._transform = ImageTransform(
            options.image_size, options.crop_scale, options.augmentation
        )
        self._epoch = epoch
        self._first = first

    def __iter__(self) -> Iterator[Group | None]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        lanes: dict[int, _Lane] = {}
        for number in itertools.count(self._first + worker, workers):
            group, _ = self._epoch.at(self._plan.rank + number * self._plan.world_size)
            lane = group % self._epoch.lanes.count
            if lane not in lanes:
                lanes[lane] = self._open(lane)
            items = lanes[lane].chunk(group // self._epoch.lanes.count)
            yield self._decode(items) if items else None

    def _open(self, lane: int) -> _Lane:
        raw = raw_stream(self._plan, self._epoch.number, self._epoch.lanes, lane)
        return _Lane(raw, self._plan.options.group_size)

    def _decode(self, items: Sequence[RawItem]) -> Group:
        samples: list[tuple[DecodedSample, str]] = []
        broken: list[BrokenReport] = []
        for item in items:
            result = item if isinstance(item, BrokenReport) else self._decode_one(item)
            if isinstance(result, BrokenReport):
                broken.append(result)
            else:
                samples.append(result)
        images, shape = [sample.image for sample, _ in samples], self._transform.shape
        return Group(
            torch.stack(images) if images else torch.empty(0, *shape, dtype=torch.uint8),
            [caption for _, caption in samples],
            [sample.key for sample, _ in samples],
            [sample.group for sample, _ in samples],
            broken,
        )

    def _decode_one(self, raw: RawSample) -> tuple[DecodedSample, str] | BrokenReport:
        """A sample with the caption drawn for this epoch."""
        # Seeded by the sample, not by its place: a resumed run draws the same.
        options = self._plan.options
        draw = random.Random(f"{options.seed}:{self._epoch}:{raw['__key__']}")
        sample = decode_sample(raw, self._transform, draw, captions=options.captions)
        if isinstance(sample, BrokenReport):
            return sample
        return sample, draw.choice(sample.captions)


class _Lane:
    """The raw samples of one lane, read forwards a chunk at a time."""

    def __init__(self, items: Iterator[RawItem], size: int) -> None:
        self._items = items
        self._size = size
        self._next = 0

    def chunk(self, number: int) -> list[RawItem]:
        """A chunk after those asked for before; nothing where the lane is shorter."""
        skipped = (number - self._next) * self._size
        self._next = number + 1
        return list(itertools.islice(self._items, skipped, skipped + self._size))


@dataclass(frozen=True)
class _Part:
    """A shard, of which every `count`-th sample is read, from the one at `index` on."""

    shard: Shard
    index: int = 0
    count: int = 1


def _parts(shards: Sequence[Shard], lanes: Lanes, rank: int, worker: int) -> list[_Part]:
    """What one lane reads of the shards.

    Whole shards are dealt out to ranks where these get many, all as many, and to workers where each
    gets one; else all read the same shards and keep every n-th sample.
    """
    even = len(shards) - len(shards) % lanes.ranks
    if len(shards) < MIN_SHARDS_A_RANK * lanes.ranks:
        even = 0
    parts = [_Part(shard) for shard in shards[rank : even : lanes.ranks]]
    parts += [_Part(shard, rank, lanes.ranks) for shard in shards[even:]]
    if len(parts) >= lanes.workers:
        return parts[worker :: lanes.workers]
    return [
        _Part(part.shard, part.index * lanes.workers + worker, part.count * lanes.workers)
        for part in parts
    ]


def _read(parts: Iterable[_Part], allowed: tuple[str, ...]) -> Iterator[RawItem]:
    # Counted through, so that small shards come out even as well.
    places: dict[int, Iterator[int]] = defaultdict(itertools.count)
    for number, part in enumerate(parts):
        for item in read_shard(part.shard, allowed):
            # What every reader of a shard meets is reported by one of them.
            turn = number if isinstance(item, BrokenReport) else next(places[part.count])
            if turn % part.count == part.index:
                yield item
