"""What loss.py measures in a fresh process: memory and errors of one contestant, times of many."""

from __future__ import annotations

import ctypes
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from fresh_process import PeakGrowth, interleaved_times_ms
from loss_peers import Contestant, LossFunction, NotOffered, find
from loss_truth import CASES, DTYPES, Case, make_leaves, outputs, relative_errors, truth

MATMUL_EDGE = 4096
_WARM_UP_BATCH = 128


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
