"""Peak memory and time of a training step against the batch size, for each way to train.

    python benchmarks/memory_vs_batch.py            # 32 to 65,536 pairs; an hour on two cores
    python benchmarks/memory_vs_batch.py --quick    # two batch sizes; under two minutes
    python benchmarks/memory_vs_batch.py --redraw   # the tables and picture of the last CSV
    python benchmarks/memory_vs_batch.py --methods plain cached --smallest 64 --largest 4096 \\
        --plain-up-to 2048

Compared are a plain step, one with activation checkpointing, open_clip's accumulation, the gradient
cache as published, and gradcache-clip. Every point runs in a fresh process: what counts is how far
its peak resident memory rises above what it held before model, optimizer and batch existed. Beside
it stand the bytes counted on fake tensors, which need no memory: points that do not fit, or would
take too long, are shown by these alone. How long a step takes is estimated from the method's last
one by the operations of both. Plain and cached steps are timed in another process, taking turns.

Writes memory_vs_batch.csv, .png and .svg into benchmarks/results (or --results). A run goes on
where an interrupted one ended: points measured by the same code, settings and versions on the same
machine are taken from the CSV, unless --fresh.
"""

from __future__ import annotations

import argparse
import hashlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from fresh_process import Limits, call_in_fresh_process
from memory_steps import (
    METHODS,
    SIZES,
    count_pair_flops,
    count_step,
    measure_memory,
    measure_pair,
    step_flops,
)
from plots import (
    DASHES,
    INK,
    LOOKS,
    PALE,
    Label,
    bytes_axis,
    files,
    headline,
    label_ends,
    note,
    pairs_axis,
    picture,
)
from results import (
    ROOT,
    available_bytes,
    bytes_text,
    paragraph,
    parser,
    provenance,
    read_rows,
    show,
    table,
    write_rows,
)
from rich.console import Console
from rich.progress import Progress

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MEASURED, OVER_CAP, OUT_OF_MEMORY = "measured", "over cap", "out of memory"
_FILE = "memory_vs_batch.csv"
_ANY_RUN = ("date", "commit")
# Sources that a measured step runs.
_CODE = ("engine_steps.py", "fresh_process.py", "memory_steps.py")
_LIBRARY_CODE = ("cache/*.py", "losses/*.py", "ops/*.py")
_COLUMNS = {
    "plain": "plain",
    "checkpointed": "checkpointed",
    "accumulated": "open_clip's accumulation",
    "published": "gradient cache as published",
    "cached": "gradient caching, chunk {chunk_size}",
}
_README_BATCHES = (64, 512, 1024, 2048, 4096, 16384, 65536)


