"""The rows of loss.py and their CSV: times, memory and errors, one file each."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import ClassVar, TypeVar, get_type_hints

WRONG_ABOVE = 0.3
"""An error beyond it is no rounding: a gradient of half or twice its size has 0.5 or 1."""
INEXACT_ABOVE = 0.03

_NAN = math.nan


@dataclass(frozen=True)
class Row:
    """What every row says first."""

    loss: str
    """"clip", "siglip" or "nt_xent"."""
    contestant: str
    version: str
    batch_size: int
    width: int
    """Features a vector."""
    dtype: str
    status: str
    """"measured", or why not."""


@dataclass(frozen=True)
class TimeRow(Row):
    """Forward and backward in interleaved rounds of all contestants in one process."""

    kind: ClassVar[str] = "times"
    milliseconds: float = _NAN
    """Median over the rounds."""
    time_over_ours: float = _NAN
    """Median over the rounds of the ratio within a round."""
    lowest_ratio: float = _NAN
    highest_ratio: float = _NAN
    share_of_matmul: float = _NAN
    """8 B^2 D / time, over the rate of a matrix product of the same dtype in the same round."""
    rounds: int = 0


@dataclass(frozen=True)
class MemoryRow(Row):
    """One forward and backward in a fresh process."""

    kind: ClassVar[str] = "memory"
    peak_growth_bytes: float = _NAN
    """Peak memory over what inputs and code held before."""


@dataclass(frozen=True)
class ErrorRow(Row):
    """Largest difference from fp64 over the largest exact entry; infinite: not finite."""

    kind: ClassVar[str] = "errors"
    case: str = ""
    loss_error: float = _NAN
    dq_error: float = _NAN
    dk_error: float = _NAN
    dscale_error: float = _NAN
    dbias_error: float = _NAN

    def by_output(self) -> dict[str, float]:
        """The errors that were measured."""
        found = {name: getattr(self, f"{name}_error") for name in _ERRORS}
        return {name: error for name, error in found.items() if not math.isnan(error)}

    def worst(self) -> tuple[str, float]:
        """The output with the largest error, and that error."""
        return max(self.by_output().items(), key=lambda item: item[1], default=("", _NAN))

    def is_wrong(self) -> bool:
        return self.worst()[1] > WRONG_ABOVE


_ERRORS = ("loss", "dq", "dk", "dscale", "dbias")
AnyRow = TypeVar("AnyRow", TimeRow, MemoryRow, ErrorRow)
_KINDS = (TimeRow, MemoryRow, ErrorRow)


@dataclass
class Results:
    """All rows of a run."""

    times: list[TimeRow]
    memory: list[MemoryRow]
    errors: list[ErrorRow]

    def all(self) -> tuple[list[TimeRow], list[MemoryRow], list[ErrorRow]]:
        return self.times, self.memory, self.errors

    def of(self, loss: str) -> Results:
        """The rows of one loss."""
        return Results(*([row for row in rows if row.loss == loss] for rows in self.all()))

    def contestants(self) -> list[str]:
        """Names in the order of their first rows."""
        return list(dict.fromkeys(row.contestant for row in (*self.memory, *self.times)))


def csv_path(stem: Path, kind: str) -> Path:
    return stem.with_name(f"{stem.name}_{kind}.csv")


def write_results(results: Results, origin: Mapping[str, str], stem: Path) -> list[Path]:
    """Write STEM_times.csv, STEM_memory.csv and STEM_errors.csv; what was not measured is empty."""
    paths = []
    for kind, rows in zip(_KINDS, results.all(), strict=True):
        paths.append(csv_path(stem, kind.kind))
        with paths[-1].open("w", newline="") as file:
            writer = csv.DictWriter(file, [*(one.name for one in fields(kind)), *origin])
            writer.writeheader()
            writer.writerows({**_known(row), **origin} for row in rows)
    return paths


def read_results(stem: Path) -> Results:
    """The rows that `write_results` wrote.

    Raises:
        FileNotFoundError: nothing was measured yet.
    """
    return Results(*(_read(kind, csv_path(stem, kind.kind)) for kind in _KINDS))


def read_origin(stem: Path) -> dict[str, str]:
    """Machine, versions and commit of the run, as the first line of its memory says."""
    with csv_path(stem, MemoryRow.kind).open(newline="") as file:
        first = next(csv.DictReader(file))
    own = {one.name for one in fields(MemoryRow)}
    return {name: text for name, text in first.items() if name not in own}


def _known(row: Row) -> dict[str, object]:
    values = asdict(row)
    unknown = [name for name, value in values.items() if value != value]
    return {name: value for name, value in values.items() if name not in unknown}


def _read(kind: type[AnyRow], path: Path) -> list[AnyRow]:
    if not path.exists():
        raise FileNotFoundError(f"{path}: expected the CSV of an earlier run; run without --redraw")
    types = get_type_hints(kind)
    names = [one.name for one in fields(kind)]
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    kept = ([name for name in names if line[name] or types[name] is str] for line in lines)
    return [
        kind(**{name: types[name](line[name]) for name in own})
        for line, own in zip(lines, kept, strict=True)
    ]
