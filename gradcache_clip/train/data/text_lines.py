"""Texts that belong together, each row a line of JSON: found, indexed, and read in any order.

A row is a query, its document and its hard negatives.
"""

from __future__ import annotations

import glob
import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from gradcache_clip.train.config_errors import ConfigError
from gradcache_clip.train.data.broken import BrokenReport, BrokenTally
from gradcache_clip.train.data.decode import BrokenSample

MAX_LINE_BYTES = 16 * 2**20
_BLOCK_BYTES = 16 * 2**20
_LINE_END, _RETURN = b"\n\r"
# Rows in search of one that has all fields.
_LOOKED_AT = 100

TextRow = tuple[str, ...]
"""One text for each field."""


class TextLines:
    """The rows of .jsonl files by number; in memory is where each line begins.

    Args:
        source: a .jsonl file, a folder of them, or a glob.
        fields: names of the texts in a line, such as ("anchor", "positive", "negative").
        prompts: what stands before each query and before each other text; nothing where empty.

    Raises:
        FileNotFoundError: no such file.
        ConfigError: none of the first rows has these fields.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "pairs.jsonl"
        ...     _ = path.write_text('{"anchor": "a young cat", "positive": "kitten"}')
        ...     rows = TextLines(path, ("anchor", "positive"))
        ...     len(rows), rows[0]
        (1, ('a young cat', 'kitten'))
    """

    def __init__(
        self, source: str | Path, fields: Sequence[str], prompts: Sequence[str] = ()
    ) -> None:
        self.files = find_text_files(source)
        self.fields = tuple(fields)
        query, document = prompts or ("", "")
        self._prompts = (query, *[document] * (len(self.fields) - 1))
        self._starts = [_line_starts(file) for file in self.files]
        self._ends = [*accumulate(map(len, self._starts))]
        self._check_fields()

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
        file, line = self._place_of(number)
        try:
            found = self._read(file, line)
            texts = (_text(found, name) for name in self.fields)
            pairs = zip(self._prompts, texts, strict=True)
            return tuple(prompt + text for prompt, text in pairs)
        except BrokenSample as error:
            return BrokenReport(str(error), str(self.files[file]), f"line {line + 1}")

    def _place_of(self, number: int) -> tuple[int, int]:
        """File, and line among those that are not empty."""
        if not 0 <= number < len(self):
            raise IndexError(f"number: expected 0 to {len(self) - 1}, got {number}")
        file = bisect_right(self._ends, number)
        return file, number - self._ends[file] + len(self._starts[file])

    def _read(self, file: int, line: int) -> dict[str, Any]:
        # Opened anew: nothing to share with worker processes, and no limit on the number of files.
        with self.files[file].open("rb") as opened:
            opened.seek(int(self._starts[file][line]))
            return _parsed(opened.readline(MAX_LINE_BYTES + 1))

    def _check_fields(self) -> None:
        first: dict[str, Any] = {}
        for number in range(min(_LOOKED_AT, len(self))):
            try:
                found = self._read(*self._place_of(number))
            except BrokenSample:
                continue
            if all(name in found for name in self.fields):
                return
            first = first or found
        if first:
            raise ConfigError(
                f"data.text_fields: expected fields of the lines of {self.files[0]}, which have "
                f"{', '.join(map(str, first))}, got {', '.join(self.fields)}; name those that hold "
                "the query, its document and hard negatives"
            )


def find_text_files(source: str | Path) -> list[Path]:
    """The .jsonl files that a path, folder or glob stands for, sorted by name.

    Raises:
        FileNotFoundError: there is none.
    """
    path = Path(source)
    if path.is_dir():
        found = sorted(path.glob("*.jsonl"))
    elif path.exists():
        found = [path]
    else:
        found = [Path(name) for name in sorted(glob.glob(str(source), recursive=True))]  # noqa: PTH207
    files = [path for path in found if path.is_file()]
    if not files:
        raise FileNotFoundError(
            f"{source}: expected a local .jsonl file, a folder of them or a glob, got none; "
            "check the path, or make some with `python examples/data/wordnet.py OUT`"
        )
    return files


def read_all_texts(
    source: str | Path,
    fields: Sequence[str],
    *,
    prompts: Sequence[str] = (),
    max_broken_share: float,
) -> Iterator[TextRow]:
    """Every row once, in the order of the files; broken ones are left out and logged.

    Raises:
        FileNotFoundError, ValueError: no file; other fields, too many broken rows, or no row at
            all.
    """
    tally = BrokenTally()
    for row in TextLines(source, fields, prompts):
        if isinstance(row, BrokenReport):
            tally.add(1, [row])
        else:
            tally.add(1)
            yield row
        tally.check(max_broken_share)
    tally.check(max_broken_share, at_end=True)
    if not tally.seen:
        raise ValueError(
            f"{source}: expected at least one line, got empty files; write an object such as "
            '{"anchor": "a young cat", "positive": "kitten"} into each line'
        )


def _line_starts(path: Path) -> np.ndarray:
    """int64 offsets of the lines that are not empty, whether they end with \\n or \\r\\n."""
    stops, returns, offset, last = [], [], 0, 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            signs = np.frombuffer(block, np.uint8)
            ends = np.flatnonzero(signs == _LINE_END)
            before = np.concatenate([np.array([last], np.uint8), signs])[ends]
            stops.append(ends + offset)
            returns.append(before == _RETURN)
            offset, last = offset + len(block), block[-1]
    stop = np.concatenate([*stops, [offset]]).astype(np.int64)
    start = np.concatenate([[0], stop[:-1] + 1]).astype(np.int64)
    return start[stop - start > np.concatenate([*returns, [last == _RETURN]])]


def _parsed(line: bytes) -> dict[str, Any]:
    if len(line) > MAX_LINE_BYTES:
        raise BrokenSample("line too long")
    try:
        found = json.loads(line)
    except UnicodeDecodeError as error:
        raise BrokenSample("bad utf-8") from error
    except (ValueError, RecursionError) as error:
        raise BrokenSample("bad json") from error
    if not isinstance(found, dict):
        raise BrokenSample("bad json")
    return found


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
