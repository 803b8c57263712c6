"""The contrastive losses of gradcache_clip beside every peer: time, memory and error.

    python benchmarks/loss.py                  # fp32 on the CPU; half an hour on two cores
    python benchmarks/loss.py --quick          # the CLIP loss at small batches; under a minute
    python benchmarks/loss.py --full           # also times ours and torch's at batch 65,536
    python benchmarks/loss.py --device cuda    # bf16 on a GPU; --dtype fp32 for the other
    python benchmarks/loss.py --redraw         # tables and pictures of the last CSVs

Peers come with pip install ".[peers]"; one that is not installed is listed as such. Memory is
measured in a fresh process for each contestant and batch, times in interleaved rounds of all
contestants in one process, errors against fp64 at the same numbers.

Writes loss_DEVICE_DTYPE_{times,memory,errors}.csv and loss_DEVICE_DTYPE_LOSS.{png,svg} into
benchmarks/results (or --results).
"""

from __future__ import annotations

import argparse
import ctypes
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from statistics import median
from typing import Any

import torch
from fresh_process import Limits, Outcome, PeakGrowth, call_in_fresh_process, interleaved_times_ms
from loss_figures import (
    FULL_BATCH,
    MEASURED,
    OVER_CAP,
    TITLES,
    VIEWS,
    ErrorRow,
    MemoryRow,
    Results,
    TimeRow,
    draw,
    predicted_bytes,
    read_origin,
    read_results,
    section,
    write_results,
)
from loss_peers import (
    CASES,
    CONTESTANTS,
    DTYPES,
    OUTPUTS,
    PLAIN,
    Case,
    Contestant,
    Leaves,
    LossFunction,
    NotOffered,
    find,
    make_leaves,
    ours,
)
from results import available_bytes, parser, provenance, show
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from torch.nn.functional import normalize

MATMUL_EDGE = 4096
_WARM_UP_BATCH = 128
# A call takes minutes at that batch, so only ours is timed there and what torch itself offers.
_FULL_RIVAL = "torch linear_cross_entropy x 2"
OPERATIONS = {"clip": 8, "siglip": 6, "nt_xent": 16}
"""Multiply-adds count twice; in units of B^2 D for B pairs. Similarities and the two products with
their gradient are 6, computing the similarities again in the backward of a softmax 2 more; the 2 B
views of the NT-Xent loss have a symmetric matrix, of which one half is enough."""
_QUICK = {
    "losses": ["clip"],
    "batches": [1024],
    "width": 64,
    "error_batch": 256,
    "time_batch": 1024,
    "time_width": 64,
    "rounds": 3,
    "jobs": os.cpu_count() or 1,
}


# The plan: memory and errors first, then times of all that fit


def measure(options: argparse.Namespace, save: Callable[[Results], object]) -> Results:
    """Memory and errors first: who failed or would not fit there is not timed.

    Args:
        save: called with what there is after each contestant, so that an interrupted run keeps it.
    """
    chosen = [one for one in CONTESTANTS if one.loss in options.losses and _wanted(one, options)]
    results = Results([], [], [])
    console = Console(stderr=True)
    with Progress(console=console) as progress, ThreadPoolExecutor(options.jobs) as pool:
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
            return [*rows, MemoryRow(*head, OVER_CAP)], errors
        outcome = _point(contestant, batch_size, options, with_errors=not rows)
        rows.append(MemoryRow(*head, *_memory_values(outcome)))
        errors += _error_rows(contestant, outcome, options)
        if rows[-1].status != MEASURED:
            break
    return rows, errors


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
    return (failure,) if failure else (MEASURED, outcome.values["memory"])


