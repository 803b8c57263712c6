"""The rows of memory_vs_batch.py: their CSV and their table."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import groupby
from pathlib import Path
from typing import get_type_hints

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Row:
    """One method at one batch size."""

    method: str
    """"plain" or "cached"."""
    batch_size: int
    chunk_size: int
    encoders: str
    cap_bytes: int
    """Memory that a step may use; plain steps counted beyond it are not run."""
    counted_bytes: int = 0
    """Peak of live tensors, counted on fake tensors."""
    status: str = ""
    """"measured", "over cap", "out of memory", "timed out" or "not run"."""
    peak_growth_bytes: int = 0
    """Growth of the process's peak resident memory; 0 where not measured."""
    step_ms: float = 0.0
    """Median time of a step; 0 where not measured."""
    steps: int = 0
    """Steps behind the median."""
    cached_over_plain_time: float = 0.0
    """Median ratio of neighbouring steps in one process, in cached rows; 0 where not measured."""


def write_rows(rows: Sequence[Row], origin: Mapping[str, str], path: Path) -> None:
    """Write the rows, each followed by where it comes from."""
    names = [field.name for field in fields(Row)]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*names, *origin])
        writer.writeheader()
        for row in rows:
            known = {name: value for name, value in asdict(row).items() if value != 0}
            writer.writerow({**known, **origin})


def read_rows(path: Path) -> list[Row]:
    """The rows that `write_rows` wrote.

    Raises:
        FileNotFoundError: nothing was measured yet.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: expected the CSV of an earlier run; run without --redraw")
    types = get_type_hints(Row)
    with path.open(newline="") as file:
        return [
            Row(
                **{name: types[name](text) for name, text in line.items() if name in types and text}
            )
            for line in csv.DictReader(file)
        ]


def show_table(rows: Sequence[Row], console: Console) -> None:
    """Print one line a batch size, plain beside cached."""
    table = Table(title=f"One training step: {rows[0].encoders}", box=SIMPLE, padding=(0, 1))
    memory, step = ("measured", "counted"), ("plain\nstep", "cached\nstep", "time\nratio")
    headings = [f"{method}\n{kind}" for method in ("plain", "cached") for kind in memory]
    for heading in ("batch", *headings, *step):
        table.add_column(heading, justify="right", no_wrap=True)
    for batch_size, group in groupby(rows, key=lambda row: row.batch_size):
        found = {row.method: row for row in group}
        plain, cached = found.get("plain"), found.get("cached")
        table.add_row(
            f"{batch_size:,}",
            _memory(plain),
            _counted(plain),
            _memory(cached),
            _counted(cached),
            _time(plain),
            _time(cached),
            _ratio(cached),
        )
    console.print(table)


def bytes_text(nbytes: float) -> str:
    """Three figures with a binary unit, such as 1.31 GiB or 348 MiB."""
    if nbytes >= 1000 * 2**20:
        return f"{nbytes / 2**30:#.3g} GiB".replace(". ", " ")
    return f"{nbytes / 2**20:.0f} MiB"


def _memory(row: Row | None) -> str:
    if row is None:
        return ""
    return bytes_text(row.peak_growth_bytes) if row.status == "measured" else row.status


def _counted(row: Row | None) -> str:
    return bytes_text(row.counted_bytes) if row else ""


def _time(row: Row | None) -> str:
    return f"{row.step_ms / 1e3:.2f} s" if row and row.step_ms else ""


def _ratio(row: Row | None) -> str:
    return f"{row.cached_over_plain_time:.2f}" if row and row.cached_over_plain_time else ""
