"""The rows of loss.py, and their tables and pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from loss_peers import CASES, CONTESTANTS, NEEDS_GPU, ours
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
from results import FOLDER, bold, paragraph, read_csv, read_rows, table, write_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
MEASURED, OVER_CAP = "measured", "over cap"
_NAN = math.nan
_ERRORS = ("loss", "dq", "dk", "dscale", "dbias")
_STEM, _PLAIN = "loss_cpu_fp32", "plain loss"
_NAMES = {"clip": "CLIP", "siglip": "SigLIP", "nt_xent": "NT-Xent"}
_LIBRARIES = {"torch linear_cross_entropy x 2": "torch's `linear_cross_entropy`"}
_CORES = {"1": "one CPU core", "2": "two CPU cores"}
# A library that takes less than this share of the plain loss's memory stores no matrix.
_NO_MATRIX = 0.1
_ITEM_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
# A tiny step may not grow the process at all, and a logarithmic axis has no zero.
_SMALLEST = 1e5


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
    """One forward and backward in a fresh process."""

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


def predicted_bytes(row: MemoryRow, batch_size: int) -> float:
    """Memory at another batch if all of it grows with the square: never too little."""
    return row.peak_growth_bytes * (batch_size / row.batch_size) ** 2


def bytes_text(nbytes: float) -> str:
    """Such as 4.25 GB or 46 MB, in powers of ten."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.0f} MB"


def time_text(milliseconds: float) -> str:
    """Such as 3.41 s or 327 ms."""
    if milliseconds >= 1e3:
        return f"{milliseconds / 1e3:.2f} s"
    return f"{milliseconds:#.3g} ms".replace(". ", " ")


# The section of docs/benchmarks.md: all contestants of every loss


def section(device: str, dtype: str) -> Callable[[Path], str]:
    """From the folder of the results to the section of one device and dtype."""

    def text(results: Path) -> str:
        stem = results / f"loss_{device}_{dtype}"
        found, threads = read_results(stem), read_origin(stem)["used_threads"]
        parts = [paragraph(_LEGEND.format(threads=threads))]
        for name, title in TITLES.items():
            if (own := found.of(name)).memory:
                parts += [f"### {title}", f"![{title}]({FOLDER}/{stem.name}_{name}.png)"]
                parts += [contestants(name, own, device), _absent(own)]
        return "\n\n".join(filter(None, parts))

    return text


_LEGEND = (
    "Forward and backward with {threads} threads. Time: median of rounds in which all take turns, "
    "and over ours with its lowest and highest ratio. Rate: operations over time (whatever a "
    "contestant really does), over the rate of a matrix product in the same rounds. Memory: growth "
    "of the peak over the inputs in a fresh process. Error: the worst of loss and gradients "
    "against fp64, largest difference over largest entry. Bold: fastest, and least memory."
)


def contestants(loss: str, found: Results, device: str) -> str:
    """All that ran on a device, the fastest first, the best right one in bold."""
    times, memory = found.main_times(), found.memory_at_largest()
    present = [name for name, row in memory.items() if row.status != NEEDS_GPU]
    present.sort(key=lambda name: _milliseconds(times.get(name)))
    largest = max(row.batch_size for row in found.memory)
    right = [name for name in present if name not in found.wrong()]
    fastest = min(right, key=lambda name: _milliseconds(times.get(name)), default="")
    smallest = min(right, key=lambda name: _bytes_at(memory[name], largest), default="")
    lines = []
    for name in present:
        time, *rates = _time_cells(times.get(name), is_own=name == ours(device))
        held = _memory_cell(memory[name], largest)
        cells = [bold(time) if name == fastest else time, *rates]
        cells += [bold(held) if name == smallest else held, *_error_cells(name, found.errors)]
        lines.append([name, *cells, remark(loss, name, found)])
    head = (
        *("", "time", "over ours", "rate of a matrix product", f"memory at {largest:,}"),
        *("error, fp32", "error, bf16", "remark"),
    )
    return table(head, lines, align="lrrrrrrl")