def _error_rows(
    contestant: Contestant, outcome: Outcome, options: argparse.Namespace
) -> Iterator[ErrorRow]:
    found = outcome.values.get("errors", {})
    failures = outcome.values.get("error_failures", {})
    head = _head(contestant, min(options.error_batch, contestant.largest), options)[:-1]
    for name in (*found, *failures):
        named = {f"{output}_error": error for output, error in found.get(name, {}).items()}
        dtype = CASES[name].dtype or options.dtype
        yield ErrorRow(*head, dtype, failures.get(name, MEASURED), case=name, **named)


def _times(loss: str, points: Results, options: argparse.Namespace) -> list[TimeRow]:
    """Rows of all that ran at the batch of the times, and with --full of two at a huge one."""
    batch_size = options.time_batch // VIEWS[loss]
    measured = {row.contestant: row for row in points.memory if row.status == MEASURED}
    fits = [name for name, row in measured.items() if _fits(loss, row, batch_size, options)]
    rows = _timed(loss, fits, batch_size, options)
    rows += [
        TimeRow(*_head(find(loss, name), batch_size, options, options.time_width), OVER_CAP)
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
        TimeRow(*heads[name], MEASURED, **values)
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
    """The first fields of every row, up to its status."""
    names = contestant.loss, contestant.name, contestant.version()
    return *names, batch_size, width or options.width, options.dtype


# Errors against fp64


def truth(loss: str, leaves: Leaves, *, normalised: bool) -> list[Tensor]:
    """Loss and gradients in fp64 at these very numbers, through a normalisation if asked."""
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    features = [normalize(x, dim=1) if normalised else x for x in exact[:2]]
    value = PLAIN[loss](*features, *exact[2:])
    return [value.detach(), *torch.autograd.grad(value, exact)]


def outputs(function: Callable[..., Tensor], leaves: Leaves) -> list[Tensor | None]:
    """Loss and gradients; None where a gradient does not exist."""
    value = function(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves, allow_unused=True)]


def relative_error(got: Tensor, exact: Tensor) -> float:
    """Largest difference over the largest exact entry; infinite where something is not finite."""
    if not got.isfinite().all():
        return float("inf")
    difference = (got.double() - exact).abs().max()
    return float(difference / exact.abs().max().clamp_min(1e-30))


def relative_errors(
    loss: str, got: Sequence[Tensor | None], exact: Sequence[Tensor]
) -> dict[str, float]:
    """The error of each output by name; a scalar without a gradient is left out."""
    named = dict(zip(OUTPUTS[loss], zip(got, exact, strict=True), strict=True))
    missing = [name for name in ("dq", "dk") if named[name][0] is None]
    if missing:
        raise ValueError(f"{missing[0]}: expected a gradient, got none")
    return {name: relative_error(a, b) for name, (a, b) in named.items() if a is not None}


# Measurements, each in a fresh process


def measure_point(arguments: dict[str, Any]) -> dict[str, Any]:
    """Growth of peak memory over the inputs, and the errors of every case if "error_batch" is set.

    Returns "memory", a number of bytes, or "memory_failure"; "errors" by case and output, or
    "error_failures" by case.
    """
    _prepare(arguments)
    contestant = find(arguments["loss"], arguments["name"])
    results: dict[str, Any] = {"errors": {}, "error_failures": {}}
    with _noted(results, "memory_failure"):
        results["memory"] = _peak_growth(contestant, arguments)
    for name in CASES if arguments.get("error_batch") else ():
        with _noted(results["error_failures"], name):
            results["errors"][name] = errors(contestant, CASES[name], arguments)
    return results


def errors(contestant: Contestant, case: Case, arguments: dict[str, Any]) -> dict[str, float]:
    """Relative error of loss and gradients against fp64, by name of the output."""
    batch_size = min(arguments["error_batch"], contestant.largest)
    shape = batch_size, arguments["error_width"], arguments["dtype"], arguments["device"]
    leaves = make_leaves(contestant.loss, case, *shape)
    got = outputs(contestant.build(case.scale), leaves)
    exact = truth(contestant.loss, leaves, normalised=contestant.normalises)
    return relative_errors(contestant.loss, got, exact)


