"""The rows of memory_vs_batch.py: their CSV and their tables."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from itertools import groupby
from pathlib import Path
from typing import get_type_hints

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

MEASURED, OVER_CAP, OUT_OF_MEMORY = "measured", "over cap", "out of memory"
_ANY_RUN = ("date", "commit")


@dataclass(frozen=True)
class Row:
    """One method at one batch size."""

    method: str
    """One of `memory_methods.METHODS`."""
    batch_size: int
    chunk_size: int
    """Pairs that the encoders see at once."""
    encoders: str
    cap_bytes: int
    """Memory that a step may use; one counted beyond it is not run."""
    counted_bytes: int = 0
    """Peak of live tensors, counted on fake tensors."""
    floor_bytes: int = 0
    """Of these, model, optimizer and batch."""
    status: str = ""
    """"measured", "over cap", "out of memory", "timed out", or "not run: " and why."""
    peak_growth_bytes: int = 0
    """Growth of the process's peak resident memory; 0 where not measured."""
    step_ms: float = 0.0
    """Median time of a step; 0 where not measured."""
    steps: int = 0
    """Steps behind the median."""
    cached_over_plain_time: float = 0.0
    """Median ratio of neighbouring steps in one process, in cached rows; 0 where not measured."""
    origin: dict[str, str] = field(default_factory=dict)
    """Machine, versions, settings, code and date; the last columns of the CSV."""

    @property
    def measured(self) -> bool:
        return self.status == MEASURED

    @property
    def does_not_fit(self) -> bool:
        return self.status in (OVER_CAP, OUT_OF_MEMORY)


def write_rows(rows: Sequence[Row], path: Path) -> None:
    """Write the rows, each followed by where it comes from; what was not measured stays empty."""
    names = [each.name for each in fields(Row) if each.name != "origin"]
    origins = list(dict.fromkeys(name for row in rows for name in row.origin))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*names, *origins])
        writer.writeheader()
        for row in rows:
            known = {name: getattr(row, name) for name in names}
            found = {name: value for name, value in known.items() if value not in (0, "")}
            writer.writerow({**found, **row.origin})


def read_rows(path: Path) -> list[Row]:
    """The rows that `write_rows` wrote.

    Raises:
        FileNotFoundError: nothing was measured yet.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: expected the CSV of an earlier run; run without --redraw")
    types = {name: kind for name, kind in get_type_hints(Row).items() if name != "origin"}
    with path.open(newline="") as file:
        return [_row_of(line, types) for line in csv.DictReader(file)]


def find_earlier(row: Row, earlier: Iterable[Row]) -> Row | None:
    """The same point, measured with the same code, settings, machine and versions; if any."""

    def identity(each: Row) -> tuple[object, ...]:
        origin = {name: text for name, text in each.origin.items() if name not in _ANY_RUN}
        return each.method, each.batch_size, each.chunk_size, each.encoders, origin

    return next(
        (each for each in earlier if each.measured and identity(each) == identity(row)), None
    )


def show_tables(rows: Sequence[Row], labels: dict[str, str], console: Console) -> None:
    """Print memory and time, one line a batch size and one column a method; then what did not run.

    Args:
        labels: of the methods, in the order of the columns.
    """
    title = f"One training step: {rows[0].encoders}"
    console.print(_table(f"{title}\npeak memory, * counted only", rows, labels, _memory))
    console.print(_table("seconds", rows, labels, _seconds))
    for row in rows:
        if not row.measured:
            console.print(f"* {labels[row.method]}, {row.batch_size:,}: {row.status}")


def bytes_text(nbytes: float) -> str:
    """Three figures with a binary unit, such as 2.50 TiB, 1.31 GiB or 348 MiB."""
    if nbytes >= 1000 * 2**30:
        return f"{nbytes / 2**40:#.3g} TiB".replace(". ", " ")
    if nbytes >= 1000 * 2**20:
        return f"{nbytes / 2**30:#.3g} GiB".replace(". ", " ")
    return f"{nbytes / 2**20:.0f} MiB"


def _row_of(line: dict[str, str], types: dict[str, Callable[[str], object]]) -> Row:
    known = {name: types[name](text) for name, text in line.items() if name in types and text}
    return Row(**known, origin={name: text for name, text in line.items() if name not in types})


def _table(
    title: str, rows: Sequence[Row], labels: dict[str, str], cell: Callable[[Row], str]
) -> Table:
    table = Table(title=title, box=SIMPLE, padding=(0, 1))
    for heading in ("batch", *labels.values()):
        table.add_column(heading, justify="right", max_width=15)
    for batch_size, group in groupby(rows, key=lambda row: row.batch_size):
        cells = {row.method: cell(row) for row in group}
        table.add_row(f"{batch_size:,}", *(cells.get(method, "") for method in labels))
    return table


def _memory(row: Row) -> str:
    return (
        bytes_text(row.peak_growth_bytes) if row.measured else f"{bytes_text(row.counted_bytes)}*"
    )


def _seconds(row: Row) -> str:
    ratio = f" ({row.cached_over_plain_time:.2f} x)" if row.cached_over_plain_time else ""
    return f"{row.step_ms / 1e3:.2f}{ratio}" if row.step_ms else ""
