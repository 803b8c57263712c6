"""The picture of one loss: memory against the batch beside bars of time, ours in colour."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from loss_peers import ours
from loss_rows import MemoryRow, Results, TimeRow
from loss_run import TITLES, VIEWS
from loss_table import bytes_text, main_times, marked, memory_at_largest, time_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_OURS, _CHUNKED, _MATRIX, _GREY = "#0f766e", "#2563eb", "#c2410c", "#57534e"
_ITEM_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
_PLAIN = "plain loss"
# A tiny step may not grow the process at all, and a logarithmic axis has no zero.
_SMALLEST = 1e5


def draw(loss: str, results: Results, origin: Mapping[str, str], stem: Path) -> list[Path]:
    """Write STEM.png and STEM.svg and return their paths; nothing where nothing was measured."""
    if not _drawn(results, origin["device"]):
        return []
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style = {"font.size": 11, "svg.hashsalt": "loss", "font.family": "DejaVu Sans"}
    with pyplot.rc_context(style):
        figure = pyplot.figure(figsize=(15, 6.8))
        _draw_memory(figure.add_axes((0.06, 0.17, 0.27, 0.62)), results, origin["device"])
        _draw_times(figure.add_axes((0.74, 0.17, 0.24, 0.62)), results, origin["device"])
        _write_words(figure, loss, results, origin)
        paths = [stem.with_suffix(".png"), stem.with_suffix(".svg")]
        figure.savefig(paths[0], dpi=140)
        figure.savefig(paths[1], metadata={"Date": None})
        pyplot.close(figure)
    return paths


def finding(loss: str, results: Results, device: str) -> str:
    """The title: ours beside the plain loss, in memory and in time."""
    memory = memory_at_largest(results)
    own, plain = memory.get(ours(device)), memory.get(_PLAIN)
    words = []
    if own and plain and {own.status, plain.status} == {"measured"}:
        words.append(
            f"{bytes_text(own.peak_growth_bytes)} instead of {bytes_text(plain.peak_growth_bytes)} "
            f"at batch {own.batch_size:,}"
        )
    ratios = {row.contestant: row.time_over_ours for row in main_times(results)}
    if not math.isnan(ratio := ratios.get(_PLAIN, math.nan)):
        words.append(f"{ratio:.2f} times as fast as the plain loss")
    return f"{TITLES[loss]}: {', '.join(words) or 'ours beside its peers'}"


def separate(wanted: Sequence[float], gap: float) -> list[float]:
    """Heights as near to the wanted ones as a gap between neighbours allows, in their order."""
    order = sorted(range(len(wanted)), key=lambda place: wanted[place])
    blocks: list[list[float]] = []
    for count, place in enumerate(order):
        # Less their rank, labels may coincide but not cross: neighbours that would are averaged.
        blocks.append([wanted[place] - gap * count])
        while len(blocks) > 1 and _mean(blocks[-2]) > _mean(blocks[-1]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    flat = [_mean(block) for block in blocks for _ in block]
    heights = [0.0] * len(wanted)
    for count, place in enumerate(order):
        heights[place] = flat[count] + gap * count
    return heights


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _matrix_bytes(row: MemoryRow) -> float:
    return (VIEWS[row.loss] * row.batch_size) ** 2 * _ITEM_BYTES[row.dtype]


def _matrix_words(loss: str) -> str:
    return "2B x 2B matrix" if VIEWS[loss] == 2 else "B x B matrix"


def _color(name: str, rows: Sequence[MemoryRow], device: str) -> str:
    """Ours, or whether the memory at the largest batch has room for the matrix."""
    if name == ours(device):
        return _OURS
    return _MATRIX if rows[-1].peak_growth_bytes >= _matrix_bytes(rows[-1]) else _CHUNKED


def _measured(results: Results) -> dict[str, list[MemoryRow]]:
    found: dict[str, list[MemoryRow]] = {}
    for row in results.memory:
        if row.status == "measured":
            height = max(row.peak_growth_bytes, _SMALLEST)
            found.setdefault(row.contestant, []).append(replace(row, peak_growth_bytes=height))
    return found


def _too_small(results: Results, device: str) -> list[MemoryRow]:
    """Those that only ran at batches below all of ours: a point of theirs says nothing here."""
    first = next((row.batch_size for row in results.memory if row.contestant == ours(device)), 0)
    return [rows[-1] for rows in _measured(results).values() if rows[-1].batch_size < first]


def _drawn(results: Results, device: str) -> dict[str, list[MemoryRow]]:
    left_out = {row.contestant for row in _too_small(results, device)}
    return {name: rows for name, rows in _measured(results).items() if name not in left_out}


def _draw_memory(axes: Axes, results: Results, device: str) -> None:
    axes.set_title("Peak memory over the inputs", loc="left", fontsize=12.5, pad=12)
    measured = _drawn(results, device)
    for name, rows in measured.items():
        own = name == ours(device)
        axes.plot(
            [row.batch_size for row in rows],
            [row.peak_growth_bytes for row in rows],
            "o-",
            color=_color(name, rows, device),
            linewidth=3.2 if own else 1.4,
            markersize=8 if own else 4.5,
            zorder=3 if own else 2,
        )
    lines = [row for rows in measured.values() for row in rows]
    _matrix_line(axes, lines)
    batches = sorted({row.batch_size for row in lines})
    _memory_axes(axes, batches, [row.peak_growth_bytes for row in lines])
    _label_lines(axes, results, device)


def _matrix_line(axes: Axes, rows: Sequence[MemoryRow]) -> None:
    by_batch = {row.batch_size: _matrix_bytes(row) for row in rows}
    batches = sorted(by_batch)
    heights = [by_batch[batch] for batch in batches]
    axes.plot(batches, heights, color=_GREY, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)


def _memory_axes(axes: Axes, batches: Sequence[int], sizes: Sequence[float]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(batches, [f"{batch:,}" for batch in batches])
    low, high = min(sizes) / 1.6, max(sizes) * 1.6
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [step * 10.0**decade for decade in decades for step in (1, 3)]
    ticks = [tick for tick in ticks if low <= tick <= high]
    axes.set_yticks(ticks, [_tick_text(tick) for tick in ticks])
    axes.set_ylim(low, high)
    axes.minorticks_off()
    axes.set_xlabel("batch size (pairs)")
    axes.grid(color="#e7e5e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _tick_text(nbytes: float) -> str:
    return f"{nbytes / 1e9:g} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:g} MB"


def _label_lines(axes: Axes, results: Results, device: str) -> None:
    """Names at the right edge, pushed apart, each tied to the end of its line."""
    measured = _drawn(results, device)
    ends = [rows[-1] for rows in measured.values()]
    largest = max(ends, key=lambda row: row.batch_size)
    labels = [
        (_end_text(row, largest, results), row.peak_growth_bytes, row.batch_size) for row in ends
    ]
    colors = [_color(name, rows, device) for name, rows in measured.items()]
    matrix = _matrix_bytes(largest)
    words = f"one {_matrix_words(largest.loss)}  {bytes_text(matrix)}"
    labels.append((words, matrix, largest.batch_size))
    to_axes = axes.transData + axes.transAxes.inverted()
    wanted = [float(to_axes.transform((batch, size))[1]) for _, size, batch in labels]
    heights = separate(wanted, 0.054)
    for (text, size, batch), height, color in zip(labels, heights, [*colors, _GREY], strict=True):
        axes.annotate(
            text,
            (batch, size),
            xytext=(1.07, height),
            textcoords="axes fraction",
            color=color,
            fontsize=10.5,
            fontweight="bold" if color == _OURS else "normal",
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": color, "lw": 0.6, "relpos": (0, 0.5)},
        )


def _end_text(row: MemoryRow, largest: MemoryRow, results: Results) -> str:
    at = "" if row.batch_size == largest.batch_size else f" at {row.batch_size:,}"
    return f"{marked(row.contestant, results)}  {bytes_text(row.peak_growth_bytes)}{at}"


def _draw_times(axes: Axes, results: Results, device: str) -> None:
    timed = [row for row in main_times(results) if row.status == "measured"]
    rows = sorted(timed, key=lambda row: row.milliseconds, reverse=True)
    measured = _measured(results)
    colors = [_color(row.contestant, measured[row.contestant], device) for row in rows]
    axes.barh(range(len(rows)), [row.milliseconds for row in rows], color=colors, height=0.66)
    names = [marked(row.contestant, results) for row in rows]
    axes.set_yticks(range(len(rows)), names, fontsize=10.5)
    for place, (row, label) in enumerate(zip(rows, axes.get_yticklabels(), strict=True)):
        weight = "bold" if row.contestant == ours(device) else "normal"
        label.set(color=colors[place], fontweight=weight)
        axes.annotate(
            _bar_text(row, device),
            (row.milliseconds, place),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=10.5,
            fontweight=weight,
            annotation_clip=False,
        )
    size = f", batch {rows[0].batch_size:,}, D = {rows[0].width}" if rows else ""
    axes.set_title(f"Time of forward and backward{size}", x=-0.72, ha="left", fontsize=12.5, pad=12)
    # Room for the words behind the longest bar.
    axes.set_xlim(0, 2.05 * max((row.milliseconds for row in rows), default=1))
    axes.set_xticks([])
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def _bar_text(row: TimeRow, device: str) -> str:
    time = time_text(row.milliseconds)
    if row.contestant == ours(device):
        return f"{time}, {row.share_of_matmul:.0%} of matmul"
    return time if math.isnan(row.time_over_ours) else f"{time}, {row.time_over_ours:.2f} x ours"


def _write_words(figure: Figure, loss: str, results: Results, origin: Mapping[str, str]) -> None:
    left = 0.02
    title = finding(loss, results, origin["device"])
    figure.text(left, 0.965, title, fontsize=16, fontweight="bold", va="top")
    legend = (("ours", _OURS), ("peak below the dashed line", _CHUNKED), ("above it", _MATRIX))
    for (words, color), start in zip(legend, (0.0, 0.05, 0.222), strict=True):
        figure.text(left + start, 0.905, f"\u25a0 {words}", color=color, va="top", fontsize=12)
    where = origin["gpu"] or f"{origin['machine']} ({origin['used_threads']} used)"
    words = (
        f"{results.memory[0].dtype} on {where}; torch {origin['torch']}. Memory: one forward and "
        f"backward at D = {results.memory[0].width}, a fresh process a point. "
        "Times: medians of interleaved rounds in one process."
    )
    figure.text(left, 0.02, words, fontsize=10, color=_GREY)
    left_out = [
        f"{marked(row.contestant, results)}: {bytes_text(row.peak_growth_bytes)} at batch "
        f"{row.batch_size}"
        for row in _too_small(results, origin["device"])
    ]
    if left_out:
        figure.text(left, 0.05, f"Not drawn: {'; '.join(left_out)}.", fontsize=10, color=_GREY)
