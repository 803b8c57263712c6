"""Small files of texts: lines of JSON with queries, documents and hard negatives."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradcache_clip.train.data import read_all_texts
from gradcache_clip.train.programs.teacher import save_teacher_features

_TEXT = (
    "small large red green old new letter figure square circle line dot hook bar stroke above "
    "below left right open closed double single heavy light with and of the sign mark arrow"
)
WORDS = _TEXT.split()
FIELDS = ("anchor", "positive", "negative", "other")


def write_lines(path: Path, rows: Iterable[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def rows_of(count: int, seed: int) -> list[dict[str, str]]:
    """A document is the first word of its query, one of few: rows have equal documents."""
    generator = torch.Generator().manual_seed(seed)

    def draw(most: int, words: Sequence[str] = WORDS) -> list[str]:
        length = 1 + int(torch.randint(most, (), generator=generator))
        numbers = torch.randint(len(words), (length,), generator=generator)
        return [words[number] for number in numbers]

    rows = []
    for _ in range(count):
        query = [*draw(1, WORDS[:16]), *draw(12)]
        texts = (query, query[:1], draw(1, WORDS[:24]), draw(5))
        rows.append(dict(zip(FIELDS, map(" ".join, texts), strict=True)))
    return rows


def make_texts(folder: Path, train: int = 160, validation: int = 40) -> Path:
    """`folder` with train/ in two files, and validation/."""
    rows = rows_of(train, seed=1)
    write_lines(folder / "train" / "a.jsonl", rows[: train // 3])
    write_lines(folder / "train" / "b.jsonl", rows[train // 3 :])
    write_lines(folder / "validation" / "all.jsonl", rows_of(validation, seed=2))
    return folder


def names(count: int) -> Sequence[str]:
    """Of a query, its document and `count - 2` hard negatives."""
    return FIELDS[:count]


def taught(side: str, text: str) -> Tensor:
    """A teacher's feature (5,): any, but always the same."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{side} {text}".encode()))
    return torch.randn(5, generator=generator)


def make_teacher(data: Path, path: Path, fields: Sequence[str] = FIELDS[:2]) -> Path:
    """Features of all training texts of a folder; one text may occur several times."""
    columns = zip(*read_all_texts(data / "train", fields, max_broken_share=0.0), strict=True)
    sides = zip(("queries", "documents"), columns, strict=True)
    save_teacher_features(
        path, *((texts, torch.stack([taught(s, text) for text in texts])) for s, texts in sides)
    )
    return path