def remark(loss: str, name: str, results: Results) -> str:
    """Wrong outputs, the reason if it did not run, and how it was called."""
    own = Results(*([row for row in rows if row.contestant == name] for rows in results.all()))
    failed = [row.status for row in (*own.memory[:1], *own.main_times().values(), *own.errors)]
    words = [f"{row.case} ({_worst_words(row)})" for row in own.errors if row.is_wrong()]
    wrong = f"WRONG in {', '.join(words)}" if words else ""
    failures = [word for word in dict.fromkeys(failed) if word not in (MEASURED, OVER_CAP)]
    notes = [one.note for one in CONTESTANTS if (one.loss, one.name) == (loss, name)]
    return "; ".join(filter(None, [wrong, *failures, *notes]))


def _worst_words(row: ErrorRow) -> str:
    output, error = row.worst()
    return f"{output} not finite" if math.isinf(error) else f"{output} off by {error:.2g}"


def _absent(found: Results) -> str:
    names = [row.contestant for row in found.memory if row.status == NEEDS_GPU]
    return paragraph(f"Not here: {', '.join(names)} ({NEEDS_GPU}).") if names else ""


def _milliseconds(row: TimeRow | None) -> float:
    return math.inf if row is None or math.isnan(row.milliseconds) else row.milliseconds


def _bytes_at(row: MemoryRow, batch_size: int) -> float:
    is_there = row.status == MEASURED and row.batch_size == batch_size
    return row.peak_growth_bytes if is_there else math.inf


def _time_cells(row: TimeRow | None, *, is_own: bool) -> list[str]:
    if row is None or row.status != MEASURED:
        return ["too large" if row and row.status == OVER_CAP else "", "", ""]
    ratio = f"{row.time_over_ours:.2f} ({row.lowest_ratio:.2f} to {row.highest_ratio:.2f})"
    rate = f"{100 * row.share_of_matmul:.0f} %"
    return [time_text(row.milliseconds), "1" if is_own else ratio, rate]


def _memory_cell(row: MemoryRow, batch_size: int | None = None) -> str:
    if row.status != MEASURED:
        return row.status if row.status in (OVER_CAP, "out of memory", "timed out") else ""
    at = "" if batch_size in (None, row.batch_size) else f" at {row.batch_size:,}"
    return bytes_text(row.peak_growth_bytes) + at


def _error_cells(name: str, errors: Iterable[ErrorRow]) -> list[str]:
    """The worst over the cases of a dtype."""
    own = [row for row in errors if row.contestant == name]
    return [_worst(row for row in own if row.dtype == dtype) for dtype in ("fp32", "bf16")]


def _worst(rows: Iterable[ErrorRow]) -> str:
    found = [row.worst()[1] for row in rows]
    known = [error for error in found if not math.isnan(error)]
    return f"{max(known):.0e}" if known else ("failed" if found else "")


# The blocks of the README


def quoted_losses(results: Path) -> str:
    """Ours beside the plain loss and the nearest library, a line per loss, and how it was done."""
    found = read_results(results / _STEM)
    head = (
        *("loss", "memory", "plain", "time of the plain loss", "of the nearest library"),
        "share of the rate of a matrix product",
    )
    lines = [_quoted_line(loss, found.of(loss)) for loss in TITLES]
    used = read_origin(results / _STEM)["used_threads"]
    setting = paragraph(
        f"Forward and backward in fp32 on {_CORES.get(used, f'{used} CPU cores')}, beside the loss "
        f"written plainly and what each library offers; {_sizes(found)}:"
    )
    return f"{setting}\n\n{table(head, lines)}"


