"""What pages show of the CLIP, sigmoid and NT-Xent losses, and quote of all losses."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import astuple
from itertools import groupby
from pathlib import Path
from typing import Any

import late_interaction
import retrieval_losses
from contestants import NEEDS_GPU
from contests import MEASURED, OVER_CAP, file, predicted_bytes, read_file, threads
from loss_peers import CASES, CONTESTANTS, ours
from loss_rows import (
    FULL_BATCH,
    PLAIN_LOSS,
    TITLES,
    ErrorRow,
    MemoryRow,
    Results,
    Row,
    TimeRow,
    bytes_text,
    read_origin,
    read_results,
    stem,
    time_text,
)
from results import FOLDER, bold, paragraph, table
from results import bytes_text as binary_text

_QUOTED = "cpu", "fp32"
_NAMES = {"clip": "CLIP", "siglip": "SigLIP", "nt_xent": "NT-Xent"}
_LIBRARIES = {"torch linear_cross_entropy x 2": "torch's `linear_cross_entropy`"}
_CORES = {"1": "one CPU core", "2": "two CPU cores"}
# A library that takes less than this share of the plain loss's memory stores no matrix.
_NO_MATRIX = 0.1
_PLAIN_TORCH, _OBJECTIVE_PEERS = "plain PyTorch", ("sentence-transformers", "PyLate")
# The library compares pairs without a matrix product here: the loss alone says little of a step.
_NOT_QUOTED = ("guide", "sentence-transformers cached")

# The section of docs/benchmarks.md: all contestants of every loss


def section(results: Path, device: str = "cpu", dtype: str = "fp32") -> str:
    """A table for each loss that was measured on a device in a dtype."""
    begin = stem(results, device, dtype)
    found, used = read_results(begin), read_origin(begin)["used_threads"]
    parts = [paragraph(_LEGEND.format(threads=threads(used)))]
    for name, title in TITLES.items():
        if (own := found.of(name)).memory:
            parts += [f"### {title}", f"![{title}]({FOLDER}/{begin.name}_{name}.png)"]
            parts += [contestants(name, own, device), _absent(own)]
    return "\n\n".join(filter(None, parts))


_LEGEND = (
    "Forward and backward with {threads}. Time: median of rounds in which all take turns, "
    "and over ours with its lowest and highest ratio. Rate: operations over time (whatever a "
    "contestant really does), over the rate of a matrix product in the same rounds. Memory: growth "
    "of the peak over the inputs in a process of its own. Error: the worst of loss and gradients "
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
    found = read_results(stem(results, *_QUOTED))
    head = (
        *("loss", "memory", "plain", "time of the plain loss", "of the nearest library"),
        "share of the rate of a matrix product",
    )
    lines = [_quoted_line(loss, found.of(loss)) for loss in TITLES]
    used = read_origin(stem(results, *_QUOTED))["used_threads"]
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
        _memory_cell(memory[PLAIN_LOSS]),
        f"{times[PLAIN_LOSS].time_over_ours:.2f} x ours" if PLAIN_LOSS in times else "",
        ", ".join(f"{row.time_over_ours:.2f} x ({_library(row)})" for row in _nearest(found)),
        f"{100 * own.share_of_matmul:.0f} %",
    ]


def _nearest(found: Results) -> list[TimeRow]:
    """The fastest library, and the fastest that stores no matrix if that is another one."""
    memory, wrong = found.memory_at_largest(), found.wrong()
    rivals = [
        row
        for name, row in found.measured_times().items()
        if name != PLAIN_LOSS and "gradcache_clip" not in name and name not in wrong
    ]
    rivals.sort(key=lambda row: row.time_over_ours)
    limit = _NO_MATRIX * memory[PLAIN_LOSS].peak_growth_bytes
    small = [row for row in rivals if memory[row.contestant].peak_growth_bytes < limit]
    return list(dict.fromkeys([*rivals[:1], *small[:1]]))


def _library(row: TimeRow) -> str:
    return _LIBRARIES.get(row.contestant, row.contestant.split()[0])


def full_batch(results: Path) -> str:
    """The CLIP loss at 65,536 pairs."""
    found = read_results(stem(results, *_QUOTED)).of("clip")
    rows = {row.contestant: row for row in found.times if row.batch_size == FULL_BATCH}
    own = rows.pop(ours("cpu"))
    (rival,) = rows.values()
    largest = found.memory_at_largest()[PLAIN_LOSS]
    plain = predicted_bytes(largest.batch_size, largest.peak_growth_bytes, FULL_BATCH)
    return paragraph(
        f"At {FULL_BATCH:,} pairs the CLIP loss runs at {100 * own.share_of_matmul:.0f} % of that "
        f"rate, {rival.time_over_ours:.2f} times as fast as torch's two calls; the plain one would "
        f"need {plain / 1e9:.0f} GB."
    )


def bf16_errors(results: Path) -> str:
    """Gradients of the CLIP loss where those of the plain one are worst."""
    rows = read_results(stem(results, *_QUOTED)).of("clip").errors
    near = {row.contestant: row.by_output() for row in rows if row.case == "near"}
    plain, own = (
        max(error for output, error in near[name].items() if output != "loss")
        for name in (PLAIN_LOSS, ours("cpu"))
    )
    return paragraph(
        f"With all cosines near {CASES['near'].cosine} in bf16, where the worst gradient of the "
        f"plain loss is off by {100 * plain:.2g} % of the largest entry, ours is off by "
        f"{100 * own:.2g} %."
    )


def quoted_objectives(results: Path) -> str:
    """Objectives of retrieval and late interaction beside the plain loss and a library."""
    kinds: tuple[tuple[type[Any], str, str], ...] = (
        (retrieval_losses.Row, retrieval_losses.STEM, "pairs"),
        (late_interaction.Row, late_interaction.STEM, "queries"),
    )
    lines = []
    for kind, name, unit in kinds:
        rows, where = read_file(kind, file(name, results, *_QUOTED))
        for (title, size), each in groupby(rows, _title_and_size):
            quoted = [row for row in each if (title, row.contestant) != _NOT_QUOTED]
            lines.append([f"{title}, {size:,} {unit}", *_objective_cells(quoted)])
    head = "loss", "memory", "plain", "time of the plain loss", "of the library's"
    setting = paragraph(f"Objectives of retrieval, and MaxSim with hard negatives ({where}):")
    return f"{setting}\n\n{table(head, lines)}"


def _ratio(row: Any) -> str:
    return f"{row.time_ratio:.0f}" if row.time_ratio >= 10 else f"{row.time_ratio:.2f}"


def _title_and_size(row: Any) -> tuple[str, int]:
    title, size, *_ = astuple(row)
    return title, size


def _objective_cells(rows: Sequence[Any]) -> list[str]:
    """The first row is ours."""
    ran = {row.contestant: row for row in rows if row.status == MEASURED}
    plain = ran.pop(_PLAIN_TORCH)
    rivals = [row for name, row in ran.items() if name.split()[0] in _OBJECTIVE_PEERS]
    return [
        bold(binary_text(rows[0].memory_bytes)),
        binary_text(plain.memory_bytes),
        f"{_ratio(plain)} x ours",
        ", ".join(f"{_ratio(row)} x ({_library(row)})" for row in rivals),
    ]


BLOCKS = {
    "loss": quoted_losses,
    "loss-full": full_batch,
    "loss-bf16": bf16_errors,
    "loss-objectives": quoted_objectives,
}
