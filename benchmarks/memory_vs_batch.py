"""Peak memory and time of a training step against the batch size, plain and cached.

    python benchmarks/memory_vs_batch.py            # the full curve; an hour on two slow cores
    python benchmarks/memory_vs_batch.py --quick    # small encoders and batches; about a minute
    python benchmarks/memory_vs_batch.py --redraw   # the table and picture of the last CSV

Every memory point runs in a fresh process: what counts is how far its peak resident memory rises
above what it held before model, optimizer and inputs existed. Beside it stand the bytes counted
on fake tensors, which need no memory; plain points beyond the cap are shown by these alone.
Times are compared in another process, where plain and cached steps take turns.

Writes memory_vs_batch.csv, .png and .svg into benchmarks/results (or --results).
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from fresh_process import Limits, available_bytes, call_in_fresh_process, provenance
from memory_plot import draw
from memory_points import (
    SIZES,
    PlainClipLoss,
    build_encoders,
    make_inputs,
    measure_memory,
    measure_pair,
)
from memory_rows import Row, read_rows, show_table, write_rows
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)

from gradcache_clip import ClipLoss
from gradcache_clip.memory import count_cached_step, count_plain_step


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, or with --redraw read, then print the table and write the files."""
    options = _parser().parse_args(arguments)
    if options.quick:
        _make_quick(options)
    results = options.results
    results.mkdir(parents=True, exist_ok=True)
    rows = read_rows(results / "memory_vs_batch.csv") if options.redraw else _measure(options)
    show_table(rows, Console())
    pictures = draw(rows, results / "memory_vs_batch")
    for path in (results / "memory_vs_batch.csv", *pictures):
        print(path)


def _measure(options: argparse.Namespace) -> list[Row]:
    """One row a point; the CSV is rewritten after each, so an interrupted run keeps its rows."""
    origin, rows = provenance(), list[Row]()
    with _progress() as progress:
        task = progress.add_task("counting", total=2 * len(_batch_sizes(options)))
        for row in _planned_rows(options):
            progress.update(task, description=f"{row.method}, batch {row.batch_size:,}")
            rows.append(_with_time_ratio(_measured(row, options), rows, options))
            write_rows(rows, origin, options.results / "memory_vs_batch.csv")
            progress.advance(task)
    return rows


def _batch_sizes(options: argparse.Namespace) -> list[int]:
    """Doubled from the smallest on."""
    doublings = (options.largest // options.smallest).bit_length()
    return [options.smallest << power for power in range(doublings)]


def _planned_rows(options: argparse.Namespace) -> Iterator[Row]:
    """Every point with its counted bytes, by batch size, plain before cached."""
    warnings.simplefilter("ignore")
    size = SIZES[options.size]
    encoders, example = build_encoders(size), make_inputs(size, 2)
    cap = int((options.cap_gib * 2**30) if options.cap_gib else 0.8 * available_bytes())
    for batch_size in _batch_sizes(options):
        base = Row("plain", batch_size, batch_size, size.description, cap)
        plain = count_plain_step(encoders, PlainClipLoss(), example, batch_size)
        yield replace(base, counted_bytes=plain.total_bytes)
        chunk = min(options.chunk_size, batch_size)
        cached = count_cached_step(encoders, ClipLoss(), example, batch_size, chunk)
        counted = cached.total_bytes
        yield replace(base, method="cached", chunk_size=chunk, counted_bytes=counted)


def _measured(row: Row, options: argparse.Namespace) -> Row:
    if row.counted_bytes > row.cap_bytes:
        return replace(row, status="over cap")
    if row.method == "plain" and row.batch_size > options.plain_up_to:
        return replace(row, status="not run")
    point = {
        "method": row.method,
        "size": options.size,
        "batch_size": row.batch_size,
        "chunk_size": row.chunk_size,
        "steps": options.steps,
        "seconds": options.seconds,
    }
    limits = Limits(options.timeout, row.cap_bytes, options.threads)
    outcome = call_in_fresh_process(measure_memory, point, limits)
    return replace(row, status=outcome.failure or "measured", **outcome.values)


def _with_time_ratio(row: Row, before: list[Row], options: argparse.Namespace) -> Row:
    """Add cached over plain time where both ran; the point before a cached one is its plain one."""
    fits = row.method == "cached" and {row.status, before[-1].status} == {"measured"}
    if not fits:
        return row
    point = {
        "size": options.size,
        "batch_size": row.batch_size,
        "chunk_size": row.chunk_size,
        "steps": options.steps,
        "seconds": options.seconds,
    }
    outcome = call_in_fresh_process(
        measure_pair, point, Limits(2 * options.timeout, threads=options.threads)
    )
    return replace(row, **outcome.values)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description:<24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    )


def _make_quick(options: argparse.Namespace) -> None:
    options.size, options.chunk_size, options.smallest = "mini", 32, 64
    options.plain_up_to, options.largest, options.steps, options.seconds = 64, 128, 1, 5.0
    options.threads = options.threads or 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--size", choices=sorted(SIZES), default="small", help="encoders (default: %(default)s)")
    add("--smallest", type=int, default=64, help="first batch size; doubled from there (64)")
    add("--plain-up-to", type=int, default=1024, help="largest batch of a plain step run (1024)")
    add("--largest", type=int, default=4096, help="largest batch of a cached step (4096)")
    add("--chunk-size", type=int, default=64, help="rows of a chunk of the cached step (64)")
    add("--cap-gib", type=float, help="memory a step may use; by default 80 %% of what is free")
    add("--steps", type=int, default=3, help="timed steps a point, median reported (3)")
    add("--seconds", type=float, default=60.0, help="no further step of a point after this (60)")
    add("--timeout", type=float, default=1800.0, help="seconds until a process is ended (1800)")
    add("--threads", type=int, help="threads of a step (as torch chooses)")
    add("--results", type=Path, default=Path("benchmarks/results"), help="folder of the results")
    add("--quick", action="store_true", help="small encoders and batches, under a minute")
    add("--redraw", action="store_true", help="measure nothing; show the CSV of --results again")
    return parser


if __name__ == "__main__":
    main()
