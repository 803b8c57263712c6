"""The plan of loss.py: which contestant is measured at which batch, and the rows that result."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from statistics import median
from typing import Any

from fresh_process import Limits, Outcome, call_in_fresh_process
from loss_peers import CONTESTANTS, Contestant, find, ours
from loss_points import MATMUL_EDGE, measure_point, measure_times
from loss_rows import ErrorRow, MemoryRow, Results, TimeRow
from loss_truth import CASES
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

TITLES = {
    "clip": "CLIP loss",
    "siglip": "Sigmoid loss (SigLIP)",
    "nt_xent": "NT-Xent loss (SimCLR)",
}
VIEWS = {"clip": 1, "siglip": 1, "nt_xent": 2}
"""Rows of the matrix for a pair; NT-Xent gets half the batches, so that the matrices are equal."""
FULL_BATCH = 65_536
# A call takes minutes at that batch, so only ours is timed there and what torch itself offers.
_FULL_RIVAL = "torch linear_cross_entropy x 2"
OPERATIONS = {"clip": 8, "siglip": 6, "nt_xent": 16}
"""Multiply-adds count twice; in units of B^2 D for B pairs. Similarities and the two products with
their gradient are 6, computing the similarities again in the backward of a softmax 2 more; the 2 B
views of the NT-Xent loss have a symmetric matrix, of which one half is enough."""


def measure(options: argparse.Namespace, save: Callable[[Results], object]) -> Results:
    """Memory and errors first: who failed or would not fit there is not timed.

    Args:
        save: called with what there is after each contestant, so that an interrupted run keeps it.
    """
    chosen = [one for one in CONTESTANTS if one.loss in options.losses and _wanted(one, options)]
    results = Results([], [], [])
    with _progress() as progress, ThreadPoolExecutor(options.jobs) as pool:
        task = progress.add_task("memory, errors", total=len(chosen) + len(options.losses))
        for memory, errors in pool.map(partial(_points, options=options), chosen):
            results.memory += memory
            results.errors += errors
            save(results)
            progress.update(task, description=f"memory, errors: {memory[0].contestant}", advance=1)
        for loss in options.losses:
            progress.update(task, description=f"times: {TITLES[loss]}")
            results.times += _times(loss, results.of(loss), options)
            save(results)
            progress.advance(task)
    return results


def _wanted(contestant: Contestant, options: argparse.Namespace) -> bool:
    """Ours is always there to compare with."""
    names = options.only or [""]
    is_ours = contestant.name == ours(options.device)
    return is_ours or any(word.lower() in contestant.name.lower() for word in names)


def _points(
    contestant: Contestant, options: argparse.Namespace
) -> tuple[list[MemoryRow], list[ErrorRow]]:
    """Memory at growing batches until one would not fit, errors beside the first of them."""
    if obstacle := contestant.obstacle(options.device):
        return [MemoryRow(*_head(contestant, options.batches[0], options), obstacle)], []
    rows: list[MemoryRow] = []
    errors: list[ErrorRow] = []
    batches = [batch // VIEWS[contestant.loss] for batch in options.batches]
    fitting = [batch for batch in batches if batch <= contestant.largest]
    for batch_size in fitting or [contestant.largest]:
        head = _head(contestant, batch_size, options)
        if rows and predicted_bytes(rows[-1], batch_size) > options.cap:
            return [*rows, MemoryRow(*head, "over cap")], errors
        outcome = _point(contestant, batch_size, options, with_errors=not rows)
        rows.append(MemoryRow(*head, *_memory_values(outcome)))
        errors += _error_rows(contestant, outcome, options)
        if rows[-1].status != "measured":
            break
    return rows, errors


def predicted_bytes(row: MemoryRow, batch_size: int) -> float:
    """Memory at another batch if all of it grows with the square: never too little."""
    return row.peak_growth_bytes * (batch_size / row.batch_size) ** 2


def _point(
    contestant: Contestant, batch_size: int, options: argparse.Namespace, *, with_errors: bool
) -> Outcome:
    point = {
        **_shared(contestant.loss, options),
        "name": contestant.name,
        "batch_size": batch_size,
        "width": options.width,
        "error_batch": options.error_batch if with_errors else 0,
        "error_width": options.width,
    }
    # CUDA reserves address space far beyond what it uses.
    data_bytes = None if options.device == "cuda" else options.cap
    return _called(measure_point, point, Limits(options.timeout, data_bytes, options.threads))


def _called(function: Any, arguments: dict[str, Any], limits: Limits) -> Outcome:
    """The outcome; a process that died shows the last line it wrote."""
    try:
        return call_in_fresh_process(function, arguments, limits)
    except RuntimeError as error:
        return Outcome(failure=str(error).strip().splitlines()[-1])


def _memory_values(outcome: Outcome) -> tuple[Any, ...]:
    failure = outcome.failure or outcome.values.get("memory_failure", "")
    return (failure,) if failure else ("measured", outcome.values["memory"])


def _error_rows(
    contestant: Contestant, outcome: Outcome, options: argparse.Namespace
) -> Iterator[ErrorRow]:
    found = outcome.values.get("errors", {})
    failures = outcome.values.get("error_failures", {})
    head = _head(contestant, min(options.error_batch, contestant.largest), options)[:-1]
    for name in (*found, *failures):
        named = {f"{output}_error": error for output, error in found.get(name, {}).items()}
        dtype = CASES[name].dtype or options.dtype
        yield ErrorRow(*head, dtype, failures.get(name, "measured"), case=name, **named)


def _times(loss: str, points: Results, options: argparse.Namespace) -> list[TimeRow]:
    """Rows of all that ran at the batch of the times, and with --full of two at a huge one."""
    batch_size = options.time_batch // VIEWS[loss]
    measured = {row.contestant: row for row in points.memory if row.status == "measured"}
    fits = [name for name, row in measured.items() if _fits(loss, row, batch_size, options)]
    rows = _timed(loss, fits, batch_size, options)
    rows += [
        TimeRow(*_head(find(loss, name), batch_size, options, options.time_width), "over cap")
        for name in measured
        if name not in fits
    ]
    if options.full and loss == "clip":
        few = [name for name in (ours(options.device), _FULL_RIVAL) if name in measured]
        # The warm-up of a step this long counts, so one call each; the product needs more.
        rows += _timed(loss, few, FULL_BATCH, options, products=20, seconds=1.0)
    return rows


def _fits(loss: str, row: MemoryRow, batch_size: int, options: argparse.Namespace) -> bool:
    predicted = predicted_bytes(row, batch_size) * max(options.time_width / row.width, 1)
    return batch_size <= find(loss, row.contestant).largest and predicted <= options.cap


def _timed(
    loss: str,
    names: list[str],
    batch_size: int,
    options: argparse.Namespace,
    *,
    products: int = 1,
    seconds: float | None = None,
) -> list[TimeRow]:
    arguments = {
        **_shared(loss, options),
        "names": names,
        "batch_size": batch_size,
        "width": options.time_width,
        "rounds": options.rounds,
        "seconds": seconds or options.seconds,
        "products": products,
    }
    limits = Limits(options.timeout * max(1, len(names)), None, options.threads)
    outcome = _called(measure_times, arguments, limits)
    heads = {
        name: _head(find(loss, name), batch_size, options, options.time_width) for name in names
    }
    failures = dict.fromkeys(names, outcome.failure) if outcome.failure else {}
    failures |= outcome.values.get("failures", {})
    rows = [
        TimeRow(*heads[name], "measured", **values)
        for name, values in time_values(loss, batch_size, outcome.values, options).items()
    ]
    return rows + [TimeRow(*heads[name], failure) for name, failure in failures.items()]


def time_values(
    loss: str, batch_size: int, values: dict[str, Any], options: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Medians over the rounds, by contestant; a ratio is taken within a round."""
    names, rounds = values.get("names", []), values.get("rounds", [])
    products = [median(product for product, _ in one) for one in rounds]
    steps = {name: [one[place][1] for one in rounds] for place, name in enumerate(names)}
    own = steps.get(ours(options.device))
    found: dict[str, dict[str, float]] = {}
    for name, durations in steps.items():
        ratios = [a / b for a, b in zip(durations, own or [], strict=bool(own))]
        shares = [
            share_of_matmul(loss, batch_size, options.time_width, product, duration)
            for product, duration in zip(products, durations, strict=True)
        ]
        found[name] = {
            "milliseconds": median(durations),
            "share_of_matmul": median(shares),
            "rounds": len(durations),
        }
        if ratios:
            found[name] |= {"time_over_ours": median(ratios)}
            found[name] |= {"lowest_ratio": min(ratios), "highest_ratio": max(ratios)}
    return found


def share_of_matmul(
    loss: str, batch_size: int, width: int, product_ms: float, step_ms: float
) -> float:
    """Rate of a step over that of the product, counting OPERATIONS whatever it really does."""
    operations = OPERATIONS[loss] * batch_size**2 * width
    return (operations / step_ms) / (2 * MATMUL_EDGE**2 * width / product_ms)


def _shared(loss: str, options: argparse.Namespace) -> dict[str, Any]:
    return {
        "loss": loss,
        "dtype": options.dtype,
        "device": options.device,
        "threads": options.threads,
    }


def _head(
    contestant: Contestant, batch_size: int, options: argparse.Namespace, width: int | None = None
) -> tuple[Any, ...]:
    """What every row says first, up to its status."""
    names = contestant.loss, contestant.name, contestant.version()
    return *names, batch_size, width or options.width, options.dtype


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description:<50}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    )
