"""Draws loss, in-batch accuracy and held-out metrics of one or several runs."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gradcache_clip.train.report.style import (
    MAIN,
    OTHERS,
    PALE,
    new_figure,
    save_figure,
    settings,
    short,
    write_head,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Above this number of points, a smoothed line is drawn over a faint one of all points.
_DENSE = 60
_DOTTED = (0, (1, 2))


@dataclass(frozen=True)
class RunCurve:
    """One run to draw."""

    name: str
    """Label in the legend, e.g. "cached, batch of 1,024"."""
    rows: Sequence[Mapping[str, Any]]
    """Lines of its log, as `read_log` returns them: step, loss, accuracy, ..._recall_at_1."""
    candidates: int
    """Candidates that each sample is compared with in training: the batch, or the chunk under
    plain accumulation."""
    chance: float | None = None
    """Loss of chance; None for log(candidates), that of a softmax."""

    @property
    def chance_loss(self) -> float:
        """Loss of equal logits."""
        return math.log(self.candidates) if self.chance is None else self.chance


class _Panel(NamedTuple):
    """Held-out metrics of one kind of run."""

    title: str
    ylabel: str
    labels: Mapping[str, str]
    """Name in the log -> label in the legend."""
    chances: Sequence[str]
    headline: str
    averaged: int
    """Number of lines to average for the headline."""


_RECALL = _Panel(
    title="Held-out recall@1",
    ylabel="queries with a right first answer (%)",
    labels={
        "image_to_text_recall_at_1": "image → text",
        "text_to_image_recall_at_1": "text → image",
    },
    chances=("image_to_text_recall_at_1_chance", "text_to_image_recall_at_1_chance"),
    headline="Held-out recall@1",
    averaged=2,
)
_CLASSES = _Panel(
    title="Classes of held-out images",
    ylabel="images of the right class (%)",
    labels={
        "knn_accuracy": "nearest training images",
        "probe_accuracy": "linear classifier",
    },
    chances=("label_chance",),
    headline="Held-out images named by their nearest training images",
    averaged=1,
)
_QUERIES = "query_to_document_recall_at_1"
_WIDTH = re.compile(rf"{_QUERIES}_of_(\d+)_numbers")
_STYLES = ("-", "--", "-.", ":")


def draw_curves(runs: Sequence[RunCurve], path: str | Path) -> Path:
    """Draw three panels over the optimizer steps, the first run in blue.

    The loss of chance grows with the number of candidates, so losses over different numbers
    cannot be compared; dotted lines show chance for each. The held-out panel shows the same task
    for all runs: recall@1, or classification accuracy.

    Args:
        runs: the run to show, and those to compare it with.
        path: of the PNG.

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
        loss, accuracy, held_out = figure.subplots(1, 3, width_ratios=(4, 4, 5))
        _draw_training(loss, runs, "loss", lambda run: run.chance_loss)
        _label(loss, "Training loss", f"dotted: chance, {_chances(runs)}", "loss (nats)", runs)
        _draw_training(accuracy, runs, "accuracy", lambda run: 100 / run.candidates, scale=100)
        widths = " or ".join(dict.fromkeys(f"{run.candidates:,}" for run in runs))
        about = f"the one right of {widths}; dotted: chance"
        _label(accuracy, "In-batch accuracy", about, "right answers in the batch (%)", runs)
        accuracy.legend(loc="best", edgecolor="none", fontsize=9)
        write_head(figure, _draw_held_out(held_out, runs))
        return save_figure(figure, path)


def _draw_training(
    axes: Axes,
    runs: Sequence[RunCurve],
    name: str,
    chance: Callable[[RunCurve], float],
    *,
    scale: float = 1,
) -> None:
    for run, color in _coloured(runs):
        steps, values = _points(run, name, scale=scale)
        if len(steps) > _DENSE:
            axes.plot(steps, values, color=color, lw=0.8, alpha=0.25)
            values = _smoothed(values)
        _draw_line(axes, steps, values, color=color, label=_name(run))
        axes.axhline(chance(run), color=color, lw=1.3, ls=_DOTTED)


