"""Batches of texts of one rank: each epoch in a new order, exactly resumable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gradcache_clip.train.data.indexed import IndexedFeed
from gradcache_clip.train.data.loader import Loader, check_place
from gradcache_clip.train.data.text_rows import TextRow, TextRows


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
        """Queries, documents and, with K > 0, all B * K negatives, query by query.

        Example:
            >>> TextBatch([("q", "d", "n"), ("r", "e", "m")]).texts
            [['q', 'r'], ['d', 'e'], ['n', 'm']]
        """
        queries, documents, *negatives = ([*column] for column in zip(*self.rows, strict=True))
        joined = [text for row in zip(*negatives, strict=True) for text in row]
        return [queries, documents, joined] if joined else [queries, documents]

    @property
    def groups(self) -> list[str]:
        """What each candidate says, documents first: an equal one is no negative."""
        return [text for column in self.texts[1:] for text in column]


class TextLoader(Loader):
    """Batches of texts of one rank, for ever; see `Loader`.

    The rows of a step follow from the seed and the number of the step alone, and a broken row is
    replaced by another.

    Args:
        source, fields, prompts: see `TextRows`.
        batch_size: rows a batch of this rank.
        seed: of the order.
        workers: processes that read; 0: this one.
        max_broken_share: share of broken rows above which loading stops with an error.
        rank: of this process.
        world_size: number of processes; each reads its own part of a batch.

    Raises:
        FileNotFoundError, ValueError: no file, fewer rows than a batch, or a rank out of range.
            While iterating: ValueError for too many broken rows.

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
    ) -> None:
        check_place(batch_size, rank, world_size)
        feed = IndexedFeed(
            TextRows(source, fields, prompts),
            batch_size,
            seed=seed,
            source=source,
            workers=workers,
            rank=rank,
            world_size=world_size,
        )
        super().__init__(feed, batch_size, TextBatch, rank=rank, max_broken_share=max_broken_share)
