"""Pieces of batches out of rows that can be read by number, in the order of `Order`."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch.utils.data import Dataset, Sampler

from gradcache_clip.train.data.broken import BrokenReport
from gradcache_clip.train.data.order import Order
from gradcache_clip.train.data.pieces import Columns, Piece
from gradcache_clip.train.data.spares import Spares
from gradcache_clip.train.data.workers import TIMEOUT_S, pieces_of_workers

MIN_PIECE_ROWS = 32
MAX_PIECES = 64
"""Of a batch: each holds an open file handle until it is copied."""


class Rows(Protocol):
    """Samples by number."""

    @property
    def lost(self) -> Sequence[BrokenReport]:
        """Samples that no number stands for."""

    @property
    def identity(self) -> Mapping[str, object]:
        """What a saved state must agree with."""

    def __len__(self) -> int: ...

    def read(self, number: int, epoch: int) -> Any | BrokenReport:
        """A sample as an epoch shows it, or why it cannot be used."""

    def columns(self, rows: Sequence[Any]) -> Columns:
        """The fields of a batch."""


class IndexedFeed:
    """The rows of one rank, step after step; where it stands is the number of the step.

    Args:
        rows: the samples.
        batch_size: rows a batch of this rank.
        seed: of the order.
        source: of the samples, for messages.
        workers: processes that read; 0: this one.
        rank, world_size: each rank reads its own part of every batch.

    Raises:
        ValueError: fewer samples than a batch of all ranks.
    """

    def __init__(
        self,
        rows: Rows,
        batch_size: int,
        *,
        seed: int,
        source: str | Path,
        workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if len(rows) < batch_size * world_size:
            ranks = f" for each of {world_size} ranks" if world_size > 1 else ""
            raise ValueError(
                f"batch_size: expected a data set of one batch or more, got "
                f"{len(rows) // world_size} samples{ranks} in {source} with "
                f"batch_size={batch_size}; lower batch_size or add samples"
            )
        self._rows, self._batch_size, self._workers = rows, batch_size, workers
        self._order = Order(len(rows), batch_size * world_size, seed)
        self._part = range(rank * batch_size, (rank + 1) * batch_size)
        self._received = 0

    @property
    def identity(self) -> dict[str, object]:
        """What a saved state must agree with."""
        order = self._order
        return {"seed": order.seed, "batch_size": order.batch_size, **self._rows.identity}

    @property
    def step(self) -> int:
        """Batches that were received."""
        return self._received // self._batch_size

    @property
    def epoch(self) -> int:
        """Epoch of the last batch received, from 0."""
        return self._order.epoch(max(0, self.step - 1))

    @property
    def rows_of_epoch(self) -> int:
        """Rows that this rank receives in an epoch."""
        return self._order.steps * self._batch_size

    def state(self) -> dict[str, Any]:
        """Where the feed stands."""
        return {"step": self.step}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on where the feeds of all ranks stood."""
        self._received = state["step"] * self._batch_size

    def used(self, piece: Piece) -> None:
        """Count a piece all of whose rows were received."""
        self._received += len(piece)

    def pieces(self, timeout_s: float = TIMEOUT_S) -> Generator[Piece | Exception, None, None]:
        """The pieces of this rank's batches, for ever; no piece reaches into two batches."""
        self._received = self.step * self._batch_size
        size = max(MIN_PIECE_ROWS, -(-self._batch_size // MAX_PIECES))
        yield from pieces_of_workers(
            _Pieces(self._rows, self._order),
            _Places(self._order, self._part, self.step, size),
            workers=self._workers,
            batch_size=self._batch_size,
            piece_rows=size,
            timeout_s=timeout_s,
        )


class _Place(NamedTuple):
    step: int
    position: int
    sample: int


class _Places(Sampler[list[_Place]]):
    """Places of a rank from a step on, those of a piece at a time, for ever."""

    def __init__(self, order: Order, part: range, step: int, size: int) -> None:
        self._order, self._part, self._step, self._size = order, part, step, size

    def __iter__(self) -> Iterator[list[_Place]]:
        for step in itertools.count(self._step):
            samples = self._order.batch(step)
            for start in self._part[:: self._size]:
                positions = range(start, min(start + self._size, self._part.stop))
                yield [_Place(step, each, int(samples[each])) for each in positions]


class _Pieces(Dataset[Piece | Exception]):
    """The piece of some places: at each its sample, or the first substitute that can be used."""

    def __init__(self, rows: Rows, order: Order) -> None:
        self._rows, self._order = rows, order
        self._spares = Spares(order, self._is_good)

    def __getitem__(self, places: Sequence[_Place]) -> Piece | Exception:
        broken: list[BrokenReport] = []
        try:
            drawn = [self._draw(place, broken) for place in places]
        except OSError as error:
            return error
        rows = [row for row in drawn if row is not None]
        unfilled = len(drawn) - len(rows)
        return Piece(self._rows.columns(rows), len(rows) + len(broken), broken, unfilled)

    def _draw(self, place: _Place, broken: list[BrokenReport]) -> Any | None:
        epoch = self._order.epoch(place.step)
        others = self._order.substitutes(place.step, place.position)
        for sample in itertools.chain([place.sample], others):
            found = self._rows.read(sample, epoch)
            if not isinstance(found, BrokenReport):
                return found
            broken.append(found)
        spare = self._spares.of(place.step, place.position)
        return None if spare is None else self._rows.read(spare, epoch)

    def _is_good(self, sample: int) -> bool:
        return not isinstance(self._rows.read(sample, 0), BrokenReport)
