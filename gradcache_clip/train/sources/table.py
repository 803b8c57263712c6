"""Shards from a table (CSV, TSV, JSON lines) of image paths and captions."""

from __future__ import annotations

import csv
import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradcache_clip.train.sources.images import (
    CaptionedFile,
    fingerprint,
    load_file,
    stripped,
)
from gradcache_clip.train.sources.splits import (
    DataSummary,
    Recipe,
    finished_output,
    write_splits,
)

IMAGE_COLUMNS = ("image", "image_path", "filepath", "path", "file", "file_name", "filename")
CAPTION_COLUMNS = ("caption", "captions", "text", "title", "description")

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_JSON_LINES = (".jsonl", ".ndjson")

Row = Mapping[str, Any]
# Captions that are longer are skipped later, each by itself.
_MOST_CHARACTERS = 2**24


@dataclass(frozen=True)
class TableColumns:
    """Names of the columns to read.

    Args:
        image: path of the image; by default the first of `IMAGE_COLUMNS` that the table has.
        captions: one column or more; by default the first of `CAPTION_COLUMNS`. A cell of a JSON
            table may hold a list of captions.
    """

    image: str | None = None
    captions: tuple[str, ...] = ()


def make_table(
    table: Path,
    out: Path,
    *,
    columns: TableColumns | None = None,
    validation_share: float = 0.1,
    seed: int = 0,
) -> DataSummary:
    """Make shards of the images that a table lists, with its captions.

    Relative paths start at the table's folder. Several rows of one image give it several captions.
    Missing and undecodable images are left out, counted, and listed in the manifest by reason.

    Args:
        table: a .csv or .tsv file with a header, or .jsonl with an object a line; UTF-8.
        out: gets train/ and validation/. A complete output of the same files is returned at once.
        columns: names of the columns.
        validation_share: share to hold out; images of the same first caption stay on one side.
        seed: of the split and of the order.

    Raises:
        FileNotFoundError: the table is missing.
        ValueError: another kind of file, an empty table, a missing column (with the nearest name),
            no usable image, or `out` holds shards of other files or settings.
    """
    rows = list(_read_rows(table))
    if not rows:
        raise ValueError(f"table: expected rows in {table}, got none")
    files = _group_rows(rows, table, columns or TableColumns())
    recipe = Recipe(
        source=f"table: {table.name}",
        license="not stated",
        validation_share=validation_share,
        seed=seed,
        settings={"fingerprint": fingerprint([table, *(file.path for file in files)])},
    )
    if summary := finished_output(out, recipe):
        return summary
    return write_splits(files, load_file, out, split_by=lambda file: file.group, recipe=recipe)


def _read_rows(table: Path) -> Iterator[Row]:
    suffix = table.suffix.lower()
    if suffix not in (*_DELIMITERS, *_JSON_LINES):
        raise ValueError(
            f"table: expected a file ending in .csv, .tsv or .jsonl, got {table.name!r}; rename it"
        )
    if not table.is_file():
        raise FileNotFoundError(f"table: expected a file, got {str(table)!r}")
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            if suffix in _DELIMITERS:
                yield from _csv_rows(file, table, _DELIMITERS[suffix])
            else:
                yield from _json_rows(file, table)
    except UnicodeDecodeError as error:
        raise ValueError(f"table: expected UTF-8 text in {table}, got {error}") from error


def _csv_rows(lines: Iterator[str] | Any, table: Path, delimiter: str) -> Iterator[Row]:
    before = csv.field_size_limit(_MOST_CHARACTERS)
    reader = csv.DictReader(lines, delimiter=delimiter)
    try:
        yield from reader
    except csv.Error as error:
        raise ValueError(
            f"{table}, near line {reader.line_num + 1}: expected a row of a table, got an error "
            f"({error}); correct that line"
        ) from error
    finally:
        csv.field_size_limit(before)


def _json_rows(lines: Iterator[str] | Any, table: Path) -> Iterator[Row]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{table}:{number}: expected a JSON object, got {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{table}:{number}: expected a JSON object, got {line.strip()[:60]}")
        yield row


def _group_rows(rows: Sequence[Row], table: Path, columns: TableColumns) -> list[CaptionedFile]:
    """One entry an image, in the order of the table, with the captions of all its rows."""
    names = list(dict.fromkeys(name for row in rows for name in row if isinstance(name, str)))
    image_column = _column(columns.image, IMAGE_COLUMNS, names, "image")
    caption_columns = [
        _column(wanted, CAPTION_COLUMNS, names, "captions")
        for wanted in columns.captions or (None,)
    ]
    captions: dict[str, list[str]] = {}
    for row in rows:
        listed = captions.setdefault(str(row.get(image_column) or "").strip(), [])
        for column in caption_columns:
            value = row.get(column)
            listed += [str(v) for v in value] if isinstance(value, list) else [str(value or "")]
    return [
        CaptionedFile(table.parent / name, name, stripped(listed))
        for name, listed in captions.items()
    ]


def _column(wanted: str | None, defaults: Sequence[str], names: Sequence[str], role: str) -> str:
    for name in (wanted,) if wanted else defaults:
        if name in names:
            return name
    near = difflib.get_close_matches(wanted or defaults[0], names, n=1, cutoff=0)
    expected = repr(wanted) if wanted else f"one of {', '.join(defaults)}"
    raise ValueError(
        f"{role}: expected a column named {expected}, got {', '.join(names) or 'no columns'}; "
        f"the nearest is {near[0] if near else None!r}"
    )
