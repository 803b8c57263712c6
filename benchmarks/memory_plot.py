"""The picture of memory_vs_batch.py: memory against batch size, both axes logarithmic."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memory_axes import (
    INK,
    LOOKS,
    PALE,
    EndLabel,
    bytes_axis,
    label_ends,
    page,
    pairs_axis,
)
from memory_methods import METHODS
from memory_rows import Row, bytes_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DASHES = (0, (4, 3))


def draw(rows: Sequence[Row], stem: Path) -> list[Path]:
    """Write STEM.png and STEM.svg and return their paths.

    Lines are counted bytes, filled marks are measured in a process of their own; hollow crosses are
    batches that did not fit, hollow circles those that fit and were not run.
    """
    with page((11.0, 6.6), stem) as figure:
        axes = figure.add_axes((0.085, 0.19, 0.665, 0.63))
        for method in _methods(rows):
            _draw_method(axes, [row for row in rows if row.method == method])
        _draw_floor(axes, rows)
        pairs_axis(axes, sorted({row.batch_size for row in rows}))
        bytes_axis(axes, *_limits(rows))
        _draw_cap(axes, rows)
        label_ends(axes, _labels(rows), gap=0.1)
        _write_words(figure, rows)
    return [stem.with_suffix(".png"), stem.with_suffix(".svg")]


def finding(rows: Sequence[Row]) -> str:
    """The title: what the largest batch takes with the first and the last method."""
    largest = [row for row in rows if row.batch_size == rows[-1].batch_size]
    first, last = largest[0], largest[-1]
    verb = "takes" if last.measured else "would take"
    if first is last:
        return f"Batch {last.batch_size:,} {verb} {bytes_text(_best(last))}"
    against = "takes" if first.measured else "would take"
    return (
        f"Batch {last.batch_size:,} {verb} {bytes_text(_best(last))} with "
        f"{METHODS[last.method].label},\na {METHODS[first.method].label} {against} "
        f"{bytes_text(_best(first))}"
    )


def _best(row: Row) -> int:
    """Measured bytes, or counted ones where nothing was measured."""
    return row.peak_growth_bytes if row.measured else row.counted_bytes


def _methods(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.method for row in rows))


def _draw_method(axes: Axes, rows: Sequence[Row]) -> None:
    color, marker = LOOKS[rows[0].method]
    batches = [row.batch_size for row in rows]
    width = 2.8 if rows[0].method == "cached" else 1.8
    axes.plot(batches, [row.counted_bytes for row in rows], color=color, linewidth=width)
    hollow: dict[str, Any] = {"markerfacecolor": "white", "markeredgecolor": color}
    filled: dict[str, Any] = {"markerfacecolor": color, "markeredgecolor": "white"}
    measured = [row for row in rows if row.measured]
    too_large = [row for row in rows if row.does_not_fit]
    not_run = [row for row in rows if not (row.measured or row.does_not_fit)]
    _draw_marks(axes, measured, marker, 7.5, filled)
    _draw_marks(axes, too_large, "X", 9, hollow)
    _draw_marks(axes, not_run, "o", 6.5, hollow)


def _draw_marks(
    axes: Axes, rows: Sequence[Row], marker: str, size: float, faces: dict[str, Any]
) -> None:
    places = [row.batch_size for row in rows], [_best(row) for row in rows]
    axes.plot(*places, marker, markersize=size, linestyle="none", zorder=3, **faces)


def _draw_floor(axes: Axes, rows: Sequence[Row]) -> None:
    """What model, optimizer and batch take, whatever the method."""
    floor = {row.batch_size: row.floor_bytes for row in rows}
    axes.plot(list(floor), list(floor.values()), color=PALE, linewidth=1.2, linestyle=":")


def _labels(rows: Sequence[Row]) -> list[EndLabel]:
    last = [row for row in rows if row.batch_size == rows[-1].batch_size]
    labels = [
        EndLabel(_label(row), row.counted_bytes, LOOKS[row.method][0], row.method == "cached")
        for row in last
    ]
    floor = f"model, optimizer and\nbatch alone: {bytes_text(last[0].floor_bytes)}"
    return [*labels, EndLabel(floor, last[0].floor_bytes, PALE)]


def _label(row: Row) -> str:
    method = METHODS[row.method]
    chunks = f", chunks of {row.chunk_size}" if row.method == "cached" else ""
    return f"{method.label}{chunks}\n{bytes_text(_best(row))}"


def _limits(rows: Sequence[Row]) -> tuple[float, float]:
    sizes = [row.counted_bytes for row in rows] + [row.floor_bytes for row in rows]
    sizes += [row.peak_growth_bytes for row in rows if row.measured]
    return min(sizes) / 1.6, max(sizes) * 1.6


def _draw_cap(axes: Axes, rows: Sequence[Row]) -> None:
    """The memory of this machine, if a method comes near it."""
    cap, (low, high) = rows[0].cap_bytes, axes.get_ylim()
    if not low < cap < high:
        return
    axes.axhline(cap, color=INK, linewidth=1.2, linestyle=_DASHES, zorder=1)
    text, offset = f"memory for a step on this machine: {bytes_text(cap)}", (2, 5)
    place = axes.get_xlim()[0], cap
    axes.annotate(text, place, offset, textcoords="offset points", color=INK, fontsize=10)


def _write_words(figure: Figure, rows: Sequence[Row]) -> None:
    left, small = 0.02, {"fontsize": 9.5, "color": PALE, "va": "top"}
    figure.text(left, 0.975, finding(rows), fontsize=15, fontweight="bold", va="top", color=INK)
    what = f"Peak memory of one training step. {rows[0].encoders}; AdamW, fp32, CPU."
    figure.text(left, 0.87, what, color=PALE, va="top")
    marks = [
        "Filled: resident memory, measured in a fresh process. Line: bytes of tensors, counted."
    ]
    if any(row.does_not_fit for row in rows):
        marks.append("Hollow cross: does not fit.")
    if any(row.status.startswith("not run") or row.status == "timed out" for row in rows):
        marks.append("Hollow circle: not run, takes too long.")
    figure.text(left, 0.075, " ".join(marks), **small)
    figure.text(left, 0.04, f"{rows[0].origin.get('machine', '')}", **small)
