"""Rows of text files as tables of pyarrow, a bounded part of a file at a time."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

BYTES = "latin-1"
"""Each byte is one character of a line, so a line that is not UTF-8 stops no other."""
MAX_LINE_BYTES = 16 * 2**20
MAX_FIELD_CHARACTERS = 16 * 2**20
"""Of a CSV file; the rest of the file where a quote is not closed."""
MAX_GROWTH, MAX_GROWN_BYTES = 100, 2**30
"""Rows of a file may take so many times its bytes, and these bytes more."""

_CHUNK_BYTES = 8 * 2**20
_ROWS = 10_000
_SLICE_BYTES = 64 * 2**20


def batches_of(kind: str, names: Sequence[str]) -> Iterator[Any]:
    """The rows of files of one kind, ".jsonl", ".csv" or ".parquet", with the columns of the first.

    Raises:
        ValueError, OSError: a file is damaged, has other columns, or unpacks to too much.
    """
    reader = {".jsonl": _lines, ".csv": _csv_rows, ".parquet": _parquet_rows}[kind]
    schema = None
    for name in names:
        for table in reader(Path(name)):
            schema = schema or table.schema
            if {*table.column_names} != {*schema.names}:
                raise ValueError(f"{table.column_names} in {name} where {schema.names} come first")
            yield table.select(schema.names).cast(schema)


def _lines(path: Path) -> Iterator[Any]:
    """A column `text`. Of a line that is too long only its beginning is kept, still too long."""
    import pyarrow

    with path.open(encoding=BYTES) as file:
        rest = ""
        while chunk := file.read(_CHUNK_BYTES):
            *lines, rest = (rest + chunk).split("\n")
            rest = rest[: MAX_LINE_BYTES + 1]
            yield pyarrow.table({"text": pyarrow.array(lines, pyarrow.string())})
        if rest:
            yield pyarrow.table({"text": pyarrow.array([rest], pyarrow.string())})


def _csv_rows(path: Path) -> Iterator[Any]:
    """Every value is text: else a column of years would be numbers, and "NA" no text."""
    before = csv.field_size_limit(MAX_FIELD_CHARACTERS)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            names = next(reader, [])
            yield from _csv_tables(_whole_rows(reader, len(names)), names)
    except csv.Error as error:
        raise ValueError(f"{error} near line {reader.line_num}") from error
    finally:
        csv.field_size_limit(before)


def _csv_tables(rows: Iterator[list[Any]], names: list[str]) -> Iterator[Any]:
    import pyarrow

    columns = {name: names.index(name) for name in names}
    while read := list(islice(rows, _ROWS)):
        yield pyarrow.table(
            {
                name: pyarrow.array([row[column] for row in read], pyarrow.string())
                for name, column in columns.items()
            }
        )


def _whole_rows(reader: Any, fields: int) -> Iterator[list[Any]]:
    """Rows that are not empty, filled up with None."""
    for row in reader:
        if len(row) > fields:
            raise ValueError(f"expected {fields} fields in line {reader.line_num}, saw {len(row)}")
        if row:
            yield row + [None] * (fields - len(row))


def _parquet_rows(path: Path) -> Iterator[Any]:
    """A few bytes may stand for many equal texts, which are counted before they are unpacked.

    Columns of lists and structs are left out.
    """
    import pyarrow
    from pyarrow import parquet, types

    with parquet.ParquetFile(path) as file:
        fields = [field for field in file.schema_arrow if not types.is_nested(field.type)]
    schema = pyarrow.schema([(field.name, _plain(field.type)) for field in fields])
    texts = [name for name, kind in zip(schema.names, schema.types, strict=True) if _is_bytes(kind)]
    left = MAX_GROWN_BYTES + MAX_GROWTH * path.stat().st_size
    with parquet.ParquetFile(path, read_dictionary=texts) as file:
        for batch in file.iter_batches(_ROWS, columns=schema.names, use_threads=False):
            size = sum(map(_unpacked_bytes, batch.columns))
            left -= size
            if left < 0:
                raise ValueError(f"rows of more than {MAX_GROWTH} times the bytes of {path}")
            step = max(1, batch.num_rows * _SLICE_BYTES // max(_SLICE_BYTES, size))
            for start in range(0, batch.num_rows, step):
                yield pyarrow.Table.from_batches([batch.slice(start, step)]).cast(schema)


def _plain(kind: Any) -> Any:
    """One type for texts of all kinds, and one for bytes."""
    import pyarrow
    from pyarrow import types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    if types.is_large_string(kind) or types.is_string_view(kind):
        return pyarrow.string()
    if types.is_large_binary(kind) or types.is_binary_view(kind):
        return pyarrow.binary()
    return kind


def _is_bytes(kind: Any) -> bool:
    import pyarrow

    return kind in (pyarrow.string(), pyarrow.binary())


def _unpacked_bytes(column: Any) -> int:
    import pyarrow
    import pyarrow.compute

    if not pyarrow.types.is_dictionary(column.type):
        return int(column.nbytes)
    lengths = pyarrow.compute.binary_length(column.dictionary).take(column.indices)
    return int(pyarrow.compute.sum(lengths).as_py() or 0) + 4 * len(column)