@dataclass(frozen=True)
class Row:
    """One method at one batch size."""

    method: str
    """One of `memory_steps.METHODS`."""
    batch_size: int
    chunk_size: int
    """Pairs that the encoders see at once."""
    encoders: str
    cap_bytes: int
    """Memory that a step may use; one counted beyond it is not run."""
    counted_bytes: int = 0
    """Peak of live tensors, counted on fake tensors."""
    floor_bytes: int = 0
    """The part of model, optimizer and batch."""
    status: str = ""
    """"measured", "over cap", "out of memory", "timed out", or "not run: " and why."""
    peak_growth_bytes: int = 0
    """Growth of the process's peak resident memory; 0 where not measured."""
    step_ms: float = 0.0
    """Median time of a step; 0 where not measured."""
    steps: int = 0
    """Steps behind the median."""
    cached_over_plain_time: float = 0.0
    """Median ratio of neighbouring steps in one process, in cached rows; 0 where not measured."""
    origin: dict[str, str] = field(default_factory=dict)
    """Machine, versions, settings, code and date; the last columns of the CSV."""

    @property
    def measured(self) -> bool:
        return self.status == MEASURED

    @property
    def does_not_fit(self) -> bool:
        return self.status in (OVER_CAP, OUT_OF_MEMORY)

    @property
    def best_bytes(self) -> int:
        """Measured bytes, or counted ones where nothing was measured."""
        return self.peak_growth_bytes if self.measured else self.counted_bytes


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, or with --redraw read, then print the tables and write the files."""
    options = _parser().parse_args(arguments)
    if options.quick:
        _make_quick(options)
    path = options.results / _FILE
    rows = read_rows(Row, path) if options.redraw else _measure(options, path)
    show(f"{section(options.results)}\n\nSeconds of a step:\n\n{_table(rows, _seconds)}")
    for row in rows:
        if not row.measured:
            print(f"{METHODS[row.method].label}, {row.batch_size:,}: {row.status}")
    for written in (path, *draw(rows, path.with_suffix(""))):
        print(written)


# Measuring: one row per point, each in a fresh process


def _measure(options: argparse.Namespace, path: Path) -> list[Row]:
    """The CSV is rewritten after each point, so an interrupted run keeps its rows."""
    warnings.simplefilter("ignore")
    earlier = read_rows(Row, path) if path.exists() and not options.fresh else []
    origin, pair_flops, rows = _origin(options), count_pair_flops(SIZES[options.size]), list[Row]()
    with Progress(console=Console(stderr=True)) as progress:
        total = len(_batch_sizes(options)) * len(options.methods)
        task = progress.add_task("counting", total=total)
        for row in _planned_rows(options, origin):
            progress.update(task, description=f"{row.method}, batch {row.batch_size:,}")
            known = find_earlier(row, earlier)
            done = _taken_over(row, known) if known else _run(row, rows, pair_flops, options)
            rows.append(done)
            write_rows(Row, [*rows, *_still_to_come(rows, earlier, origin)], path)
            progress.advance(task)
    write_rows(Row, rows, path)
    return rows


def _batch_sizes(options: argparse.Namespace) -> list[int]:
    """From the smallest on, each `options.factor` times the one before."""
    sizes = [options.smallest]
    while sizes[-1] * options.factor <= options.largest:
        sizes.append(sizes[-1] * options.factor)
    return sizes


def _planned_rows(options: argparse.Namespace, origin: dict[str, str]) -> Iterator[Row]:
    """Every point with its counted bytes, by batch size."""
    size = SIZES[options.size]
    cap = int((options.cap_gib * 2**30) if options.cap_gib else 0.8 * available_bytes())
    for batch_size in _batch_sizes(options):
        for method in options.methods:
            chunk = min(options.chunk_size, batch_size) if METHODS[method].chunked else batch_size
            counted = count_step(method, size, batch_size, chunk)
            row = Row(method, batch_size, chunk, size.description, cap, *counted)
            yield replace(row, origin=origin)


def find_earlier(row: Row, earlier: Iterable[Row]) -> Row | None:
    """The same point, measured with the same code, settings, machine and versions; if any."""

    def identity(each: Row) -> tuple[object, ...]:
        origin = {name: text for name, text in each.origin.items() if name not in _ANY_RUN}
        return each.method, each.batch_size, each.chunk_size, each.encoders, origin

    wanted = identity(row)
    return next((each for each in earlier if each.measured and identity(each) == wanted), None)


def _taken_over(row: Row, known: Row) -> Row:
    """The earlier measurement, with the counted bytes and the cap of this run."""
    counted = {"counted_bytes": row.counted_bytes, "floor_bytes": row.floor_bytes}
    return replace(known, cap_bytes=row.cap_bytes, **counted)


def _still_to_come(
    rows: Sequence[Row], earlier: Sequence[Row], origin: dict[str, str]
) -> Iterator[Row]:
    """Rows of an earlier run that this one has not reached and would take over."""
    reached = {(row.method, row.batch_size) for row in rows}
    for each in earlier:
        current = find_earlier(replace(each, origin=origin), [each])
        if current and (each.method, each.batch_size) not in reached:
            yield each


def _run(row: Row, before: Sequence[Row], pair_flops: float, options: argparse.Namespace) -> Row:
    """The row with what was measured, or with why nothing was."""
    reason = _reason_not_to_run(row, before, pair_flops, options)
    if reason:
        return replace(row, status=reason)
    limits = Limits(options.timeout, row.cap_bytes, options.threads)
    point = {**_point(row, options), "method": row.method}
    outcome = call_in_fresh_process(measure_memory, point, limits)
    row = replace(row, status=outcome.failure or MEASURED, **outcome.values)
    return _with_time_ratio(row, before, options)


def _reason_not_to_run(
    row: Row, before: Sequence[Row], pair_flops: float, options: argparse.Namespace
) -> str:
    smaller = [each for each in before if each.method == row.method]
    if row.counted_bytes > row.cap_bytes:
        return OVER_CAP
    if row.method == "plain" and options.plain_up_to and row.batch_size > options.plain_up_to:
        return f"not run: above --plain-up-to {options.plain_up_to:,}"
    if smaller and smaller[-1].status in (OUT_OF_MEMORY, "timed out"):
        return f"not run: batch {smaller[-1].batch_size:,} {smaller[-1].status}"
    minutes = _estimated_minutes(row, smaller, pair_flops)
    if minutes > (options.cached_minutes if row.method == "cached" else options.minutes):
        return f"not run: would take about {minutes:.0f} minutes"
    return ""


def _estimated_minutes(row: Row, smaller: Sequence[Row], pair_flops: float) -> float:
    """Duration of one step at the rate of the method's last measured one; 0 if there is none."""
    measured = [each for each in smaller if each.measured]
    if not measured:
        return 0.0
    last = measured[-1]
    flops, before = (
        step_flops(each.method, each.batch_size, each.chunk_size, pair_flops)
        for each in (row, last)
    )
    return last.step_ms / 60e3 * flops / before