def _sizes(found: Results) -> str:
    one, two = found.of("clip"), found.of("nt_xent")
    memory, memory_pair = (_largest(each.memory) for each in (one, two))
    time, time_pair = (_largest(list(each.main_times().values())) for each in (one, two))
    return (
        f"memory at {memory.batch_size:,} pairs of width {memory.width} "
        f"(NT-Xent: {memory_pair.batch_size:,}), times at {time.batch_size:,} of width "
        f"{time.width} ({time_pair.batch_size:,})"
    )


def _largest(rows: Sequence[Row]) -> Row:
    return max(rows, key=lambda row: row.batch_size)


def _quoted_line(loss: str, found: Results) -> list[str]:
    times, memory = found.measured_times(), found.memory_at_largest()
    own = times[ours("cpu")]
    return [
        _NAMES[loss],
        bold(_memory_cell(memory[own.contestant])),
        _memory_cell(memory[_PLAIN]),
        f"{times[_PLAIN].time_over_ours:.2f} x ours" if _PLAIN in times else "",
        ", ".join(f"{row.time_over_ours:.2f} x ({_library(row)})" for row in _nearest(found)),
        f"{100 * own.share_of_matmul:.0f} %",
    ]


def _nearest(found: Results) -> list[TimeRow]:
    """The fastest library, and the fastest that stores no matrix if that is another one."""
    memory, wrong = found.memory_at_largest(), found.wrong()
    rivals = [
        row
        for name, row in found.measured_times().items()
        if name != _PLAIN and "gradcache_clip" not in name and name not in wrong
    ]
    rivals.sort(key=lambda row: row.time_over_ours)
    limit = _NO_MATRIX * memory[_PLAIN].peak_growth_bytes
    small = [row for row in rivals if memory[row.contestant].peak_growth_bytes < limit]
    return list(dict.fromkeys([*rivals[:1], *small[:1]]))


def _library(row: TimeRow) -> str:
    return _LIBRARIES.get(row.contestant, row.contestant.split()[0])


def full_batch(results: Path) -> str:
    """The CLIP loss at 65,536 pairs."""
    found = read_results(results / _STEM).of("clip")
    rows = {row.contestant: row for row in found.times if row.batch_size == FULL_BATCH}
    own = rows.pop(ours("cpu"))
    (rival,) = rows.values()
    plain = predicted_bytes(found.memory_at_largest()[_PLAIN], FULL_BATCH)
    return paragraph(
        f"At {FULL_BATCH:,} pairs the CLIP loss runs at {100 * own.share_of_matmul:.0f} % of that "
        f"rate, {rival.time_over_ours:.2f} times as fast as torch's two calls; the plain one would "
        f"need {plain / 1e9:.0f} GB."
    )


def bf16_errors(results: Path) -> str:
    """Gradients of the CLIP loss where those of the plain one are worst."""
    rows = read_results(results / _STEM).of("clip").errors
    near = {row.contestant: row.by_output() for row in rows if row.case == "near"}
    plain, own = (
        max(error for output, error in near[name].items() if output != "loss")
        for name in (_PLAIN, ours("cpu"))
    )
    return paragraph(
        f"With all cosines near {CASES['near'].cosine} in bf16, where the worst gradient of the "
        f"plain loss is off by {100 * plain:.2g} % of the largest entry, ours is off by "
        f"{100 * own:.2g} %."
    )


BLOCKS = {"loss": quoted_losses, "loss-full": full_batch, "loss-bf16": bf16_errors}


# The picture of one loss: memory against the batch beside bars of time, ours in colour


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
            f"and backward at D = {results.memory[0].width}, a fresh process per point. "
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
    own, plain = memory.get(ours(device)), memory.get(_PLAIN)
    if own and plain and {own.status, plain.status} == {MEASURED}:
        words.append(
            f"{bytes_text(own.peak_growth_bytes)} instead of {bytes_text(plain.peak_growth_bytes)} "
            f"at batch {own.batch_size:,}"
        )
    plain_time = results.measured_times().get(_PLAIN)
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
