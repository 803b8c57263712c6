"""Loss, in-batch accuracy and held-out recall over the steps of one or several runs."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradcache_clip.train.report.canvas import MAIN, OTHERS, PALE, new_figure, save_figure, settings

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Above so many points a faint line of all of them lies under the smoothed one.
_DENSE = 60


@dataclass(frozen=True)
class RunCurve:
    """One run in the picture."""

    name: str
    """In the legend, e.g. "cached, batch of 1,024"."""
    rows: Sequence[Mapping[str, Any]]
    """Lines of its log, as `read_log` returns them: step, loss, accuracy, ..._recall_at_1."""
    candidates: int
    """How many candidates each row is compared with in training: the batch, or the chunk where the
    softmax is limited to it."""
    guess: float | None = None
    """Loss of guessing; log(candidates), as of a softmax, where None."""

    @property
    def guessed_loss(self) -> float:
        """That of a run that has learned nothing of the pairs."""
        return math.log(self.candidates) if self.guess is None else self.guess


@dataclass(frozen=True)
class _HeldOut:
    """The panel of held-out figures."""

    title: str
    ylabel: str
    lines: Mapping[str, tuple[str, str]]
    """Name in the log -> style of the line and what it is called."""
    chances: Sequence[str]
    headline: str
    """What the picture's title says of the mean of the first `averaged` lines."""
    averaged: int


_RECALL = _HeldOut(
    title="Held-out recall@1",
    ylabel="queries with a right first answer (%)",
    lines={
        "image_to_text_recall_at_1": ("-", "image → text"),
        "text_to_image_recall_at_1": ("--", "text → image"),
    },
    chances=("image_to_text_recall_at_1_chance", "text_to_image_recall_at_1_chance"),
    headline="Held-out recall@1",
    averaged=2,
)
_CLASSES = _HeldOut(
    title="Classes of held-out images",
    ylabel="images of the right class (%)",
    lines={
        "knn_accuracy": ("-", "nearest training images"),
        "probe_accuracy": ("--", "linear classifier"),
    },
    chances=("label_chance",),
    headline="Held-out images named by their nearest training images",
    averaged=1,
)


_QUERIES = "query_to_document_recall_at_1"
_WIDTH = re.compile(rf"{_QUERIES}_of_(\d+)_numbers")
# Of the whole features, then of ever shorter prefixes.
_STYLES = ("-", "--", "-.", ":")


def _panel_of(names: set[str]) -> _HeldOut:
    """What a log with such names has to show."""
    if "knn_accuracy" in names:
        return _CLASSES
    if _QUERIES not in names:
        return _RECALL
    widths = sorted(
        (int(found[1]) for found in map(_WIDTH.fullmatch, names) if found), reverse=True
    )
    lines = {_QUERIES: ("-", "query → document")}
    for number, width in enumerate(widths, start=1):
        style = _STYLES[number % len(_STYLES)]
        lines[f"{_QUERIES}_of_{width}_numbers"] = (style, f"by the first {width} numbers")
    return _HeldOut(
        title="Held-out recall@1",
        ylabel="queries with a right first answer (%)",
        lines=lines,
        chances=(f"{_QUERIES}_chance",),
        headline="Held-out recall@1",
        averaged=1,
    )


def draw_curves(runs: Sequence[RunCurve], path: str | Path) -> Path:
    """Three panels over the optimizer steps, the first run in blue.

    The loss of guessing grows with the candidates, so losses of softmaxes of different width are
    not to be compared; dotted lines show guessing for each. Held-out recall@1, or for runs over
    views the share of images whose class is named rightly, is the same task for all runs.

    Args:
        runs: the run to show and those to compare it with.
        path: where the PNG goes.

    Returns:
        `path`.

    Raises:
        ValueError: no run, or no run with a loss.
    """
    if not any(_points(run, "loss")[0] for run in runs):
        raise ValueError(
            "runs: expected at least one with a loss in its rows, got none; pass read_log(folder)"
        )
    with settings():
        figure = new_figure(1320, 470)
        grid = figure.add_gridspec(
            1, 3, left=0.05, right=0.985, bottom=0.125, top=0.76, wspace=0.2, width_ratios=(4, 4, 5)
        )
        loss, accuracy, recall = (figure.add_subplot(grid[0, i]) for i in range(3))
        _draw_loss(loss, runs)
        _draw_accuracy(accuracy, runs)
        finding = _draw_held_out(recall, runs)
        figure.suptitle(finding, fontsize=14, fontweight="bold", x=0.05, y=0.965, ha="left")
        return save_figure(figure, path)


