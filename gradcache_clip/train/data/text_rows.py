"""Texts that belong together, by number, out of JSON lines, Parquet, CSV or Arrow files.

A row is a query, its document and its hard negatives.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from gradcache_clip.train.config_errors import ConfigError
from gradcache_clip.train.data.broken import BrokenReport, BrokenTally
from gradcache_clip.train.data.decode import MAX_CAPTION_CHARACTERS, BrokenSample
from gradcache_clip.train.data.pieces import Columns
from gradcache_clip.train.data.text_batches import BYTES, MAX_LINE_BYTES
from gradcache_clip.train.data.text_tables import LINES, find_text_files, table_of

# Rows in search of one that has all fields.
_LOOKED_AT = 100

TextRow = tuple[str, ...]
"""One text for each field."""


class TextRows:
    """The rows of text files by number; see `Rows`.

    Args:
        source: a file, a folder of files, or a glob; see `find_text_files`.
        fields: names of the texts in a row, such as ("anchor", "positive", "negative").
        prompts: what stands before each query and before each other text; nothing where empty.

    Raises:
        FileNotFoundError: no such file.
        ConfigError: a file cannot be read, or none of the first rows has these fields.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "pairs.jsonl"
        ...     _ = path.write_text('{"anchor": "a young cat", "positive": "kitten"}')
        ...     rows = TextRows(path, ("anchor", "positive"))
        ...     len(rows), rows.read(0)
        (1, ('a young cat', 'kitten'))
    """

    lost = ()

    def __init__(
        self, source: str | Path, fields: Sequence[str], prompts: Sequence[str] = ()
    ) -> None:
        self.source, self.files = source, find_text_files(source)
        self.fields = tuple(fields)
        query, document = prompts or ("", "")
        self._prompts = (query, *[document] * (len(self.fields) - 1))
        self._is_lines = self.files[0].suffix in LINES
        table = table_of(self.files)
        self._columns = {name: table[name] for name in table.column_names}
        self._numbers = _not_empty(table["text"]) if self._is_lines else np.arange(table.num_rows)
        self._check_fields()

    @property
    def identity(self) -> dict[str, object]:
        """What a saved state must agree with; a moved set is the same set."""
        named = [(file.name, file.stat().st_size) for file in self.files]
        digest = hashlib.sha256(repr((named, len(self))).encode()).hexdigest()
        return {"fields": list(self.fields), "files": digest[:16]}

    def __len__(self) -> int:
        return len(self._numbers)

    def read(self, number: int, _epoch: int = 0) -> TextRow | BrokenReport:
        """The texts of a row, from 0, or why it has none."""
        try:
            found = self._found(number)
            texts = (_text(found, name) for name in self.fields)
            pairs = zip(self._prompts, texts, strict=True)
            return tuple(prompt + text for prompt, text in pairs)
        except BrokenSample as error:
            return BrokenReport(str(error), *self._place_of(number))

    def columns(self, rows: Sequence[TextRow]) -> Columns:
        """The field of a `TextBatch`."""
        return {"rows": list(rows)}

    def _found(self, number: int) -> dict[str, Any]:
        row = int(self._numbers[number])
        if self._is_lines:
            return _parsed(self._columns["text"][row].as_py().encode(BYTES))
        try:
            return {name: self._columns[name][row].as_py() for name in self.fields}
        except UnicodeDecodeError as error:
            raise BrokenSample("bad utf-8") from error

    def _place_of(self, number: int) -> tuple[str, str]:
        """File and line, for a report."""
        row = int(self._numbers[number])
        if not self._is_lines:
            return str(self.source), f"row {row + 1}"
        file = min(bisect_right(self._ends, row), len(self.files) - 1)
        before = self._ends[file - 1] if file else 0
        return str(self.files[file]), f"line {row - before + 1}"

    @cached_property
    def _ends(self) -> list[int]:
        """Where the lines of each file end; counted only if one of them is broken."""
        return [*accumulate(map(_count_lines, self.files))]

    def _check_fields(self) -> None:
        names = self._names_of_first_row() if self._is_lines else self._columns
        if names and not all(name in names for name in self.fields):
            raise ConfigError(
                f"data.text_fields: expected fields of the lines of {self.files[0]}, which have "
                f"{', '.join(map(str, names))}, got {', '.join(self.fields)}; name those that hold "
                "the query, its document and hard negatives"
            )

    def _names_of_first_row(self) -> dict[str, Any]:
        """The first of some rows that has all fields, else the first."""
        rows = []
        for number in range(min(_LOOKED_AT, len(self))):
            with suppress(BrokenSample):
                rows.append(self._found(number))
        whole = (row for row in rows if all(name in row for name in self.fields))
        return next(whole, next(iter(rows), {}))


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
    tally, rows = BrokenTally(), TextRows(source, fields, prompts)
    for row in map(rows.read, range(len(rows))):
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


def _not_empty(lines: Any) -> np.ndarray:
    """int64, the numbers of lines that are not empty."""
    import pyarrow.compute

    return np.flatnonzero(pyarrow.compute.binary_length(lines).to_numpy())


def _count_lines(path: Path) -> int:
    with path.open(encoding=BYTES) as file:
        return sum(1 for _ in file)


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
    if len(text) > MAX_CAPTION_CHARACTERS:
        raise BrokenSample(f"{name} too long")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        # Half of a surrogate pair, which JSON can spell and no tokenizer reads.
        raise BrokenSample("bad utf-8") from error
    return text.strip()
