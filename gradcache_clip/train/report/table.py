"""What a run came to: the table, and one place to import the pictures and the log from."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

_RECALL = re.compile(r"(image_to_text|text_to_image)_recall_at_(\d+)")
_ARROWS = {"image_to_text": "image → text", "text_to_image": "text → image"}


@dataclass(frozen=True)
class RunFigures:
    """One column of the table."""

    name: str
    """Heading of the column, e.g. "batch of 1,024, cached"."""
    recall: Mapping[str, float]
    """`RetrievalMetrics.to_scalars()`, or the same names from the log; others are ignored."""
    candidates: int
    """Width of the softmax: how many candidates each row is compared with in training."""
    pairs_per_s: float
    """Training pairs a second."""
    peak_memory_bytes: int
    """Most memory that training held."""
    step_memory_bytes: int | None = None
    """Tensors that a step holds at its peak, as counted, where known."""
    plain_memory_bytes: int | None = None
    """What a plain step over as many candidates would have needed, where known."""


@dataclass(frozen=True)
class _Line:
    label: str
    cells: tuple[str, ...]
    chance: str = ""
    best: int | None = None
    """Column of the one best value, if any is best."""


def metrics_table(runs: Sequence[RunFigures], *, title: str = "Held-out retrieval") -> Table:
    """Recall both ways, speed and memory, a column a run, as a rich table for a terminal.

    The best recall of a line is bold; the last column holds the chance level.

    Args:
        runs: the columns; the first one sets which recalls are shown.
        title: stands above.

    Raises:
        ValueError: no run, or a first one without recall.
    """
    from rich import box
    from rich.table import Table

    table = Table(title=title, box=box.SIMPLE_HEAD, title_style="bold")
    table.add_column()
    for run in runs:
        table.add_column(run.name, justify="right")
    table.add_column("chance", justify="right", style="dim")
    for line in _lines(runs):
        cells = [
            f"[bold green]{cell}[/]" if i == line.best else cell
            for i, cell in enumerate(line.cells)
        ]
        table.add_row(line.label, *cells, line.chance)
    return table


def to_markdown(runs: Sequence[RunFigures]) -> str:
    """The cells of `metrics_table` as a Markdown table, ending in a line break.

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
    lines = _lines(runs)
    head = ["", *(run.name for run in runs), "chance"]
    rows = [head] + [
        [
            line.label,
            *(f"**{cell}**" if i == line.best else cell for i, cell in enumerate(line.cells)),
            line.chance,
        ]
        for line in lines
    ]
    text = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    text.insert(1, "|:--|" + "--:|" * (len(head) - 1))
    return "\n".join(text) + "\n"


def format_bytes(count: float) -> str:
    """In the binary unit that leaves at least one digit before the point, e.g. `1.50 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1024
    return f"{count:.2f} TiB"


def _lines(runs: Sequence[RunFigures]) -> list[_Line]:
    names = [name for name in (runs[0].recall if runs else ()) if _RECALL.fullmatch(name)]
    if not names:
        raise ValueError(
            "runs: expected at least one with recall in its figures, got none; "
            "pass recall=metrics.to_scalars()"
        )
    lines = [_recall_line(name, runs) for name in names]
    lines += [
        _line("candidates in the softmax", runs, lambda run: f"{run.candidates:,}"),
        _line("training pairs per second", runs, lambda run: f"{run.pairs_per_s:,.0f}"),
        _line("peak memory of the process", runs, lambda run: format_bytes(run.peak_memory_bytes)),
    ]
    for label, counts in (
        ("tensors of a step", [run.step_memory_bytes for run in runs]),
        ("tensors of a plain step", [run.plain_memory_bytes for run in runs]),
    ):
        if any(count is not None for count in counts):
            cells = ("" if count is None else format_bytes(count) for count in counts)
            lines.append(_Line(label, tuple(cells)))
    return lines


def _line(label: str, runs: Sequence[RunFigures], cell: Callable[[RunFigures], str]) -> _Line:
    return _Line(label, tuple(cell(run) for run in runs))


def _recall_line(name: str, runs: Sequence[RunFigures]) -> _Line:
    match = _RECALL.fullmatch(name)
    assert match is not None
    values = [run.recall.get(name) for run in runs]
    known = [value for value in values if value is not None]
    chance = runs[0].recall.get(f"{name}_chance")
    alone_on_top = len(runs) > 1 and known.count(max(known)) == 1
    return _Line(
        label=f"R@{match[2]} {_ARROWS[match[1]]}",
        cells=tuple("" if value is None else f"{100 * value:.1f} %" for value in values),
        chance="" if chance is None else f"{100 * chance:.1f} %",
        best=values.index(max(known)) if alone_on_top else None,
    )
