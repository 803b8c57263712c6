"""Batches of images and captions of one rank: shuffled, counted, exactly resumable, safe."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from gradcache_clip.train.data.batch import Batch
from gradcache_clip.train.data.broken import BrokenReport, BrokenTally, check_lost
from gradcache_clip.train.data.indexed import IndexedFeed
from gradcache_clip.train.data.pieces import Filling, Piece
from gradcache_clip.train.data.samples import ImageRows, LoaderOptions
from gradcache_clip.train.data.shard_index import IndexedShards, can_be_indexed
from gradcache_clip.train.data.shard_urls import find_shards
from gradcache_clip.train.data.streamed import StreamedFeed
from gradcache_clip.train.data.workers import TIMEOUT_S

STATE_FORMAT = 3
_MOST = 2**53


Feed = IndexedFeed | StreamedFeed


class Loader:
    """Batches of one rank, for ever.

    `state_dict` describes the batches that the caller has received, so a new loader that loads it
    goes on with the very next batch. Iterate once at a time; closing the iterator ends the worker
    processes.

    Args:
        feed: the rows.
        batch_size: rows a batch of this rank.
        make_batch: builds a batch from its columns.
        rank: of this process; the first also counts for the others what was before.
        lost: samples that the feed cannot yield.
        max_broken_share: share of broken samples above which loading stops with an error.

    Attributes:
        broken: a `BrokenTally` of the samples skipped so far, in worker processes too.
        timeout_s: seconds that a batch may wait for a worker.
    """

    timeout_s = TIMEOUT_S

    def __init__(
        self,
        feed: Feed,
        batch_size: int,
        make_batch: Callable[..., Any],
        *,
        rank: int,
        lost: Sequence[BrokenReport] = (),
        max_broken_share: float,
    ) -> None:
        self._feed, self._batch_size, self._make_batch = feed, batch_size, make_batch
        self._rank, self._max_broken_share = rank, max_broken_share
        self.broken = BrokenTally()
        if rank == 0:
            self.broken.add_lost(lost)

    @property
    def epoch(self) -> int:
        """Epoch of the last batch received, from 0."""
        return self._feed.epoch

    def __iter__(self) -> Iterator[Any]:
        filling = Filling(self._batch_size)
        with closing(self._feed.pieces(self.timeout_s)) as pieces:
            for piece in pieces:
                if isinstance(piece, Exception):
                    raise piece
                self._count(piece)
                row = 0
                while row < len(piece):
                    row = filling.take(piece, row)
                    if row == len(piece):
                        self._feed.used(piece)
                    if filling.is_full:
                        yield self._make_batch(**filling.columns)
                        filling = Filling(self._batch_size)

    def _count(self, piece: Piece) -> None:
        self.broken.add(piece.seen, piece.broken)
        whole = self._feed.rows_of_epoch
        at_end = whole is not None and self.broken.seen >= whole
        self.broken.check(self._max_broken_share, at_end=at_end)
        if piece.unfilled:
            raise ValueError(
                f"batch_size: expected a sample that can be read for every row, got none for "
                f"{piece.unfilled} rows after {len(piece.broken)} broken samples; the first: "
                f"{piece.broken[0]}; lower batch_size or repair the data"
            )

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands after the last batch that was received: numbers and strings.

        With several ranks it is the state of this one; `join_states` makes that of all.
        """
        tally = {"seen": self.broken.seen, "lost": self.broken.lost}
        return {
            "format": STATE_FORMAT,
            "order": dict(self._feed.identity),
            "position": self._feed.state(),
            "tally": {**tally, "broken": dict(self.broken.counts)},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the loaders of the same samples stood, at any number of ranks and workers.

        Raises:
            ValueError: the state is of other data or settings, or of another version.
        """
        if state.get("format") != STATE_FORMAT:
            raise ValueError(
                f"state: expected a loader state of format {STATE_FORMAT}, got "
                f"{state.get('format')!r}; resume with the version of gradcache-clip that wrote it"
            )
        _check_counts(state["position"], "position")
        _check_counts(state["tally"], "tally")
        for name, got in self._feed.identity.items():
            if (expected := state["order"].get(name)) != got:
                raise ValueError(
                    f"{name}: expected {expected!r} as in the saved state, got {got!r}; the order "
                    "of the samples depends on it, so resume with the same value"
                )
        self._feed.load(state["position"])
        tally = state["tally"]
        self.broken = BrokenTally()
        if self._rank == 0:
            counts = Counter[str](tally["broken"])
            self.broken = BrokenTally(counts, tally["seen"], tally["lost"])


class ImageCaptionLoader(Loader):
    """Batches of images and captions of one rank, for ever; see `Loader`.

    Local tar files are read by index: the samples of a step follow from the seed and the number of
    the step alone, and a broken sample is replaced by another. Where a shard is a URL or
    compressed, all are streamed.

    Args:
        source: folder of shards, path, glob, brace pattern or URLs; see `find_shards`.
        batch_size: pairs a batch of this rank.
        options: see `LoaderOptions`.
        rank: of this process.
        world_size: number of processes; each reads its own part of a batch.

    Raises:
        FileNotFoundError, ValueError: no shards, shards that may not be opened, or too many broken
            ones; fewer samples than a batch, or a rank out of range. While iterating: ValueError
            for too many broken samples.

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
    ) -> None:
        options = options or LoaderOptions()
        check_place(batch_size, rank, world_size)
        shards = find_shards(source, allow_url_schemes=options.allow_url_schemes)
        feed: Feed
        lost: list[BrokenReport] = []
        if all(map(can_be_indexed, shards)):
            rows = ImageRows(IndexedShards(shards, rank=rank, world_size=world_size), options)
            lost = rows.lost
            check_lost(lost, len(rows), options.max_broken_share)
            feed = IndexedFeed(
                rows,
                batch_size,
                seed=options.seed,
                source=source,
                workers=options.workers,
                rank=rank,
                world_size=world_size,
            )
        else:
            feed = StreamedFeed(shards, options, batch_size, rank=rank, world_size=world_size)
        share = options.max_broken_share
        super().__init__(feed, batch_size, Batch, rank=rank, lost=lost, max_broken_share=share)


def join_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The state of all ranks from the `state_dict()` of each."""
    broken = Counter[str]()
    for state in states:
        broken.update(state["tally"]["broken"])
    sums = {name: sum(state["tally"][name] for state in states) for name in ("seen", "lost")}
    position = dict(states[0]["position"])
    if "finished" in position:
        shards = {shard for state in states for shard in state["position"]["finished"]}
        position["finished"] = sorted(shards)
    return {**states[0], "position": position, "tally": {**sums, "broken": dict(broken)}}


def _check_counts(value: Any, name: str) -> None:
    """Raise ValueError unless a nest of dicts and lists holds counts and nothing else."""
    if isinstance(value, Mapping):
        for key, each in value.items():
            _check_counts(each, f"{name}.{key}")
    elif isinstance(value, list):
        for each in value:
            _check_counts(each, name)
    elif type(value) is not int or not 0 <= value <= _MOST:
        raise ValueError(
            f"{name}: expected counts in the saved state, got {value!r}; restore it from a backup"
        )


def check_place(batch_size: int, rank: int, world_size: int) -> None:
    """Raise ValueError for a batch size or a rank out of range."""
    if batch_size < 1:
        raise ValueError(
            f"batch_size: expected a positive integer, got {batch_size}; pass e.g. 1024"
        )
    if not 0 <= rank < world_size:
        raise ValueError(
            f"rank: expected 0 <= rank < world_size, got rank={rank}, world_size={world_size}"
        )