def measure_times(arguments: dict[str, Any]) -> dict[str, Any]:
    """Rounds in which all contestants take turns, matrix products before each.

    Returns "rounds": for each round a list of (milliseconds of a product, of the contestant) in
    the order of "names", which are those that did not fail; "failures" by name.
    """
    _prepare(arguments)
    failures: dict[str, str] = {}
    steps: dict[str, Callable[[], None]] = {}
    for name in arguments["names"]:
        with _noted(failures, name):
            steps[name] = _guarded(_warm_step(name, arguments), name, failures)
    product = _product(arguments)
    turns = [step for own in steps.values() for step in (product, own)]
    rounds = interleaved_times_ms(turns, arguments["rounds"], arguments["seconds"])
    names = [name for name in steps if name not in failures]
    places = [2 * place for place, name in enumerate(steps) if name in names]
    return {
        "names": names,
        "rounds": [
            [(one[place] / arguments["products"], one[place + 1]) for place in places]
            for one in rounds
        ],
        "failures": failures,
    }


def failure_line(error: Exception) -> str:
    """The first line of an error, with its type where the message alone could mislead."""
    first = (str(error).strip().splitlines() or [""])[0]
    if isinstance(error, NotOffered):
        return first
    if isinstance(error, MemoryError) or "allocate memory" in first or "out of memory" in first:
        return "out of memory"
    return f"{type(error).__name__}: {first}".removesuffix(": ")


def _prepare(arguments: dict[str, Any]) -> None:
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    if arguments["threads"]:
        torch.set_num_threads(arguments["threads"])


@contextmanager
def _noted(failures: dict[str, Any], key: str) -> Iterator[None]:
    """An error inside becomes failures[key]."""
    try:
        yield
    except Exception as error:
        failures[key] = failure_line(error)


def _function(contestant: Contestant) -> LossFunction:
    return contestant.build(CASES["random"].scale)


def _step(
    function: LossFunction, contestant: Contestant, arguments: dict[str, Any]
) -> Callable[[], None]:
    """Forward and backward on unrelated vectors, complete when it returns."""
    shape = (arguments[name] for name in ("batch_size", "width", "dtype", "device"))
    leaves = make_leaves(contestant.loss, CASES["random"], *shape)

    def step() -> None:
        outputs(function, leaves)
        _synchronize(arguments["device"])

    return step


def _guarded(step: Callable[[], None], name: str, failures: dict[str, str]) -> Callable[[], None]:
    """A step that is noted and left out from its first failure on."""

    def guarded() -> None:
        if name not in failures:
            with _noted(failures, name):
                step()

    return guarded


def _product(arguments: dict[str, Any]) -> Callable[[], None]:
    """The matrix product whose rate is the yardstick, "products" times: 4096 x D x 4096."""
    shape, device = (MATMUL_EDGE, arguments["width"]), arguments["device"]
    a, b = (torch.randn(shape).to(device, DTYPES[arguments["dtype"]]) for _ in range(2))
    out = torch.empty(MATMUL_EDGE, MATMUL_EDGE, dtype=a.dtype, device=device)

    def product() -> None:
        for _ in range(arguments["products"]):
            torch.mm(a, b.T, out=out)
        _synchronize(device)

    return product


def _warm_step(name: str, arguments: dict[str, Any]) -> Callable[[], None]:
    """After a small step, so that code, compiled code and thread pools are no part of this one."""
    contestant = find(arguments["loss"], name)
    function = _function(contestant)
    _step(function, contestant, {**arguments, "batch_size": _WARM_UP_BATCH})()
    return _step(function, contestant, arguments)


def _peak_growth(contestant: Contestant, arguments: dict[str, Any]) -> int:
    step = _warm_step(contestant.name, arguments)
    if arguments["device"] == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    _give_back_freed_memory()
    with PeakGrowth() as growth:
        step()
    return growth.bytes