def _with_time_ratio(row: Row, before: Sequence[Row], options: argparse.Namespace) -> Row:
    """Add cached over plain time where both ran and take turns within --seconds."""
    plain = [each for each in before if each.method == "plain" and each.measured]
    beside = plain and plain[-1].batch_size == row.batch_size
    if not (row.method == "cached" and row.measured and beside):
        return row
    if plain[-1].step_ms + row.step_ms > 1e3 * options.seconds:
        return row
    limits = Limits(2 * options.timeout, threads=options.threads)
    outcome = call_in_fresh_process(measure_pair, _point(row, options), limits)
    return replace(row, **outcome.values)


def _point(row: Row, options: argparse.Namespace) -> dict[str, object]:
    """Arguments of both measurements."""
    sizes = {"batch_size": row.batch_size, "chunk_size": row.chunk_size}
    return {"size": options.size, **sizes, "steps": options.steps, "seconds": options.seconds}


def _origin(options: argparse.Namespace) -> dict[str, str]:
    # As the environment has it, too; a process of a step inherits that.
    threads = options.threads or torch.get_num_threads()
    settings = f"{options.steps} steps, {options.seconds:g} s, {threads} threads"
    return {**provenance(), "settings": settings, "code": _fingerprint()}


def _fingerprint() -> str:
    """Hash of the sources that a measured step runs."""
    files = [ROOT / "benchmarks" / name for name in _CODE]
    files += [path for each in _LIBRARY_CODE for path in (ROOT / "gradcache_clip").glob(each)]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(files))).hexdigest()[:12]


# Tables


def section(results: Path) -> str:
    """Every batch size and every way to train."""
    rows = read_rows(Row, results / _FILE)
    text = (
        f"One training step of {rows[0].encoders}: how far the peak resident memory of a fresh "
        "process rises. Of steps that were not run stands what their tensors would take, counted. "
        "Time: gradient caching over the plain step, median ratio of steps that take turns."
    )
    return f"{paragraph(text)}\n\n{_memory_table(rows)}"


def readme(results: Path) -> str:
    """The same at some batch sizes."""
    rows = read_rows(Row, results / _FILE)
    return _memory_table([row for row in rows if row.batch_size in _README_BATCHES])


BLOCKS = {"memory": readme}


