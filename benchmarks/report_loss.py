"""What the texts quote of loss.py: the table of the README, and all contestants of one loss."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from loss_peers import NEEDS_GPU, ours
from loss_rows import ErrorRow, MemoryRow, Results, TimeRow, read_origin, read_results
from loss_run import FULL_BATCH, TITLES, predicted_bytes
from loss_table import bytes_text, main_times, memory_at_largest, remark, time_text
from loss_truth import CASES
from report_tables import bold, paragraph, table

_STEM, _PLAIN = "loss_cpu_fp32", "plain loss"
_NAMES = {"clip": "CLIP", "siglip": "SigLIP", "nt_xent": "NT-Xent"}
_LIBRARIES = {"torch linear_cross_entropy x 2": "torch's `linear_cross_entropy`"}
_CORES = {"1": "one CPU core", "2": "two CPU cores"}
# A library that takes less than this share of the plain loss's memory stores no matrix.
_NO_MATRIX = 0.1


def quoted_losses(results: Path) -> str:
    """Ours beside the plain loss and the nearest library, a line a loss, and how it was done."""
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
    (memory, memory_pair), (time, time_pair) = (
        (_largest(rows(found.of("clip"))), _largest(rows(found.of("nt_xent"))))
        for rows in (lambda of: of.memory, main_times)
    )
    return (
        f"memory at {memory.batch_size:,} pairs of width {memory.width} "
        f"(NT-Xent: {memory_pair.batch_size:,}), times at {time.batch_size:,} of width "
        f"{time.width} ({time_pair.batch_size:,})"
    )


def _largest(rows: Sequence[MemoryRow] | Sequence[TimeRow]) -> MemoryRow | TimeRow:
    return max(rows, key=lambda row: row.batch_size)


def _quoted_line(loss: str, found: Results) -> list[str]:
    times, memory = _measured_times(found), memory_at_largest(found)
    own = times[ours("cpu")]
    return [
        _NAMES[loss],
        bold(_memory(memory[own.contestant])),
        _memory(memory[_PLAIN]),
        f"{times[_PLAIN].time_over_ours:.2f} x ours" if _PLAIN in times else "",
        ", ".join(f"{row.time_over_ours:.2f} x ({_library(row)})" for row in nearest(found)),
        f"{100 * own.share_of_matmul:.0f} %",
    ]


def nearest(found: Results) -> list[TimeRow]:
    """The fastest library, and the fastest that stores no matrix if that is another one."""
    memory, wrong = memory_at_largest(found), wrong_ones(found)
    rivals = [
        row
        for name, row in _measured_times(found).items()
        if name != _PLAIN and "gradcache_clip" not in name and name not in wrong
    ]
    rivals.sort(key=lambda row: row.time_over_ours)
    limit = _NO_MATRIX * memory[_PLAIN].peak_growth_bytes
    small = [row for row in rivals if memory[row.contestant].peak_growth_bytes < limit]
    return list(dict.fromkeys([*rivals[:1], *small[:1]]))


def wrong_ones(found: Results) -> set[str]:
    """Names of those whose loss or gradient is another one in some case."""
    return {row.contestant for row in found.errors if row.is_wrong()}


def _library(row: TimeRow) -> str:
    return _LIBRARIES.get(row.contestant, row.contestant.split()[0])


def full_batch(results: Path) -> str:
    """The CLIP loss at 65,536 pairs."""
    found = read_results(results / _STEM).of("clip")
    rows = {row.contestant: row for row in found.times if row.batch_size == FULL_BATCH}
    own = rows.pop(ours("cpu"))
    (rival,) = rows.values()
    plain = predicted_bytes(memory_at_largest(found)[_PLAIN], FULL_BATCH)
    return paragraph(
        f"At {FULL_BATCH:,} pairs the CLIP loss runs at {100 * own.share_of_matmul:.0f} % of that "
        f"rate, {rival.time_over_ours:.2f} times as fast as torch's two calls; the plain one would "
        f"need {plain / 1e9:.0f} GB."
    )


def bf16_errors(results: Path) -> str:
    """Gradients of the CLIP loss where those of the plain one are worst."""
    found = read_results(results / _STEM).of("clip").errors
    plain, own = (
        max(
            error
            for row in found
            if (row.contestant, row.case) == (name, "near")
            for output, error in row.by_output().items()
            if output != "loss"
        )
        for name in (_PLAIN, ours("cpu"))
    )
    return paragraph(
        f"With all cosines near {CASES['near'].cosine} in bf16, where the worst gradient of the "
        f"plain loss is off by {100 * plain:.2g} % of the largest entry, ours is off by "
        f"{100 * own:.2g} %."
    )


def contestants(loss: str, found: Results, device: str) -> str:
    """All that ran on a device, the fastest first; and who did not."""
    times, memory = {row.contestant: row for row in main_times(found)}, memory_at_largest(found)
    present = [name for name in found.contestants() if memory[name].status != NEEDS_GPU]
    present.sort(key=lambda name: _milliseconds(times.get(name)))
    largest = max(row.batch_size for row in found.memory)
    head = (
        *("", "time", "over ours", "rate of a matrix product", f"memory at {largest:,}"),
        *("error, fp32", "error, bf16", "remark"),
    )
    right = [name for name in present if name not in wrong_ones(found)]
    fastest = min(right, key=lambda name: _milliseconds(times.get(name)), default="")
    smallest = min(right, key=lambda name: _bytes_at(memory[name], largest), default="")
    lines = []
    for name in present:
        time, *rates = _time_cells(times.get(name), is_own=name == ours(device))
        held = _memory(memory[name], largest)
        cells = [bold(time) if name == fastest else time, *rates]
        cells += [bold(held) if name == smallest else held, *_error_cells(name, found.errors)]
        lines.append([name, *cells, remark(loss, name, found)])
    return table(head, lines, align="lrrrrrrl")


def absent(found: Results) -> str:
    """Who needs a GPU and had none."""
    names = [row.contestant for row in found.memory if row.status == NEEDS_GPU]
    return paragraph(f"Not here: {', '.join(names)} ({NEEDS_GPU}).") if names else ""


def _measured_times(found: Results) -> dict[str, TimeRow]:
    return {row.contestant: row for row in main_times(found) if row.status == "measured"}


def _milliseconds(row: TimeRow | None) -> float:
    return math.inf if row is None or math.isnan(row.milliseconds) else row.milliseconds


def _bytes_at(row: MemoryRow, batch_size: int) -> float:
    is_there = row.status == "measured" and row.batch_size == batch_size
    return row.peak_growth_bytes if is_there else math.inf


def _time_cells(row: TimeRow | None, *, is_own: bool) -> list[str]:
    if row is None or row.status != "measured":
        return ["too large" if row and row.status == "over cap" else "", "", ""]
    ratio = f"{row.time_over_ours:.2f} ({row.lowest_ratio:.2f} to {row.highest_ratio:.2f})"
    return [
        time_text(row.milliseconds),
        "1" if is_own else ratio,
        f"{100 * row.share_of_matmul:.0f} %",
    ]


def _memory(row: MemoryRow, batch_size: int | None = None) -> str:
    if row.status != "measured":
        return row.status if row.status in ("over cap", "out of memory", "timed out") else ""
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
