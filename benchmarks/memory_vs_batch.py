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
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from fresh_process import Limits, call_in_fresh_process
from memory_count import count_pair_flops, count_step
from memory_methods import METHODS, step_flops
from memory_models import SIZES
from memory_plot import draw
from memory_points import measure_memory, measure_pair
from memory_rows import (
    MEASURED,
    OVER_CAP,
    Row,
    find_earlier,
    read_rows,
    show_tables,
    write_rows,
)
from results import available_bytes, provenance
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)

_HERE = Path(__file__).resolve().parent
# What a measured step runs; how its row is counted or drawn is not among it.
_CODE = ("engine_contestants.py", "engine_models.py", "fresh_process.py", "memory_models.py")
_CODE += ("memory_methods.py", "memory_points.py")
_LIBRARY_CODE = ("cache/*.py", "losses/*.py", "ops/*.py")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, or with --redraw read, then print the tables and write the files."""
    options = _parser().parse_args(arguments)
    if options.quick:
        _make_quick(options)
    options.results.mkdir(parents=True, exist_ok=True)
    path = options.results / "memory_vs_batch.csv"
    rows = read_rows(path) if options.redraw else _measure(options, path)
    names = dict.fromkeys(row.method for row in rows)
    show_tables(rows, {name: METHODS[name].label for name in names}, Console())
    for written in (path, *draw(rows, path.with_suffix(""))):
        print(written)


def _measure(options: argparse.Namespace, path: Path) -> list[Row]:
    """One row a point; the CSV is rewritten after each, so an interrupted run keeps its rows."""
    warnings.simplefilter("ignore")
    earlier = read_rows(path) if path.exists() and not options.fresh else []
    origin, pair_flops, rows = _origin(options), count_pair_flops(SIZES[options.size]), list[Row]()
    with _progress() as progress:
        total = len(_batch_sizes(options)) * len(options.methods)
        task = progress.add_task("counting", total=total)
        for row in _planned_rows(options, origin):
            progress.update(task, description=f"{row.method}, batch {row.batch_size:,}")
            known = find_earlier(row, earlier)
            done = _taken_over(row, known) if known else _run(row, rows, pair_flops, options)
            rows.append(done)
            write_rows([*rows, *_still_to_come(rows, earlier, origin)], path)
            progress.advance(task)
    write_rows(rows, path)
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


def _taken_over(row: Row, known: Row) -> Row:
    """What an earlier run measured, with the bytes and the cap of this one."""
    return replace(
        known,
        cap_bytes=row.cap_bytes,
        counted_bytes=row.counted_bytes,
        floor_bytes=row.floor_bytes,
    )


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
    outcome = call_in_fresh_process(
        measure_memory, {**_point(row, options), "method": row.method}, limits
    )
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
    if smaller and smaller[-1].status in ("out of memory", "timed out"):
        return f"not run: batch {smaller[-1].batch_size:,} {smaller[-1].status}"
    minutes = _estimated_minutes(row, smaller, pair_flops)
    if minutes > (options.cached_minutes if row.method == "cached" else options.minutes):
        return f"not run: would take about {minutes:.0f} minutes"
    return ""


def _estimated_minutes(row: Row, smaller: Sequence[Row], pair_flops: float) -> float:
    """Of one step, at the rate of the method's last measured one; 0 if there is none."""
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
    """What both measurements are told."""
    return {
        "size": options.size,
        "batch_size": row.batch_size,
        "chunk_size": row.chunk_size,
        "steps": options.steps,
        "seconds": options.seconds,
    }


def _origin(options: argparse.Namespace) -> dict[str, str]:
    # As the environment has it, too; a process of a step inherits that.
    threads = options.threads or torch.get_num_threads()
    settings = f"{options.steps} steps, {options.seconds:g} s, {threads} threads"
    return {**provenance(), "settings": settings, "code": _fingerprint()}


def _fingerprint() -> str:
    """Of the sources that a measured step runs."""
    library = _HERE.parent / "gradcache_clip"
    files = [path for pattern in _CODE for path in _HERE.glob(pattern)]
    files += [path for pattern in _LIBRARY_CODE for path in library.glob(pattern)]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(files))).hexdigest()[:12]


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description:<26}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    )


def _make_quick(options: argparse.Namespace) -> None:
    options.size, options.chunk_size, options.smallest = "mini", 32, 32
    options.largest, options.factor, options.steps, options.seconds = 128, 4, 1, 2.0
    options.threads = options.threads or 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--size", choices=sorted(SIZES), default="mini", help="encoders (default: %(default)s)")
    names = list(METHODS)
    add("--methods", nargs="+", choices=names, default=names, metavar="METHOD", help=_listed(names))
    add("--smallest", type=int, default=32, help="first batch size (32)")
    add("--factor", type=int, default=2, help="from one batch size to the next (2)")
    add("--largest", type=int, default=65536, help="largest batch size (65536)")
    add("--plain-up-to", type=int, help="largest batch of a plain step run (all that fit)")
    add("--chunk-size", type=int, default=64, help="pairs of a chunk (64)")
    add("--cap-gib", type=float, help="memory a step may use; by default 80 %% of what is free")
    add("--minutes", type=float, default=9.0, help="a longer step is not run (9)")
    add("--cached-minutes", type=float, default=40.0, help="the same of gradcache-clip (40)")
    add("--steps", type=int, default=3, help="timed steps a point, median reported (3)")
    add("--seconds", type=float, default=20.0, help="no further step of a point after this (20)")
    add("--timeout", type=float, default=3600.0, help="seconds until a process is ended (3600)")
    add("--threads", type=int, help="threads of a step (as torch chooses)")
    add("--results", type=Path, default=Path("benchmarks/results"), help="folder of the results")
    add("--quick", action="store_true", help="two batch sizes, under two minutes")
    add("--fresh", action="store_true", help="measure again what the CSV has already")
    add("--redraw", action="store_true", help="measure nothing; show the CSV of --results again")
    return parser


def _listed(names: Sequence[str]) -> str:
    return f"ways to train, of {', '.join(names)} (all)"


if __name__ == "__main__":
    main()
