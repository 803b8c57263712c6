"""Every sample of a set once, in the shards' order: for evaluation, and to learn a tokenizer."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from gradcache_clip.train.data.broken import BrokenReport, BrokenTally
from gradcache_clip.train.data.decode import BrokenSample, ImageTransform, captions_and_group
from gradcache_clip.train.data.samples import DecodedSample, LoaderOptions, decode_sample
from gradcache_clip.train.data.shard_index import IndexedShards, can_be_indexed
from gradcache_clip.train.data.shard_urls import find_shards
from gradcache_clip.train.data.streamed import read_shard
from gradcache_clip.train.data.tar_samples import RawSample


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
    for item in _read_raw(source, options.allow_url_schemes):
        found = item if isinstance(item, BrokenReport) else decode(item)
        if isinstance(found, BrokenReport):
            tally.add(found.count, [found])
        else:
            tally.add(1)
            yield found
        tally.check(options.max_broken_share)
    tally.check(options.max_broken_share, at_end=True)
    if not tally.seen:
        raise ValueError(
            f"source: expected at least one sample in {source}, got none; check that these are "
            "shards of images"
        )


def read_captions(source: str | Path, *, allow_url_schemes: Sequence[str] = ()) -> Iterator[str]:
    """Every caption of every readable sample, in the shards' order; no image is decoded.

    Broken samples are passed over in silence: training meets, counts and reports them.

    Raises:
        FileNotFoundError, ValueError: as `find_shards`; ValueError where no sample has a caption.
    """
    tally = BrokenTally()
    for item in _read_raw(source, allow_url_schemes):
        found = item if isinstance(item, BrokenReport) else _captions(item)
        if isinstance(found, BrokenReport):
            tally.counts[found.reason] += found.count
        else:
            tally.seen += 1
            yield from found
    if not tally.seen:
        why = f" but broken samples ({dict(tally.counts)})" if tally.counts else ""
        raise ValueError(
            f"{source}: expected samples with captions, got none{why}; check that these are shards "
            "of images and captions"
        )


def _captions(sample: RawSample) -> tuple[str, ...] | BrokenReport:
    try:
        return captions_and_group(sample)[0]
    except BrokenSample as error:
        return BrokenReport(str(error), sample["__url__"], sample["__key__"])


def _read_raw(
    source: str | Path, allow_url_schemes: Sequence[str]
) -> Iterator[RawSample | BrokenReport]:
    shards = find_shards(source, allow_url_schemes=allow_url_schemes)
    if not all(map(can_be_indexed, shards)):
        for shard in shards:
            yield from read_shard(shard, allow_url_schemes)
        return
    samples = IndexedShards(shards)
    yield from map(samples.read, range(len(samples)))
    yield from samples.lost
