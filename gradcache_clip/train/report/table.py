"""Tables of recall, speed and memory of several runs."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

_RECALL = re.compile(r"(image_to_text|text_to_image)_recall_at_(\d+)")


@dataclass(frozen=True)
class RunFigures:
    """One column of the table."""

    name: str
    """Heading of the column, e.g. "batch of 1,024, cached"."""
    recall: Mapping[str, float]
    """`RetrievalMetrics.to_scalars()`, or the same names from the log; others are ignored."""
    candidates: int
    """Candidates that each sample is compared with in training."""
    pairs_per_s: float
    """Training pairs per second."""
    peak_memory_bytes: int
    """Peak memory of the training process."""
    step_memory_bytes: int | None = None
    """Peak bytes of a step's tensors, counted."""
    plain_memory_bytes: int | None = None
    """The same for a plain step with as many candidates."""


def metrics_table(runs: Sequence[RunFigures], *, title: str = "Held-out retrieval") -> Table:
    """Return a table for a terminal, with one column per run.

    The best recall of a row is bold; the last column gives the chance level.

    Args:
        runs: the columns; the first determines which recalls are shown.
        title: of the table.

    Raises:
        ValueError: no runs, or no recall in the first one.
    """
    from rich import box
    from rich.table import Table

    table = Table(title=title, box=box.SIMPLE_HEAD, title_style="bold")
    table.add_column()
    for run in runs:
        table.add_column(run.name, justify="right")
    table.add_column("chance", justify="right", style="dim")
    for row in _rows(runs, "[bold green]{}[/]"):
        table.add_row(*row)
    return table


def to_markdown(runs: Sequence[RunFigures]) -> str:
    """Return the cells of `metrics_table` as a Markdown table, ending in a line break.

    Example:
        >>> recall = {"image_to_text_recall_at_1": 0.5, "image_to_text_recall_at_1_chance": 0.01}
        >>> print(to_markdown([RunFigures("cached", recall, 1024, 5000.0, 3 << 30)]), end="")
        |  | cached | chance |
        |:--|--:|--:|
        | R@1 image → text | 50.0 % | 1.0 % |
        | candidates in the softmax | 1,024 |  |
        | training pairs per second | 5,000 |  |
        | peak memory of the process | 3.00 GiB |  |
    """
    head = ["", *(run.name for run in runs), "chance"]
    rows = [head, *_rows(runs, "**{}**")]
    text = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    text.insert(1, "|:--|" + "--:|" * (len(head) - 1))
    return "\n".join(text) + "\n"


def format_bytes(count: float) -> str:
    """Format bytes in the largest unit that keeps the number at least 1, e.g. `1.50 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1024
    return f"{count:.2f} TiB"


def _rows(runs: Sequence[RunFigures], bold: str) -> list[list[str]]:
    """Return rows of a label, a cell per run, and the chance level."""
    names = [name for name in (runs[0].recall if runs else ()) if _RECALL.fullmatch(name)]
    if not names:
        raise ValueError(
            "runs: expected at least one with recall in its figures, got none; "
            "pass recall=metrics.to_scalars()"
        )
    columns: dict[str, Callable[[RunFigures], str]] = {
        "candidates in the softmax": lambda run: f"{run.candidates:,}",
        "training pairs per second": lambda run: f"{run.pairs_per_s:,.0f}",
        "peak memory of the process": lambda run: format_bytes(run.peak_memory_bytes),
        "tensors of a step": lambda run: _counted(run.step_memory_bytes),
        "tensors of a plain step": lambda run: _counted(run.plain_memory_bytes),
    }
    rows = [[label, *map(cell, runs), ""] for label, cell in columns.items()]
    return [_recall_row(name, runs, bold) for name in names] + [row for row in rows if any(row[1:])]


def _counted(count: int | None) -> str:
    return "" if count is None else format_bytes(count)


def _recall_row(name: str, runs: Sequence[RunFigures], bold: str) -> list[str]:
    way, depth = name.split("_recall_at_")
    cells = [_percent(run.recall.get(name)) for run in runs]
    values = [run.recall.get(name, -1.0) for run in runs]
    if len(runs) > 1 and values.count(max(values)) == 1:
        best = values.index(max(values))
        cells[best] = bold.format(cells[best])
    chance = _percent(runs[0].recall.get(f"{name}_chance"))
    return [f"R@{depth} {way.replace('_to_', ' → ')}", *cells, chance]


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"