def _memory_table(rows: Sequence[Row]) -> str:
    ratios = {r.batch_size: r.cached_over_plain_time for r in rows if r.cached_over_plain_time}
    texts = {batch: f"{ratio:.2f}" for batch, ratio in ratios.items()}
    return _table(rows, _memory, {"time against plain": texts})


def _table(
    rows: Sequence[Row],
    cell: Callable[[Row], str],
    further: Mapping[str, Mapping[int, str]] | None = None,
) -> str:
    """A line per batch size, a column per method, and further ones by batch size."""
    methods = [name for name in _COLUMNS if any(row.method == name for row in rows)]
    chunk = max((row.chunk_size for row in rows if row.method == "cached"), default=0)
    titles = [_COLUMNS[name].format(chunk_size=chunk) for name in methods]
    found = {(row.batch_size, row.method): cell(row) for row in rows}
    lines = [
        [
            f"{batch:,}",
            *(found.get((batch, name), "") for name in methods),
            *(column.get(batch, "") for column in (further or {}).values()),
        ]
        for batch in sorted({row.batch_size for row in rows})
    ]
    head = ["batch", *titles, *(further or {})]
    return table(head, lines, "r" * len(head))


def _memory(row: Row) -> str:
    """Measured bytes; else the reason, and counted bytes."""
    if row.measured:
        return bytes_text(row.peak_growth_bytes)
    return f"{row.status.split(':')[0]}; {bytes_text(row.counted_bytes)} counted"


def _seconds(row: Row) -> str:
    return f"{row.step_ms / 1e3:.2f}" if row.step_ms else ""


# The picture: memory against batch size, both axes logarithmic


def draw(rows: Sequence[Row], stem: Path) -> list[Path]:
    """Write STEM.png and STEM.svg and return their paths.

    Lines are counted bytes, filled marks are measured in a process of their own; hollow crosses are
    batches that did not fit, hollow circles those that fit and were not run.
    """
    with picture(stem, (11.0, 6.6)) as figure:
        axes = figure.add_axes((0.085, 0.19, 0.665, 0.63))
        for method in dict.fromkeys(row.method for row in rows):
            _draw_method(axes, [row for row in rows if row.method == method])
        floor = {row.batch_size: row.floor_bytes for row in rows}
        axes.plot(list(floor), list(floor.values()), color=PALE, linewidth=1.2, linestyle=":")
        pairs_axis(axes, sorted(floor))
        sizes = [size for row in rows for size in (row.floor_bytes, row.counted_bytes)]
        sizes += [row.peak_growth_bytes for row in rows if row.measured]
        bytes_axis(axes, min(sizes) / 1.6, max(sizes) * 1.6)
        _draw_cap(axes, rows[0].cap_bytes)
        label_ends(axes, _labels(rows), gap=0.1)
        headline(figure, finding(rows))
        what = f"Peak memory of one training step. {rows[0].encoders}; AdamW, fp32, CPU."
        figure.text(0.02, 0.87, what, color=PALE, va="top")
        note(figure, " ".join(_marks(rows)), y=0.075)
        note(figure, rows[0].origin.get("machine", ""), y=0.04)
    return files(stem)


def finding(rows: Sequence[Row]) -> str:
    """The title: what the largest batch takes with the first and the last method."""
    largest = [row for row in rows if row.batch_size == rows[-1].batch_size]
    first, last = largest[0], largest[-1]
    took, against = ("takes" if row.measured else "would take" for row in (last, first))
    said = f"Batch {last.batch_size:,} {took} {bytes_text(last.best_bytes)}"
    if first is last:
        return said
    return (
        f"{said} with {METHODS[last.method].label},\na {METHODS[first.method].label} {against} "
        f"{bytes_text(first.best_bytes)}"
    )


