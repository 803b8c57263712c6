"""The picture of one loss: memory against the batch beside bars of time, ours in colour."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from contests import MEASURED
from loss_peers import ours
from loss_rows import (
    PLAIN_LOSS,
    TITLES,
    VIEWS,
    MemoryRow,
    Results,
    TimeRow,
    bytes_text,
    read_origin,
    read_results,
    stem,
    time_text,
)
from plots import (
    CHUNKED,
    DASHES,
    MATRIX,
    OURS,
    PALE,
    Label,
    files,
    headline,
    label_ends,
    note,
    picture,
    tidy,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_ITEM_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
# A tiny step may not grow the process at all, and a logarithmic axis has no zero.
_SMALLEST = 1e5


def draw_all(results: Path, device: str, dtype: str) -> Iterator[Path]:
    """Draw every loss of a device and dtype."""
    begin = stem(results, device, dtype)
    found, origin = read_results(begin), read_origin(begin)
    for loss in TITLES:
        yield from draw(loss, found.of(loss), origin, begin.with_name(f"{begin.name}_{loss}"))


def draw(loss: str, results: Results, origin: Mapping[str, str], stem: Path) -> list[Path]:
    """Write STEM.png and STEM.svg and return their paths; nothing where nothing was measured."""
    device = origin["device"]
    lines, small = _lines(results, device)
    if not lines:
        return []
    with picture(stem, (15, 6.8)) as figure:
        _draw_memory(figure.add_axes((0.06, 0.17, 0.27, 0.62)), lines, results, device)
        every = {**lines, **{row.contestant: [row] for row in small}}
        _draw_times(figure.add_axes((0.74, 0.17, 0.24, 0.62)), every, results, device)
        headline(figure, finding(loss, results, device), y=0.965)
        _legend(figure)
        where = origin["gpu"] or f"{origin['machine']} ({origin['used_threads']} used)"
        words = (
            f"{results.memory[0].dtype} on {where}; torch {origin['torch']}. Memory: one forward "
            f"and backward at D = {results.memory[0].width}, a process per point. "
            "Times: medians of interleaved rounds in one process."
        )
        left_out = [
            f"{_marked(row.contestant, results)}: {bytes_text(row.peak_growth_bytes)} at batch "
            f"{row.batch_size}"
            for row in small
        ]
        note(figure, f"Not drawn: {'; '.join(left_out)}." if left_out else "", y=0.07)
        note(figure, words, y=0.04)
    return files(stem)


def finding(loss: str, results: Results, device: str) -> str:
    """The title: ours beside the plain loss, in memory and in time."""
    memory, words = results.memory_at_largest(), []
    own, plain = memory.get(ours(device)), memory.get(PLAIN_LOSS)
    if own and plain and {own.status, plain.status} == {MEASURED}:
        words.append(
            f"{bytes_text(own.peak_growth_bytes)} instead of {bytes_text(plain.peak_growth_bytes)} "
            f"at batch {own.batch_size:,}"
        )
    plain_time = results.measured_times().get(PLAIN_LOSS)
    if plain_time and not math.isnan(plain_time.time_over_ours):
        words.append(f"{plain_time.time_over_ours:.2f} times as fast as the plain loss")
    return f"{TITLES[loss]}: {', '.join(words) or 'ours beside its peers'}"


def _lines(results: Results, device: str) -> tuple[dict[str, list[MemoryRow]], list[MemoryRow]]:
    """Measured memory by contestant; apart, who ran at smaller batches than ours alone."""
    found: dict[str, list[MemoryRow]] = {}
    for row in results.memory:
        if row.status == MEASURED:
            height = max(row.peak_growth_bytes, _SMALLEST)
            found.setdefault(row.contestant, []).append(replace(row, peak_growth_bytes=height))
    first = next((row.batch_size for row in results.memory if row.contestant == ours(device)), 0)
    small = [name for name, rows in found.items() if rows[-1].batch_size < first]
    return found, [found.pop(name)[-1] for name in small]


def _matrix_bytes(row: MemoryRow) -> float:
    return (VIEWS[row.loss] * row.batch_size) ** 2 * _ITEM_BYTES[row.dtype]


def _color(name: str, rows: Sequence[MemoryRow], device: str) -> str:
    """Ours, or whether the memory at the largest batch has room for the matrix."""
    if name == ours(device):
        return OURS
    return MATRIX if rows[-1].peak_growth_bytes >= _matrix_bytes(rows[-1]) else CHUNKED


def _marked(name: str, results: Results) -> str:
    return f"{name} (WRONG)" if name in results.wrong() else name


def _draw_memory(
    axes: Axes, lines: Mapping[str, Sequence[MemoryRow]], results: Results, device: str
) -> None:
    axes.set_title("Peak memory over the inputs", loc="left", fontsize=12.5, pad=12)
    for name, rows in lines.items():
        own = name == ours(device)
        points = [(row.batch_size, row.peak_growth_bytes) for row in rows]
        width, size, order = (3.2, 8, 3) if own else (1.4, 4.5, 2)
        style = {"linewidth": width, "markersize": size, "zorder": order}
        axes.plot(*zip(*points, strict=True), "o-", color=_color(name, rows, device), **style)
    every = [row for rows in lines.values() for row in rows]
    matrix = sorted({(row.batch_size, _matrix_bytes(row)) for row in every})
    axes.plot(*zip(*matrix, strict=True), color=PALE, linewidth=1.2, linestyle=DASHES, zorder=1)
    _memory_axes(axes, [batch for batch, _ in matrix], [row.peak_growth_bytes for row in every])
    ends = [rows[-1] for rows in lines.values()]
    largest = max(ends, key=lambda row: row.batch_size)
    labels = [_end_label(row, largest, results, device) for row in ends]
    shape = "2B x 2B" if VIEWS[largest.loss] == 2 else "B x B"
    words = f"one {shape} matrix  {bytes_text(_matrix_bytes(largest))}"
    labels.append(Label(words, largest.batch_size, _matrix_bytes(largest), PALE))
    label_ends(axes, labels, gap=0.054, at=1.07, tied=True)


def _memory_axes(axes: Axes, batches: Sequence[int], sizes: Sequence[float]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(batches, [f"{batch:,}" for batch in batches])
    low, high = min(sizes) / 1.6, max(sizes) * 1.6
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [step * 10.0**decade for decade in decades for step in (1, 3)]
    ticks = [tick for tick in ticks if low <= tick <= high]
    texts = [f"{t / 1e9:g} GB" if t >= 1e9 else f"{t / 1e6:g} MB" for t in ticks]
    axes.set_yticks(ticks, texts)
    axes.set_ylim(low, high)
    axes.set_xlabel("batch size (pairs)")
    tidy(axes)


def _end_label(row: MemoryRow, largest: MemoryRow, results: Results, device: str) -> Label:
    at = "" if row.batch_size == largest.batch_size else f" at {row.batch_size:,}"
    text = f"{_marked(row.contestant, results)}  {bytes_text(row.peak_growth_bytes)}{at}"
    own, color = row.contestant == ours(device), _color(row.contestant, [row], device)
    return Label(text, row.batch_size, row.peak_growth_bytes, color, own)


def _draw_times(
    axes: Axes, lines: Mapping[str, Sequence[MemoryRow]], results: Results, device: str
) -> None:
    timed = [row for name, row in results.measured_times().items() if name in lines]
    rows = sorted(timed, key=lambda row: row.milliseconds, reverse=True)
    colors = [_color(row.contestant, lines[row.contestant], device) for row in rows]
    axes.barh(range(len(rows)), [row.milliseconds for row in rows], color=colors, height=0.66)
    axes.set_yticks(range(len(rows)), [_marked(row.contestant, results) for row in rows])
    for place, (row, label) in enumerate(zip(rows, axes.get_yticklabels(), strict=True)):
        weight = "bold" if row.contestant == ours(device) else "normal"
        label.set(color=colors[place], fontweight=weight)
        beside = {"xytext": (5, 0), "textcoords": "offset points", "va": "center"}
        text, at = _bar_text(row, device), (row.milliseconds, place)
        axes.annotate(text, at, fontweight=weight, annotation_clip=False, **beside)
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


def _legend(figure: Figure) -> None:
    legend = (("ours", OURS), ("peak below the dashed line", CHUNKED), ("above it", MATRIX))
    for (words, color), start in zip(legend, (0.02, 0.07, 0.242), strict=True):
        figure.text(start, 0.905, f"\u25a0 {words}", color=color, va="top", fontsize=12, zorder=3)
