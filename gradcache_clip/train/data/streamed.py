"""Pieces of batches out of shards that can only be read from start to end, by URL or compressed."""

from __future__ import annotations

import hashlib
import http.client
import itertools
import random
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, cast

from torch.utils.data import IterableDataset, get_worker_info

from gradcache_clip.train.data.broken import BrokenReport
from gradcache_clip.train.data.pieces import Piece
from gradcache_clip.train.data.samples import Decoder, DrawnSample, LoaderOptions
from gradcache_clip.train.data.shard_files import open_shard
from gradcache_clip.train.data.shard_urls import Shard
from gradcache_clip.train.data.tar_samples import CUT, RawSample, tar_samples
from gradcache_clip.train.data.tar_stream import decompressing
from gradcache_clip.train.data.workers import TIMEOUT_S, pieces_of_workers

PIECE_ROWS = 32
MAX_BUFFER_BYTES = 2**30
"""Of the samples that a worker holds to shuffle them."""
Item = tuple[int, RawSample | BrokenReport]
"""A turn and what is read in it."""


def read_shard(shard: Shard, allowed: Sequence[str]) -> Iterator[RawSample | BrokenReport]:
    """The raw samples of a shard in order, read as a stream; see `tar_samples`.

    Raises:
        ValueError, OSError: see `open_shard`.
    """
    with open_shard(shard.url, allowed) as file:
        try:
            stream = decompressing(file)
        except (OSError, http.client.HTTPException):
            yield BrokenReport(CUT, shard.url, "", shard.samples or 1)
            return
        if stream is None:
            yield BrokenReport("unsupported compression", shard.url, "", shard.samples or 1)
            return
        tar = cast("IO[bytes]", stream)
        yield from tar_samples(tar, shard.url, mode="r|", take=_content, samples=shard.samples)


def _content(archive: Any, member: Any) -> bytes:
    data: bytes = archive.extractfile(member).read()
    return data


class StreamedFeed:
    """Rows of one rank out of streamed shards.

    Turn t reads shard t modulo n of epoch t // n, in the order of that epoch. Ranks and their
    workers take the turns that are left like cards. Resuming goes on with the turns that nobody
    has finished: a shard that was begun is read again.

    Args:
        shards: n shards.
        options: of decoding and shuffling.
        batch_size: rows a batch of this rank.
        rank, world_size: of this process.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        options: LoaderOptions,
        batch_size: int,
        *,
        rank: int,
        world_size: int,
    ) -> None:
        self._shards, self._options, self._batch_size = shards, options, batch_size
        self._rank, self._world_size = rank, world_size
        self._finished: set[int] = set()
        self._left = Turns()

    @property
    def identity(self) -> dict[str, object]:
        """What a saved state must agree with."""
        named = [(Path(shard.url).name, shard.samples) for shard in self._shards]
        digest = hashlib.sha256(repr(named).encode()).hexdigest()
        return {"seed": self._options.seed, "shards": digest[:16]}

    @property
    def epoch(self) -> int:
        """Epoch of the last shard that was finished, from 0."""
        return max([self._left.first - 1, *self._finished, 0]) // len(self._shards)

    @property
    def rows_of_epoch(self) -> None:
        """Nobody knows."""

    def state(self) -> dict[str, Any]:
        """Where the feed of this rank stands."""
        return {"first": self._left.first, "finished": sorted(self._finished)}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on with what the feeds of all ranks have left."""
        self._left = Turns.after(state["first"], state["finished"])
        self._finished = set(self._left.skipped)

    def used(self, piece: Piece) -> None:
        """Note the shards that a piece ends, once all its rows were received."""
        self._finished.update(piece.finished)

    def pieces(self, timeout_s: float = TIMEOUT_S) -> Generator[Piece | Exception, None, None]:
        """The pieces of this rank's batches, for ever."""
        place = self._rank, self._world_size
        stream = _PieceStream(self._shards, self._options, self._left, self._finished, place)
        yield from pieces_of_workers(
            stream,
            workers=self._options.workers,
            batch_size=self._batch_size,
            piece_rows=PIECE_ROWS,
            timeout_s=timeout_s,
        )


class Turns:
    """The turns from one on, without those that are finished."""

    def __init__(self, first: int = 0, skipped: Iterable[int] = ()) -> None:
        self.first, self.skipped = first, frozenset(skipped)

    @classmethod
    def after(cls, first: int, finished: Iterable[int]) -> Turns:
        """What is left behind finished ones.

        Example:
            >>> left = Turns.after(2, [2, 3, 5])
            >>> list(itertools.islice(left, 3))
            [4, 6, 7]
        """
        finished = set(finished)
        while first in finished:
            finished.remove(first)
            first += 1
        return cls(first, finished)

    def __iter__(self) -> Iterator[int]:
        return (turn for turn in itertools.count(self.first) if turn not in self.skipped)