def _draw_method(axes: Axes, rows: Sequence[Row]) -> None:
    color, marker = LOOKS[rows[0].method]
    batches = [row.batch_size for row in rows]
    width = 2.8 if rows[0].method == "cached" else 1.8
    axes.plot(batches, [row.counted_bytes for row in rows], color=color, linewidth=width)
    marks = (
        ([row for row in rows if row.measured], marker, 7.5, color, "white"),
        ([row for row in rows if row.does_not_fit], "X", 9, "white", color),
        ([r for r in rows if not (r.measured or r.does_not_fit)], "o", 6.5, "white", color),
    )
    for chosen, shape, size, face, edge in marks:
        places = [row.batch_size for row in chosen], [row.best_bytes for row in chosen]
        look = {"markersize": size, "markerfacecolor": face, "markeredgecolor": edge}
        axes.plot(*places, shape, linestyle="none", zorder=3, **look)


def _labels(rows: Sequence[Row]) -> Iterator[Label]:
    """Names and bytes of the methods, and of what none can do without."""
    last = [row for row in rows if row.batch_size == rows[-1].batch_size]
    for row in last:
        own = row.method == "cached"
        chunks = f", chunks of {row.chunk_size}" if own else ""
        text = f"{METHODS[row.method].label}{chunks}\n{bytes_text(row.best_bytes)}"
        yield Label(text, row.batch_size, row.counted_bytes, LOOKS[row.method][0], own)
    floor = f"model, optimizer and\nbatch alone: {bytes_text(last[0].floor_bytes)}"
    yield Label(floor, last[0].batch_size, last[0].floor_bytes, PALE)


def _draw_cap(axes: Axes, cap: int) -> None:
    """The memory of this machine, if a method comes near it."""
    low, high = axes.get_ylim()
    if not low < cap < high:
        return
    axes.axhline(cap, color=INK, linewidth=1.2, linestyle=DASHES, zorder=1)
    text, place = f"memory for a step on this machine: {bytes_text(cap)}", (axes.get_xlim()[0], cap)
    axes.annotate(text, place, (2, 5), textcoords="offset points", color=INK, fontsize=10)


def _marks(rows: Sequence[Row]) -> Iterator[str]:
    yield "Filled: resident memory, measured in a fresh process. Line: bytes of tensors, counted."
    if any(row.does_not_fit for row in rows):
        yield "Hollow cross: does not fit."
    if any(not (row.measured or row.does_not_fit) for row in rows):
        yield "Hollow circle: not run, takes too long."


# The command


def _make_quick(options: argparse.Namespace) -> None:
    options.size, options.chunk_size, options.smallest = "mini", 32, 32
    options.largest, options.factor, options.steps, options.seconds = 128, 4, 1, 2.0
    options.threads = options.threads or 1


def _parser() -> argparse.ArgumentParser:
    made = parser(__doc__)
    add = made.add_argument
    add("--size", choices=sorted(SIZES), default="mini", help="encoders (default: %(default)s)")
    names = list(METHODS)
    listed = f"ways to train, of {', '.join(names)} (all)"
    add("--methods", nargs="+", choices=names, default=names, metavar="METHOD", help=listed)
    add("--smallest", type=int, default=32, help="first batch size (32)")
    add("--factor", type=int, default=2, help="from one batch size to the next (2)")
    add("--largest", type=int, default=65536, help="largest batch size (65536)")
    add("--plain-up-to", type=int, help="largest batch of a plain step run (all that fit)")
    add("--chunk-size", type=int, default=64, help="pairs of a chunk (64)")
    add("--cap-gib", type=float, help="memory a step may use; by default 80 %% of what is free")
    add("--minutes", type=float, default=9.0, help="a longer step is not run (9)")
    add("--cached-minutes", type=float, default=40.0, help="the same of gradcache-clip (40)")
    add("--steps", type=int, default=3, help="timed steps per point, median reported (3)")
    add("--seconds", type=float, default=20.0, help="no further step of a point after this (20)")
    add("--timeout", type=float, default=3600.0, help="seconds until a process is ended (3600)")
    add("--threads", type=int, help="threads of a step (as torch chooses)")
    add("--quick", action="store_true", help="two batch sizes, under two minutes")
    add("--fresh", action="store_true", help="measure again what the CSV has already")
    add("--redraw", action="store_true", help="measure nothing; show the CSV of --results again")
    return made


if __name__ == "__main__":
    main()
