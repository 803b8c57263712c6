"""Image-caption batches out of webdataset shards: shuffled, split, exactly resumable, safe."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from torch.utils.data import IterableDataset

from gradcache_clip.train.data.batch import Batch, BatchBuilder
from gradcache_clip.train.data.broken import BrokenReport, BrokenTally
from gradcache_clip.train.data.decode import ImageTransform
from gradcache_clip.train.data.position import EpochLeft, Lanes
from gradcache_clip.train.data.resumable import ResumableLoader, join_states, this_rank_alone
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


class ImageCaptionLoader(ResumableLoader):
    """Batches of images and captions of one rank, for ever; see `ResumableLoader`.

    The order depends on the seed, the epoch and the shards, and on the world size and the number of
    workers with which the epoch began.

    Args:
        source: folder of shards, path, glob, brace pattern or URLs; see `find_shards`.
        batch_size: pairs a batch of this rank.
        options: see `LoaderOptions`.
        rank, world_size, on_every_rank: see `ResumableLoader`.

    Raises:
        FileNotFoundError, ValueError: no shards, or shards that may not be opened. While iterating:
            ValueError for too many broken samples and for a set smaller than one batch.

    Example:
        >>> import io, tempfile
        >>> from PIL import Image
        >>> from gradcache_clip.train.sources import Sample, write_shards
        >>> file = io.BytesIO()
        >>> Image.new("RGB", (80, 60), "teal").save(file, "PNG")
        >>> pairs = [Sample(f"a{i}", file.getvalue(), "png", ("teal",), "teal") for i in range(8)]
        >>> with tempfile.TemporaryDirectory() as out:
        ...     _ = write_shards(pairs, Path(out), source="mine", license="CC0-1.0")
        ...     batch = next(iter(ImageCaptionLoader(out, 8)))
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
        on_every_rank: Callable[[bool], bool] = this_rank_alone,
    ) -> None:
        self._options = options = options or LoaderOptions()
        super().__init__(
            source,
            batch_size,
            lanes=Lanes(world_size, max(1, options.workers)),
            workers=options.workers,
            max_broken_share=options.max_broken_share,
            rank=rank,
            world_size=world_size,
            on_every_rank=on_every_rank,
        )
        shards = find_shards(source, allow_url_schemes=options.allow_url_schemes)
        self._plan = StreamPlan(shards, options, rank, world_size)
        counts = [shard.samples for shard in shards]
        if None not in counts:
            self._check_size(sum(count for count in counts if count is not None) // world_size)

    def _identity(self) -> dict[str, Any]:
        return {
            "seed": self._options.seed,
            "group_size": self._options.group_size,
            "shuffle_buffer": self._options.shuffle_buffer,
            "shards": _fingerprint(self._plan.shards),
        }

    def _stream(self, left: EpochLeft, first: int) -> IterableDataset[Group | None]:
        return GroupStream(self._plan, left, first)

    def _builder(self) -> BatchBuilder:
        return BatchBuilder(self._batch_size)


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