def _draw_loss(axes: Axes, runs: Sequence[RunCurve]) -> None:
    for run, color in _coloured(runs):
        _draw_line(axes, run, "loss", color)
        _draw_chance(axes, run.guessed_loss, color)
    _finish(axes, "Training loss", f"dotted: guessing, {_guesses(runs)}", runs)
    axes.set_ylabel("loss (nats)")
    axes.set_ylim(bottom=0)


def _draw_accuracy(axes: Axes, runs: Sequence[RunCurve]) -> None:
    for run, color in _coloured(runs):
        _draw_line(axes, run, "accuracy", color, scale=100)
        _draw_chance(axes, 100 / run.candidates, color)
    widths = " or ".join(f"{width:,}" for width in _widths(runs))
    _finish(axes, "In-batch accuracy", f"the one right of {widths}; dotted: guessing", runs)
    axes.set_ylabel("right answers in the batch (%)")
    axes.set_ylim(bottom=0)
    axes.legend(loc="best", frameon=False, fontsize=9)


def _draw_held_out(axes: Axes, runs: Sequence[RunCurve]) -> str:
    """Also says, for the title of the picture, what came out."""
    panel = _panel_of({name for row in runs[0].rows for name in row})
    last: dict[str, list[float]] = {}
    for run, color in _coloured(runs):
        for name, (style, label) in panel.lines.items():
            steps, values = _points(run, name, scale=100)
            if not steps:
                continue
            axes.plot(steps, values, style, color=color, marker=_marker(steps), ms=3.5, lw=1.8)
            last.setdefault(run.name, []).append(values[-1])
            if run is runs[0]:
                axes.plot([], [], style, color=PALE, label=label)
    for name in panel.chances:
        _, values = _points(runs[0], name, scale=100)
        if values:
            _draw_chance(axes, values[-1], PALE)
    _finish(axes, panel.title, "the same task for every run; dotted: guessing", runs)
    axes.set_ylabel(panel.ylabel)
    axes.set_ylim(bottom=0)
    if not last:
        axes.text(0.5, 0.5, "no held-out evaluation in the log", transform=axes.transAxes,
                  ha="center", color=PALE)  # fmt: skip
        return "Training curves"
    axes.legend(loc="best", frameon=False, fontsize=9)
    shown = {name: values[: panel.averaged] for name, values in last.items()}
    means = [f"{sum(values) / len(values):.1f} % ({name})" for name, values in shown.items()]
    return f"{panel.headline}: " + " against ".join(means)


def _draw_line(axes: Axes, run: RunCurve, name: str, color: str, *, scale: float = 1) -> None:
    steps, values = _points(run, name, scale=scale)
    if len(steps) > _DENSE:
        axes.plot(steps, values, color=color, lw=0.8, alpha=0.25)
        values = _smoothed(values)
    axes.plot(steps, values, color=color, marker=_marker(steps), ms=3.5, lw=1.8, label=run.name)


def _marker(steps: Sequence[int]) -> str | None:
    return "o" if len(steps) < 30 else None


def _draw_chance(axes: Axes, level: float, color: str) -> None:
    axes.axhline(level, color=color, lw=1.3, ls=(0, (1, 2)))


def _finish(axes: Axes, title: str, subtitle: str, runs: Sequence[RunCurve]) -> None:
    axes.set_title(title, loc="left", fontweight="bold", pad=20)
    axes.text(0, 1.02, subtitle, transform=axes.transAxes, fontsize=9, color=PALE)
    axes.set_xlabel("optimizer step")
    axes.set_xlim(0, max(row["step"] for run in runs for row in run.rows) * 1.01)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _coloured(runs: Sequence[RunCurve]) -> list[tuple[RunCurve, str]]:
    return [(run, MAIN if i == 0 else OTHERS[(i - 1) % len(OTHERS)]) for i, run in enumerate(runs)]


def _widths(runs: Sequence[RunCurve]) -> list[int]:
    return list(dict.fromkeys(run.candidates for run in runs))


def _guesses(runs: Sequence[RunCurve]) -> str:
    levels = (
        f"log {run.candidates:,} = {run.guessed_loss:.2f}"
        if run.guess is None
        else f"{run.guess:.2f}"
        for run in runs
    )
    return ", ".join(dict.fromkeys(levels))


def _points(run: RunCurve, name: str, *, scale: float = 1) -> tuple[list[int], list[float]]:
    """Steps and values where the log has a finite one."""
    rows = [row for row in run.rows if row.get(name) is not None and math.isfinite(row[name])]
    return [row["step"] for row in rows], [scale * row[name] for row in rows]


def _smoothed(values: list[float]) -> list[float]:
    """Moving average over about a thirtieth of the line, without a lag at its start."""
    decay = 1 - 1 / max(2, len(values) / 30)
    average, weight, smooth = 0.0, 0.0, []
    for value in values:
        average = decay * average + (1 - decay) * value
        weight = decay * weight + 1 - decay
        smooth.append(average / weight)
    return smooth
