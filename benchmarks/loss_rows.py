"""The rows of the CLIP, sigmoid and NT-Xent losses, their files, and how figures are written."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from contests import MEASURED
from results import read_csv, read_rows, write_rows

TITLES = {
    "clip": "CLIP loss",
    "siglip": "Sigmoid loss (SigLIP)",
    "nt_xent": "NT-Xent loss (SimCLR)",
}
VIEWS = {"clip": 1, "siglip": 1, "nt_xent": 2}
"""Rows of the matrix for a pair; NT-Xent gets half the batches, so that the matrices are equal."""
FULL_BATCH = 65_536
WRONG_ABOVE = 0.3
"""An error beyond it is no rounding: a gradient of half or twice its size has 0.5 or 1."""
PLAIN_LOSS = "plain loss"
"""Contestant that is written as a person does."""
_NAN = math.nan
_ERRORS = ("loss", "dq", "dk", "dscale", "dbias")


@dataclass(frozen=True)
class Row:
    """Begins every row."""

    loss: str
    """A key of `TITLES`."""
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
    """One forward and backward in a process of its own."""

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

    def main_times(self) -> dict[str, TimeRow]:
        """By contestant, at the batch at which all were timed."""
        smallest = min((row.batch_size for row in self.times), default=0)
        return {row.contestant: row for row in self.times if row.batch_size == smallest}

    def measured_times(self) -> dict[str, TimeRow]:
        return {name: row for name, row in self.main_times().items() if row.status == MEASURED}

    def memory_at_largest(self) -> dict[str, MemoryRow]:
        """By contestant, at the largest batch tried at all; its status says if that did not run."""
        largest = max((row.batch_size for row in self.memory), default=0)
        found: dict[str, MemoryRow] = {}
        for row in self.memory:
            if row.batch_size == largest or row.contestant not in found or row.status != MEASURED:
                found[row.contestant] = row
        return found

    def wrong(self) -> set[str]:
        """Contestants whose loss or gradient is another one in some case."""
        return {row.contestant for row in self.errors if row.is_wrong()}


def stem(results: Path, device: str, dtype: str) -> Path:
    """How the names of all files of a device and dtype begin."""
    return results / f"loss_{device}_{dtype}"


def files(results: Path, device: str = "cpu", dtype: str = "fp32") -> list[Path]:
    """Those that `write_results` writes."""
    return [csv_path(stem(results, device, dtype), kind) for kind in _KINDS]


def csv_path(stem: Path, kind: type[Row]) -> Path:
    return stem.with_name(f"{stem.name}_{kind.kind}.csv")  # type: ignore[attr-defined]


def write_results(results: Results, origin: Mapping[str, str], stem: Path) -> list[Path]:
    """Write STEM_times.csv, STEM_memory.csv and STEM_errors.csv."""
    return [
        write_rows(kind, rows, csv_path(stem, kind), origin)
        for kind, rows in zip(_KINDS, results.all(), strict=True)
    ]


def read_results(stem: Path) -> Results:
    """The rows that `write_results` wrote; raises as `read_rows`."""
    return Results(*(read_rows(kind, csv_path(stem, kind)) for kind in _KINDS))  # type: ignore[arg-type]


def read_origin(stem: Path) -> dict[str, str]:
    """Machine, versions and commit of the run, as the first line of its memory says."""
    own = MemoryRow.__dataclass_fields__
    first = read_csv(csv_path(stem, MemoryRow))[0]
    return {name: text for name, text in first.items() if name not in own}


def bytes_text(nbytes: float) -> str:
    """Such as 4.25 GB or 46 MB, in powers of ten."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.0f} MB"


def time_text(milliseconds: float) -> str:
    """Such as 3.41 s or 327 ms."""
    if milliseconds >= 1e3:
        return f"{milliseconds / 1e3:.2f} s"
    return f"{milliseconds:#.3g} ms".replace(". ", " ")
