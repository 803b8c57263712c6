"""What is measured of contestants, each function in a process of its own."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from contestants import Contestant, NotOffered, Task
from fresh_process import PeakGrowth, interleaved_times_ms


def measure_point(task: Task, name: str, size: int, with_errors: bool) -> dict[str, Any]:
    """Growth of peak memory over the inputs and, if asked, the errors of every case.

    Returns "memory", a number of bytes, or "memory_failure"; "errors" by case and output, or
    "error_failures" by case.
    """
    _prepare()
    contestant = task.find(name)
    results: dict[str, Any] = {"errors": {}, "error_failures": {}}
    with _noted(results, "memory_failure"):
        results["memory"] = _peak_growth(task, contestant, size)
    for case in task.cases if with_errors else ():
        with _noted(results["error_failures"], case):
            results["errors"][case] = task.errors(contestant, case)
    return results


def measure_times(
    task: Task, names: Sequence[str], size: int, rounds: int, seconds: float, products: int
) -> dict[str, Any]:
    """Rounds in which all contestants take turns, matrix products before each.

    Returns "steps" and "products": milliseconds of every round by name, of those that did not fail;
    "failures" by name.
    """
    _prepare()
    failures: dict[str, str] = {}
    steps: dict[str, Callable[[], None]] = {}
    for name in names:
        with _noted(failures, name):
            steps[name] = _guarded(_warm_step(task, task.find(name), size), name, failures)
    product = task.product(products) or (lambda: None)
    turns = [turn for own in steps.values() for turn in (product, own)]
    columns = list(zip(*interleaved_times_ms(turns, rounds, seconds), strict=True))
    right = {name: place for place, name in enumerate(steps) if name not in failures}
    return {
        "steps": {name: columns[2 * place + 1] for name, place in right.items()},
        "products": {
            name: [each / products for each in columns[2 * place]] for name, place in right.items()
        },
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


def _prepare() -> None:
    warnings.simplefilter("ignore")
    torch.manual_seed(0)


@contextmanager
def _noted(failures: dict[str, Any], key: str) -> Iterator[None]:
    """An error inside becomes failures[key]."""
    try:
        yield
    except Exception as error:
        failures[key] = failure_line(error)


def _warm_step(task: Task, contestant: Contestant, size: int) -> Callable[[], None]:
    """A step that is complete when it returns, after one at a small size."""
    step = task.step(contestant)

    def complete(inputs: Any) -> None:
        step(inputs)
        if task.device == "cuda":
            torch.cuda.synchronize()

    complete(task.inputs(task.small))
    return partial(complete, task.inputs(size))


def _guarded(step: Callable[[], None], name: str, failures: dict[str, str]) -> Callable[[], None]:
    """A step that is noted and left out from its first failure on."""

    def guarded() -> None:
        if name not in failures:
            with _noted(failures, name):
                step()

    return guarded


def _peak_growth(task: Task, contestant: Contestant, size: int) -> int:
    step = _warm_step(task, contestant, size)
    if task.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with PeakGrowth() as growth:
        step()
    return growth.bytes
