"""The picture of memory_vs_batch.py: memory against batch size, both axes logarithmic."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memory_rows import Row, bytes_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLORS = {"plain": "#c2410c", "cached": "#0f766e"}
_GREY = "#57534e"


def draw(rows: Sequence[Row], stem: Path) -> list[Path]:
    """Write STEM.png and STEM.svg and return their paths.

    Lines are counted bytes, dots are measured in a process of their own, crosses are batches that
    did not fit.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style = {"font.size": 12, "svg.hashsalt": "memory_vs_batch", "font.family": "DejaVu Sans"}
    with pyplot.rc_context(style):
        figure, axes = pyplot.subplots(figsize=(9.6, 5.6))
        for method in ("plain", "cached"):
            _draw_method(axes, [row for row in rows if row.method == method])
        _draw_cap(axes, rows)
        _draw_gap(axes, rows)
        _label_axes(axes, rows)
        _write_titles(figure, rows)
        figure.subplots_adjust(left=0.1, right=0.76, top=0.81, bottom=0.2)
        paths = [stem.with_suffix(".png"), stem.with_suffix(".svg")]
        figure.savefig(paths[0], dpi=160)
        figure.savefig(paths[1], metadata={"Date": None})
        pyplot.close(figure)
    return paths


def finding(rows: Sequence[Row]) -> str:
    """The title: what the tensors of the largest batch take with each method."""
    last = rows[-1].batch_size
    plain, cached = (bytes_text(_counted_at(rows, name, last)) for name in ("plain", "cached"))
    return (
        f"At batch {last:,} the tensors of plain training take {plain},\n"
        f"those of gradient caching {cached}"
    )


def _counted_at(rows: Sequence[Row], method: str, batch_size: int) -> int:
    return next(
        row.counted_bytes for row in rows if (row.method, row.batch_size) == (method, batch_size)
    )


def _draw_method(axes: Axes, rows: Sequence[Row]) -> None:
    color = _COLORS[rows[0].method]
    batches = [row.batch_size for row in rows]
    axes.plot(batches, [row.counted_bytes for row in rows], color=color, linewidth=2.5)
    measured = [row for row in rows if row.status == "measured"]
    failed = [row for row in rows if row.status in ("over cap", "out of memory")]
    axes.plot(
        [row.batch_size for row in measured],
        [row.peak_growth_bytes for row in measured],
        "o",
        color=color,
        markersize=8,
        markeredgecolor="white",
    )
    axes.plot(
        [row.batch_size for row in failed],
        [row.counted_bytes for row in failed],
        "X",
        color=color,
        markersize=11,
        markeredgecolor="white",
    )
    _label_line(axes, rows[-1], color)


def _label_line(axes: Axes, last: Row, color: str) -> None:
    words = {
        "plain": "plain training",
        "cached": f"gradient caching,\nchunks of {last.chunk_size}",
    }
    axes.annotate(
        f"{words[last.method]}\n{bytes_text(last.counted_bytes)}",
        (last.batch_size, last.counted_bytes),
        xytext=(14, 0),
        textcoords="offset points",
        color=color,
        fontweight="bold",
        va="center",
        annotation_clip=False,
    )


def _draw_cap(axes: Axes, rows: Sequence[Row]) -> None:
    cap = rows[0].cap_bytes
    if max(row.counted_bytes for row in rows) < cap:
        return
    axes.axhline(cap, color=_GREY, linewidth=1.2, linestyle=(0, (4, 3)))
    axes.annotate(
        f"memory available for a step: {bytes_text(cap)}",
        (rows[0].batch_size, cap),
        xytext=(0, 5),
        textcoords="offset points",
        color=_GREY,
        fontsize=10.5,
    )


def _draw_gap(axes: Axes, rows: Sequence[Row]) -> None:
    """An arrow from the plain to the cached need of the largest batch."""
    last = rows[-1].batch_size
    plain, cached = (_counted_at(rows, name, last) for name in ("plain", "cached"))
    if plain < 4 * cached:
        return
    ends = ((last, cached * 1.25), (last, plain * 0.8))
    style = {"arrowstyle": "->", "color": _GREY, "linewidth": 1.2}
    axes.annotate("", *ends, arrowprops=style)
    axes.annotate(
        f"{plain / cached:.0f} times less",
        (last, (plain * cached) ** 0.5),
        xytext=(14, 0),
        textcoords="offset points",
        color=_GREY,
        va="center",
        annotation_clip=False,
    )


def _label_axes(axes: Axes, rows: Sequence[Row]) -> None:
    batches = sorted({row.batch_size for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(batches, [f"{batch:,}" for batch in batches])
    counted = [row.counted_bytes for row in rows] + [row.peak_growth_bytes or 2**62 for row in rows]
    low = 2 ** (min(counted).bit_length() - 2)
    high = 2 * max(row.counted_bytes for row in rows)
    ticks = [low * 2**power for power in range(40) if low * 2**power <= high]
    ticks = ticks[:: 1 + len(ticks) // 10]
    axes.set_yticks(ticks, [_tick_text(tick) for tick in ticks])
    axes.set_ylim(low, high)
    axes.minorticks_off()
    axes.set_xlabel("batch size (image-text pairs)")
    axes.grid(color="#e7e5e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _write_titles(figure: Figure, rows: Sequence[Row]) -> None:
    left = 0.02
    size: dict[str, Any] = {"fontsize": 9.5, "color": _GREY}
    figure.text(left, 0.965, finding(rows), fontsize=15, fontweight="bold", va="top")
    figure.text(left, 0.865, "Peak memory of one training step", color=_GREY, va="top")
    marks = "Lines: bytes of live tensors, counted. Dots: resident memory, a fresh process each."
    if any(row.status in ("over cap", "out of memory") for row in rows):
        marks += " Crosses: does not fit."
    figure.text(left, 0.05, marks, **size)
    figure.text(left, 0.015, f"{rows[0].encoders}; AdamW, fp32, CPU.", **size)


def _tick_text(nbytes: int) -> str:
    return f"{nbytes / 2**30:g} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:g} MiB"