def _give_back_freed_memory() -> None:
    """Freed memory that the allocator keeps is resident, and a step would grow into it unseen."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


# The command


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, or with --redraw read, then print the tables and write the files."""
    options = _parser().parse_args(arguments)
    _complete(options)
    options.results.mkdir(parents=True, exist_ok=True)
    stem = options.results / f"loss_{options.device}_{options.dtype}"
    if not options.redraw:
        measure(options, partial(write_results, origin=_origin(options), stem=stem))
    results, origin = read_results(stem), read_origin(stem)
    show(section(options.device, options.dtype)(options.results))
    for row in results.times:
        if row.batch_size == FULL_BATCH and row.status == MEASURED:
            rate = f"{row.share_of_matmul:.0%} of the rate of a matrix product"
            print(
                f"{row.contestant} at batch {FULL_BATCH:,}: {rate}, {row.milliseconds / 1e3:.1f} s"
            )
    for loss in TITLES:
        if (own := results.of(loss)).memory:
            for path in draw(loss, own, origin, stem.with_name(f"{stem.name}_{loss}")):
                print(path)


def _origin(options: argparse.Namespace) -> dict[str, str]:
    gpu = torch.cuda.get_device_name() if options.device == "cuda" else ""
    shown = {"device": options.device, "gpu": gpu, "used_threads": str(options.threads)}
    return {**shown, **provenance()}


def _complete(options: argparse.Namespace) -> None:
    """Values that depend on others; what the caller gave stays."""
    usual = {
        "losses": list(TITLES),
        "dtype": "bf16" if options.device == "cuda" else "fp32",
        "batches": [2048, 4096, 8192, 16384],
        "width": 256,
        "error_batch": 8192 if options.device == "cuda" else 2048,
        "time_batch": 8192,
        "time_width": 512,
        "rounds": 5,
        "threads": os.cpu_count() or 1,
        "jobs": 1,
    }
    for name, value in {**usual, **(_QUICK if options.quick else {})}.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    options.cap = int(options.cap_gib * 2**30) if options.cap_gib else int(0.8 * _free(options))


def _free(options: argparse.Namespace) -> int:
    if options.device == "cpu":
        return available_bytes() // options.jobs
    return torch.cuda.mem_get_info()[0]


def _parser() -> argparse.ArgumentParser:
    made = parser(__doc__)
    add = made.add_argument
    add("--losses", nargs="+", choices=TITLES, help="(all; clip with --quick)")
    add("--only", nargs="+", help="contestants whose names contain one of these, and ours")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="(default: %(default)s)")
    add("--dtype", choices=("fp32", "bf16", "fp16"), help="(fp32 on the CPU, bf16 on a GPU)")
    add("--batches", type=int, nargs="+", help="pairs, for memory (2048 4096 8192 16384)")
    add("--width", type=int, help="features a vector, for memory and errors (256)")
    add("--error-batch", type=int, help="pairs, for errors (2048 on the CPU, 8192 on a GPU)")
    add("--time-batch", type=int, help="pairs, for times; NT-Xent gets half everywhere (8192)")
    add("--time-width", type=int, help="features a vector, for times (512)")
    add("--rounds", type=int, help="timed rounds (5)")
    add("--seconds", type=float, default=900.0, help="no further round of a loss after this (900)")
    add("--timeout", type=float, default=1800.0, help="seconds until a process is ended (1800)")
    add("--threads", type=int, help="threads of torch (all cores)")
    add("--jobs", type=int, help="memory points at a time; times always run alone (1)")
    add("--cap-gib", type=float, help="memory a point may use; by default 80 %% of what is free")
    add("--quick", action="store_true", help="small batches, under a minute")
    add("--full", action="store_true", help=f"the CLIP loss at batch {FULL_BATCH:,}; minutes more")
    add("--redraw", action="store_true", help="measure nothing; show the CSVs of --results again")
    return made


if __name__ == "__main__":
    main()