class _PieceStream(IterableDataset[Piece | Exception]):
    """Pieces of a rank, for ever; over W workers piece n comes from worker n modulo W.

    Args:
        left: turns that all ranks share out.
        finished: those that this rank need not take again.
        place: rank and world size.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        options: LoaderOptions,
        left: Turns,
        finished: Iterable[int],
        place: tuple[int, int],
    ) -> None:
        self._shards, self._options = shards, options
        self._left, self._finished, self._place = left, frozenset(finished), place
        self._decoder = Decoder(options)

    def __iter__(self) -> Iterator[Piece | Exception]:
        try:
            yield from self._pieces()
        except (OSError, ValueError) as error:
            yield error

    def _pieces(self) -> Iterator[Piece]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        rank, world_size = self._place
        reader = rank * workers + worker
        mine = itertools.islice(self._left, reader, None, world_size * workers)
        turns = (turn for turn in mine if turn not in self._finished)
        draw = random.Random(f"{self._options.seed}:{reader}:{self._left.first}")
        buffer = _Buffer(self._options.shuffle_buffer, len(self._shards), draw)
        items = buffer.shuffled(self._read(turns, buffer))
        while (piece := self._piece(itertools.islice(items, PIECE_ROWS), buffer)).seen:
            yield piece

    def _read(self, turns: Iterator[int], buffer: _Buffer) -> Iterator[Item]:
        empty, broken = 0, ""
        for turn in turns:
            buffer.begin(turn)
            empty += 1
            for sample in read_shard(self._shard_of(turn), self._options.allow_url_schemes):
                if isinstance(sample, BrokenReport):
                    broken = f" but broken ones ({sample})"
                else:
                    empty = 0
                yield turn, sample
            if empty == len(self._shards):
                raise ValueError(
                    f"source: expected samples in {empty} shards, got none{broken}; the first is "
                    f"{self._shards[0].url}"
                )

    def _shard_of(self, turn: int) -> Shard:
        epoch, place = divmod(turn, len(self._shards))
        order = list(self._shards)
        random.Random(f"{self._options.seed}:{epoch}:shards").shuffle(order)
        return order[place]

    def _piece(self, chosen: Iterable[Item], buffer: _Buffer) -> Piece:
        rows: list[DrawnSample] = []
        broken: list[BrokenReport] = []
        for turn, sample in chosen:
            found = sample if isinstance(sample, BrokenReport) else self._decoded(turn, sample)
            if isinstance(found, BrokenReport):
                broken.append(found)
            else:
                rows.append(found)
        seen = len(rows) + sum(report.count for report in broken)
        return Piece(self._decoder.columns(rows), seen, broken, finished=buffer.finished())

    def _decoded(self, turn: int, sample: RawSample) -> DrawnSample | BrokenReport:
        return self._decoder(sample, f"{turn // len(self._shards)}:{sample['__key__']}")


class _Buffer:
    """Shuffles the samples of an epoch, and knows which turns have left it.

    Args:
        size: samples that are held, if they are not larger than `MAX_BUFFER_BYTES` together.
        turns: of an epoch.
        draw: decides which sample leaves next.
    """

    def __init__(self, size: int, turns: int, draw: random.Random) -> None:
        self._size, self._turns, self._draw = size, turns, draw
        self._turn = 0
        self._left: dict[int, int] = {}
        self._held: list[Item] = []
        self._bytes = 0

    def begin(self, turn: int) -> None:
        """Note that what follows is of another turn."""
        self._turn = turn
        self._left[turn] = 0

    def finished(self) -> list[int]:
        """Turns all of whose samples have left since the last call."""
        over = [turn for turn, left in self._left.items() if not left and turn != self._turn]
        for turn in over:
            del self._left[turn]
        return over

    def shuffled(self, items: Iterable[Item]) -> Iterator[Item]:
        """Items in random order: each leaves from a random place of the buffer."""
        held = self._held
        for item in items:
            if held and held[0][0] // self._turns != item[0] // self._turns:
                self._draw.shuffle(held)
                while held:
                    yield self._leaving()
            self._left[item[0]] += 1
            self._bytes += _bytes_of(item)
            held.append(item)
            while len(held) > self._size or self._bytes > MAX_BUFFER_BYTES:
                place = self._draw.randrange(len(held))
                held[place], held[-1] = held[-1], held[place]
                yield self._leaving()

    def _leaving(self) -> Item:
        item = self._held.pop()
        self._left[item[0]] -= 1
        self._bytes -= _bytes_of(item)
        return item


def _bytes_of(item: Item) -> int:
    sample = item[1]
    if isinstance(sample, BrokenReport):
        return 0
    return sum(len(content) for content in sample.values())
