"""Batches of texts out of lines of JSON: each epoch in a new order, exactly resumable."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from gradcache_clip.train.data.broken import BrokenReport
from gradcache_clip.train.data.position import EpochLeft, Lanes
from gradcache_clip.train.data.resumable import Builder, ResumableLoader, this_rank_alone
from gradcache_clip.train.data.text_lines import TextLines, TextRow

GROUP_SIZE = 32
"""Rows that a worker reads and sends at once."""


@dataclass(frozen=True)
class TextBatch:
    """B queries, each with its document and K hard negatives.

    Args:
        rows: B tuples of query, document and K negatives.
    """

    rows: list[TextRow]
    images = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def texts(self) -> list[list[str]]:
        """Queries, documents and, with K > 0, all K * B negatives: those of the first field first.

        Example:
            >>> TextBatch([("q", "d", "n"), ("r", "e", "m")]).texts
            [['q', 'r'], ['d', 'e'], ['n', 'm']]
        """
        queries, documents, *negatives = ([*column] for column in zip(*self.rows, strict=True))
        joined = [text for column in negatives for text in column]
        return [queries, documents, joined] if joined else [queries, documents]

    @property
    def groups(self) -> list[str]:
        """What each candidate says, documents first: an equal one is no negative."""
        return [text for column in self.texts[1:] for text in column]


class TextLoader(ResumableLoader):
    """Batches of one rank out of .jsonl files, for ever; see `ResumableLoader`.

    The order is a permutation of all rows that seed and epoch determine.

    Args:
        source, fields, prompts: see `TextLines`.
        batch_size: rows a batch of this rank.
        seed: of the order.
        workers, max_broken_share, rank, world_size, on_every_rank: see `ResumableLoader`.

    Raises:
        FileNotFoundError, ValueError: no file, or fewer rows than a batch. While iterating:
            ValueError for too many broken rows.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "pairs.jsonl"
        ...     _ = path.write_text('{"anchor": "a young cat", "positive": "kitten"}')
        ...     next(iter(TextLoader(path, 1, fields=("anchor", "positive")))).texts
        [['a young cat'], ['kitten']]
    """

    def __init__(
        self,
        source: str | Path,
        batch_size: int,
        *,
        fields: Sequence[str],
        prompts: Sequence[str] = (),
        seed: int = 0,
        workers: int = 0,
        max_broken_share: float = 0.05,
        rank: int = 0,
        world_size: int = 1,
        on_every_rank: Callable[[bool], bool] = this_rank_alone,
    ) -> None:
        super().__init__(
            source,
            batch_size,
            # All ranks read one order, of which each takes its groups.
            lanes=Lanes(1, 1),
            workers=workers,
            max_broken_share=max_broken_share,
            rank=rank,
            world_size=world_size,
            on_every_rank=on_every_rank,
        )
        self._lines, self._seed = TextLines(source, fields, prompts), seed
        rows = (rows_of_rank(len(self._lines), each, world_size) for each in range(world_size))
        self._check_size(min(rows))

    def _identity(self) -> dict[str, Any]:
        counted = zip(self._lines.files, self._lines.counts, strict=True)
        named = [(file.name, file.stat().st_size, count) for file, count in counted]
        return {
            "seed": self._seed,
            "group_size": GROUP_SIZE,
            "fields": list(self._lines.fields),
            "files": hashlib.sha256(repr(named).encode()).hexdigest()[:16],
        }

    def _stream(self, left: EpochLeft, first: int) -> IterableDataset[TextGroup | None]:
        order = self._seed, left.number
        return TextGroups(self._lines, order, left, first, (self._rank, self._world_size))

    def _builder(self) -> TextBatchBuilder:
        return TextBatchBuilder(self._batch_size)


@dataclass(frozen=True)
class TextGroup:
    """Neighbours in the order of an epoch.

    Args:
        rows: that can be used.
        broken: what was skipped.
    """

    rows: list[TextRow]
    broken: list[BrokenReport] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def seen(self) -> int:
        """Rows that went in, broken ones included."""
        return len(self.rows) + len(self.broken)


class TextGroups(IterableDataset[TextGroup | None]):
    """The groups of a rank's share of an epoch from one on, then None for ever.

    Args:
        lines: all rows.
        order: seed and number of the epoch.
        epoch: what is left of it.
        first: the first group of the share.
        place: rank and world size.
    """

    def __init__(
        self,
        lines: TextLines,
        order: tuple[int, int],
        epoch: EpochLeft,
        first: int,
        place: tuple[int, int],
    ) -> None:
        self._lines, self._order, self._epoch, self._first = lines, order, epoch, first
        self._rank, self._world_size = place

    def __iter__(self) -> Iterator[TextGroup | None]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        order = order_of(len(self._lines), *self._order)
        for number in itertools.count(self._first + worker, workers):
            group, _ = self._epoch.at(self._rank + number * self._world_size)
            chosen = order[group * GROUP_SIZE : (group + 1) * GROUP_SIZE].tolist()
            yield self._read(chosen) if chosen else None

    def _read(self, chosen: Sequence[int]) -> TextGroup:
        found = [self._lines[number] for number in chosen]
        broken = [row for row in found if isinstance(row, BrokenReport)]
        return TextGroup([row for row in found if not isinstance(row, BrokenReport)], broken)


class TextBatchBuilder(Builder):
    """Fills a batch of texts."""

    def __init__(self, batch_size: int) -> None:
        super().__init__(batch_size)
        self._rows: list[TextRow] = []

    @property
    def filled(self) -> int:
        return len(self._rows)

    def take(self, group: TextGroup, row: int) -> int:
        stop = self.end_of(group, row)
        self._rows += group.rows[row:stop]
        return stop

    def batch(self) -> TextBatch:
        return TextBatch(self._rows)


def rows_of_rank(rows: int, rank: int, world_size: int) -> int:
    """How many rows the groups of one of `world_size` ranks hold in an epoch.

    Example:
        >>> [rows_of_rank(96, rank, 2) for rank in (0, 1)]
        [64, 32]
    """
    starts = range(rank * GROUP_SIZE, rows, world_size * GROUP_SIZE)
    return sum(min(GROUP_SIZE, rows - start) for start in starts)


def order_of(rows: int, seed: int, epoch: int) -> Tensor:
    """int64 (rows,): a permutation that seed and epoch determine."""
    digest = hashlib.blake2b(f"{seed}:{epoch}:texts".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))
    return torch.randperm(rows, generator=generator)
