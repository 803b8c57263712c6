"""The captions of a training set, for learning a tokenizer; no image is decoded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from gradcache_clip.train.data.broken import BrokenReport
from gradcache_clip.train.data.decode import BrokenSample, captions_and_group
from gradcache_clip.train.data.shard_reader import read_shard
from gradcache_clip.train.data.shard_urls import find_shards


def read_captions(source: str | Path, *, allow_url_schemes: Sequence[str] = ()) -> Iterator[str]:
    """Every caption of every readable sample, in the shards' order.

    Broken samples are passed over in silence: training meets, counts and reports them.
    """
    for shard in find_shards(source, allow_url_schemes=allow_url_schemes):
        for item in read_shard(shard, allow_url_schemes):
            if isinstance(item, BrokenReport):
                continue
            try:
                captions, _ = captions_and_group(item)
            except BrokenSample:
                continue
            yield from captions
