"""Texts that belong together, each row a line of JSON: found, indexed, and read in any order.

A row is a query, its document and its hard negatives.
"""

from __future__ import annotations

import glob
import json
import mmap
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from gradcache_clip.train.data.broken import BrokenReport, BrokenTally
from gradcache_clip.train.data.decode import BrokenSample

MAX_LINE_BYTES = 16 * 2**20
_BLOCK_BYTES = 16 * 2**20
_LINE_END = ord("\n")

TextRow = tuple[str, ...]
"""One text for each field."""


class TextLines:
    """The rows of .jsonl files by number; memory is 8 bytes a row, since files stay on the disk.

    Args:
        source: a .jsonl file, a folder of them, or a glob.
        fields: names of the texts in a line, such as ("anchor", "positive", "negative").

    Raises:
        FileNotFoundError: no such file.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "pairs.jsonl"
        ...     _ = path.write_text('{"anchor": "a young cat", "positive": "kitten"}')
        ...     rows = TextLines(path, ("anchor", "positive"))
        ...     len(rows), rows[0]
        (1, ('a young cat', 'kitten'))
    """

    def __init__(self, source: str | Path, fields: Sequence[str]) -> None:
        self.files = find_text_files(source)
        self.fields = tuple(fields)
        self._starts = [_line_starts(file) for file in self.files]
        self._ends = [*accumulate(map(len, self._starts))]
        self._maps: dict[int, mmap.mmap] = {}

    @property
    def counts(self) -> list[int]:
        """Rows of each file."""
        return [len(starts) for starts in self._starts]

    def __len__(self) -> int:
        return self._ends[-1]

    def __iter__(self) -> Iterator[TextRow | BrokenReport]:
        return (self[number] for number in range(len(self)))

    def __getitem__(self, number: int) -> TextRow | BrokenReport:
        """The texts of a row, from 0, or why it has none."""
        file = bisect_right(self._ends, number)
        line = number - self._ends[file] + len(self._starts[file])
        try:
            return _texts(self._line(file, int(self._starts[file][line])), self.fields)
        except BrokenSample as error:
            return BrokenReport(str(error), str(self.files[file]), f"line {line + 1}")

    def __getstate__(self) -> dict[str, Any]:
        # Each process maps the files by itself.
        return {**self.__dict__, "_maps": {}}

    def _line(self, file: int, start: int) -> bytes:
        if file not in self._maps:
            with self.files[file].open("rb") as opened:
                self._maps[file] = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        data = self._maps[file]
        end = data.find(b"\n", start)
        end = len(data) if end < 0 else end
        if end - start > MAX_LINE_BYTES:
            raise BrokenSample("line too long")
        return data[start:end]


def find_text_files(source: str | Path) -> list[Path]:
    """The .jsonl files that a path, folder or glob stands for, sorted by name.

    Raises:
        FileNotFoundError: there is none.
    """
    path = Path(source)
    if path.is_dir():
        found = sorted(path.glob("*.jsonl"))
    elif path.is_file():
        found = [path]
    else:
        found = [Path(name) for name in sorted(glob.glob(str(source), recursive=True))]  # noqa: PTH207
    if not found:
        raise FileNotFoundError(
            f"{source}: expected a .jsonl file, a folder of them or a glob, got none; "
            "check the path, or make some with `gradcache-clip data wordnet`"
        )
    return found


def read_all_texts(
    source: str | Path, fields: Sequence[str], *, max_broken_share: float
) -> Iterator[TextRow]:
    """Every row once, in the order of the files; broken ones are left out and logged.

    Raises:
        FileNotFoundError, ValueError: no file; too many broken rows, or no row at all.
    """
    tally = BrokenTally()
    for row in TextLines(source, fields):
        if isinstance(row, BrokenReport):
            tally.add(1, [row])
        else:
            tally.add(1)
            yield row
        tally.check(max_broken_share)
    tally.check(max_broken_share, at_end=True)
    if not tally.seen:
        raise ValueError(f"source: expected at least one line in {source}, got none")


def _line_starts(path: Path) -> np.ndarray:
    """int64 offsets of the lines that are not empty."""
    ends, offset = [], 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            ends.append(np.flatnonzero(np.frombuffer(block, np.uint8) == _LINE_END) + offset)
            offset += len(block)
    stops = np.concatenate([*ends, np.array([offset])]).astype(np.int64)
    starts = np.concatenate([np.zeros(1, np.int64), stops[:-1] + 1])
    return starts[stops > starts]


def _texts(line: bytes, fields: Sequence[str]) -> TextRow:
    try:
        found = json.loads(line)
    except UnicodeDecodeError as error:
        raise BrokenSample("bad utf-8") from error
    except (ValueError, RecursionError) as error:
        raise BrokenSample("bad json") from error
    if not isinstance(found, dict):
        raise BrokenSample("bad json")
    return tuple(_text(found, name) for name in fields)


def _text(found: dict[str, Any], name: str) -> str:
    text = found.get(name)
    if not isinstance(text, str):
        raise BrokenSample(f"missing {name}")
    if not text.strip():
        raise BrokenSample(f"empty {name}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        # Half of a surrogate pair, which JSON can spell and no tokenizer reads.
        raise BrokenSample("bad utf-8") from error
    return text.strip()