def _draw_held_out(axes: Axes, runs: Sequence[RunCurve]) -> str:
    """Draw the panel; returns the headline."""
    panel = _panel_of({name for row in runs[0].rows for name in row})
    findings = []
    for run, color in _coloured(runs):
        lines = [_points(run, name, scale=100) for name in panel.labels]
        for (steps, values), style in zip(lines, cycle(_STYLES), strict=False):
            _draw_line(axes, steps, values, style, color=color)
        last = [values[-1] for _, values in lines[: panel.averaged] if values]
        if last:
            findings.append(f"{sum(last) / len(last):.1f} % ({_name(run)})")
    for name in panel.chances:
        for level in _points(runs[0], name, scale=100)[1][-1:]:
            axes.axhline(level, color=PALE, lw=1.3, ls=_DOTTED)
    about = "the same task for every run; dotted: chance"
    _label(axes, panel.title, about, panel.ylabel, runs)
    if not findings:
        axes.text(0.5, 0.5, "no held-out evaluation in the log", transform=axes.transAxes,
                  ha="center", color=PALE)  # fmt: skip
        return "Training curves"
    for label, style in zip(panel.labels.values(), cycle(_STYLES), strict=False):
        axes.plot([], [], style, color=PALE, label=label)
    axes.legend(loc="best", edgecolor="none", fontsize=9)
    return f"{panel.headline}: " + " against ".join(findings)


def _panel_of(names: set[str]) -> _Panel:
    """Return the panel for the metrics that a log holds."""
    if "knn_accuracy" in names:
        return _CLASSES
    if _QUERIES not in names:
        return _RECALL
    widths = [int(found[1]) for found in map(_WIDTH.fullmatch, names) if found]
    shorter = {
        f"{_QUERIES}_of_{width}_numbers": f"by the first {width} numbers"
        for width in sorted(widths, reverse=True)
    }
    labels = {_QUERIES: "query → document", **shorter}
    return _RECALL._replace(labels=labels, chances=(f"{_QUERIES}_chance",), averaged=1)


def _draw_line(
    axes: Axes, steps: Sequence[int], values: Sequence[float], style: str = "-", **options: Any
) -> None:
    marker = "o" if len(steps) < 30 else None
    axes.plot(steps, values, style, marker=marker, ms=3.5, lw=1.8, **options)


def _label(axes: Axes, title: str, about: str, ylabel: str, runs: Sequence[RunCurve]) -> None:
    axes.set_title(title, loc="left", fontweight="bold", pad=20)
    axes.text(0, 1.02, about, transform=axes.transAxes, fontsize=9, color=PALE)
    last = max(row["step"] for run in runs for row in run.rows)
    axes.set(xlabel="optimizer step", ylabel=ylabel, xlim=(0, last * 1.01))
    axes.set_ylim(0, 1.02 * axes.get_ylim()[1])
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _coloured(runs: Sequence[RunCurve]) -> Iterator[tuple[RunCurve, str]]:
    return zip(runs, chain([MAIN], cycle(OTHERS)), strict=False)


def _name(run: RunCurve) -> str:
    # matplotlib hides labels that begin with an underscore.
    return short(run.name, 60).lstrip("_")


def _chances(runs: Sequence[RunCurve]) -> str:
    levels = (
        f"log {run.candidates:,} = {run.chance_loss:.2f}"
        if run.chance is None
        else f"{run.chance:.2f}"
        for run in runs
    )
    return ", ".join(dict.fromkeys(levels))


def _points(run: RunCurve, name: str, *, scale: float = 1) -> tuple[list[int], list[float]]:
    """Return steps and values of the rows with a finite value."""
    rows = [row for row in run.rows if row.get(name) is not None and math.isfinite(row[name])]
    return [row["step"] for row in rows], [scale * row[name] for row in rows]


def _smoothed(values: list[float]) -> list[float]:
    """Smooth by a moving average over about a thirtieth of the line, without initial bias."""
    decay = 1 - 1 / max(2, len(values) / 30)
    average, weight, smooth = 0.0, 0.0, []
    for value in values:
        average = decay * average + (1 - decay) * value
        # The total weight so far corrects the average's start at zero.
        weight = decay * weight + 1 - decay
        smooth.append(average / weight)
    return smooth
