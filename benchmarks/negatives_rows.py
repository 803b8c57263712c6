"""The rows of negatives.py: their CSV and their table."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import get_type_hints

from results import bytes_text
from rich.box import SIMPLE
from rich.table import Table


@dataclass(frozen=True)
class Run:
    """A training run before it is made."""

    data: str
    block_size: int
    """Pairs that compete in one softmax; with the batch size, the whole batch."""
    seed: int
    """Of the first weights, the order of the data and dropout."""
    learning_rate: float
    steps: int
    batch_size: int
    chunk_size: int
    """Pairs that go through a tower at once."""
    towers: str
    """What they are, in words."""


@dataclass(frozen=True)
class Row(Run):
    """A run and what came out: retrieval of rows that no tower was trained on."""

    forward_recall: float
    """R@1: share of the first side's rows whose nearest of the second side is right."""
    backward_recall: float
    """R@1 from the second side to the first."""
    forward_chance: float
    backward_chance: float
    forward_queries: int
    backward_queries: int
    cached_step_bytes: int
    """Tensors at the peak of the step that was run, counted."""
    plain_step_bytes: int
    """Tensors at the peak of a plain step over `block_size` pairs, counted."""
    seconds: float
    """Of the training."""

    @property
    def run(self) -> Run:
        """Its settings alone."""
        return Run(**{field.name: getattr(self, field.name) for field in fields(Run)})


def append_row(path: Path, row: Row, origin: Mapping[str, str]) -> None:
    """Add one line to the CSV, with where it comes from; the first one writes the header."""
    values = {**asdict(row), **origin}
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(values), lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(values)


def read_rows(path: Path) -> list[Row]:
    """All rows of the CSV, in the order in which they came.

    Raises:
        FileNotFoundError: nothing was run yet.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: expected the CSV of an earlier run; run without --redraw")
    types = get_type_hints(Row)
    with path.open(newline="") as file:
        return [
            Row(**{name: types[name](text) for name, text in line.items() if name in types})
            for line in csv.DictReader(file)
        ]


@dataclass(frozen=True)
class Summary:
    """All seeds of one setting."""

    rows: tuple[Row, ...]

    @property
    def first(self) -> Row:
        return self.rows[0]

    def recalls(self, direction: str) -> list[float]:
        """R@1 of each seed, "forward" or "backward"."""
        return [getattr(row, f"{direction}_recall") for row in self.rows]

    def mean(self, direction: str) -> float:
        return statistics.fmean(self.recalls(direction))

    def deviation(self, direction: str) -> float:
        """Standard deviation over the seeds; 0 with a single one."""
        recalls = self.recalls(direction)
        return statistics.stdev(recalls) if len(recalls) > 1 else 0.0


def summaries(rows: Iterable[Row]) -> list[Summary]:
    """Rows that differ in the seed alone, together; by data set, learning rate and block size."""
    together: dict[tuple[str, float, int], list[Row]] = {}
    for row in rows:
        together.setdefault((row.data, row.learning_rate, row.block_size), []).append(row)
    order = list(dict.fromkeys(data for data, _, _ in together))
    keys = sorted(together, key=lambda key: (order.index(key[0]), *key[1:]))
    return [Summary(tuple(together[key])) for key in keys]


def results_table(found: Sequence[Summary], title: str, sides: tuple[str, str]) -> Table:
    """One line for each number of competing pairs, of one data set."""
    first, second = sides
    table = Table(title=title, box=SIMPLE, padding=(0, 1), collapse_padding=True, pad_edge=False)
    headings = (
        "pairs\nthat\ncompete",
        "learn-\ning\nrate",
        f"R@1, %\n{first} →\n{second}",
        f"R@1, %\n{second} →\n{first}",
        "\n\nseeds",
        "tensors\nof this\nstep",
        "of a plain\nstep with as\nmany pairs",
        "sec-\nonds\na run",
    )
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for each in found:
        table.add_row(*_cells(each))
    one = found[0].first
    chances = (one.forward_chance, one.backward_chance)
    table.add_row("chance", "", *(f"{100 * chance:.2g}" for chance in chances))
    return table


def _cells(found: Summary) -> list[str]:
    row = found.first
    return [
        f"{row.block_size:,}",
        f"{row.learning_rate:g}",
        *(_spread(found, direction) for direction in ("forward", "backward")),
        str(len(found.rows)),
        bytes_text(row.cached_step_bytes),
        bytes_text(row.plain_step_bytes),
        f"{statistics.fmean(each.seconds for each in found.rows):.0f}",
    ]


def _spread(found: Summary, direction: str) -> str:
    mean = f"{100 * found.mean(direction):.1f}"
    return mean if len(found.rows) < 2 else f"{mean} ± {100 * found.deviation(direction):.1f}"
