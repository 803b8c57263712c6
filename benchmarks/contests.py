"""Contestants of a loss beside each other: memory and errors first, then times of all that fit."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from contestant_process import measure_point, measure_times
from contestants import Contestant, Task
from fresh_process import Limits, call_in_fork
from results import read_csv, read_rows, write_rows

MEASURED, OVER_CAP, _NOT_TIMED = "measured", "over cap", "not timed"
_NAN = math.nan


@dataclass(frozen=True)
class Contest:
    """One loss, and the sizes at which its contestants meet."""

    task: Task
    sizes: tuple[int, ...]
    """Batches for memory; the first that does not fit is the last tried."""
    ours: str
    """Contestant with which the others are compared."""
    timed: Task
    """For times; may be wider."""
    time_size: int
    widening: float = 1.0
    """Memory of a timed step over that of a measured one."""


@dataclass(frozen=True)
class Turns:
    """Milliseconds of one contestant in the rounds of all."""

    status: str
    """"measured", or why not."""
    steps: tuple[float, ...] = ()
    ours: tuple[float, ...] = ()
    """Of ours in the same rounds; nothing if that failed."""
    products: tuple[float, ...] = ()
    """Of the matrix product before each step."""

    def milliseconds(self) -> float:
        return median(self.steps)

    def ratios(self) -> list[float]:
        """Over ours; a ratio is taken within a round."""
        return [a / b for a, b in zip(self.steps, self.ours, strict=False)]


@dataclass
class Found:
    """What was measured of one contestant."""

    contest: Contest
    contestant: Contestant
    memory: dict[int, tuple[str, float]] = field(default_factory=dict)
    """By size: a status and bytes."""
    errors: dict[str, tuple[str, dict[str, float]]] = field(default_factory=dict)
    """By case: a status and errors by output."""
    turns: dict[int, Turns] = field(default_factory=dict)
    """By size."""

    def status(self) -> str:
        """Of all that is measured together: the first failure counts."""
        timed = self.turns.get(self.contest.time_size, Turns(_NOT_TIMED))
        every = [*self.memory.values(), *self.errors.values(), (timed.status, {})]
        return next((status for status, _ in every if status != MEASURED), MEASURED)

    def values(self) -> dict[str, float]:
        """Memory, time and errors where there is one size and one case; nothing after a failure."""
        if self.status() != MEASURED:
            return {}
        size = self.contest.time_size
        turns, (_, errors) = self.turns[size], self.errors[""]
        return {
            "memory_bytes": self.memory[size][1],
            "milliseconds": turns.milliseconds(),
            "time_ratio": median(turns.ratios() or [_NAN]),
            **errors,
        }

    def largest(self) -> tuple[int, float] | None:
        """Size and bytes of the largest step that ran."""
        ran = [(size, held) for size, (status, held) in self.memory.items() if status == MEASURED]
        return ran[-1] if ran else None


def points(contest: Contest, contestant: Contestant, options: argparse.Namespace) -> Found:
    """Memory at growing sizes until one would not fit, errors beside the first of them.

    Args:
        options: of the command: `cap`, `timeout`, `threads`.
    """
    found, task = Found(contest, contestant), contest.task
    if obstacle := contestant.obstacle(task.device):
        found.memory[contest.sizes[0]] = obstacle, _NAN
        return found
    # CUDA reserves address space far beyond what it uses.
    data_bytes = None if task.device == "cuda" else options.cap
    limits = Limits(options.timeout, data_bytes, options.threads)
    sizes = [size for size in contest.sizes if size <= contestant.largest]
    for size in sizes or [contestant.largest]:
        if (before := found.largest()) and predicted_bytes(*before, size) > options.cap:
            found.memory[size] = OVER_CAP, _NAN
        else:
            _measure(found, size, limits)
        if found.memory[size][0] != MEASURED:
            break
    return found


def _measure(found: Found, size: int, limits: Limits) -> None:
    """Add memory at a size, with errors if it is the first."""
    given = found.contest.task, found.contestant.name, size, not found.memory
    outcome = call_in_fork(measure_point, given, limits)
    failure = outcome.failure or outcome.values.get("memory_failure", "")
    found.memory[size] = failure or MEASURED, outcome.values.get("memory", _NAN)
    for case, errors in outcome.values.get("errors", {}).items():
        found.errors[case] = MEASURED, errors
    for case, line in outcome.values.get("error_failures", {}).items():
        found.errors[case] = line, {}


def fitting(contest: Contest, every: Sequence[Found], options: argparse.Namespace) -> list[Found]:
    """Those that ran and would fit at the size of the times; the turns of others say so.

    Args:
        options: of the command: `cap`.
    """
    size, chosen = contest.time_size, []
    for each in every:
        if largest := each.largest():
            held = predicted_bytes(*largest, size) * contest.widening
            if size <= each.contestant.largest and held <= options.cap:
                chosen.append(each)
            else:
                each.turns[size] = Turns(OVER_CAP)
    return chosen


def predicted_bytes(size: int, held: float, other: int) -> float:
    """Memory at another size if all of it grows with the square: never too little."""
    return held * (other / size) ** 2


def take_turns(
    contest: Contest,
    every: Sequence[Found],
    size: int,
    options: argparse.Namespace,
    *,
    products: int = 1,
    seconds: float = 0.0,
) -> None:
    """Time them at this size, in one process.

    Args:
        options: of the command: `timeout`, `threads`, `rounds`, `seconds`.
        seconds: in place of those of the command.
    """
    names = [each.contestant.name for each in every]
    limits = Limits(options.timeout * max(1, len(names)), None, options.threads)
    given = contest.timed, names, size, options.rounds, seconds or options.seconds, products
    outcome = call_in_fork(measure_times, given, limits)
    steps, failures = outcome.values.get("steps", {}), outcome.values.get("failures", {})
    for name, each in zip(names, every, strict=True):
        if name in steps:
            own = steps.get(contest.ours, ())
            each.turns[size] = Turns(MEASURED, steps[name], own, outcome.values["products"][name])
        else:
            each.turns[size] = Turns(outcome.failure or failures[name])


# Results of losses that are measured at one size: a file, with a row for each contestant


def file(stem: str, results: Path, device: str = "cpu", dtype: str = "fp32") -> Path:
    """Fp32 on the CPU has the plain name."""
    end = "" if (device, dtype) == ("cpu", "fp32") else f"_{device}_{dtype}"
    return results / f"{stem}{end}.csv"


def write_file(
    kind: type[Any],
    stem: str,
    found: Iterable[Found],
    options: argparse.Namespace,
    origin: Mapping[str, str],
) -> None:
    """Write rows that begin with loss, size, contestant, version and status."""
    rows = [
        kind(
            *(each.contest.task.title, each.contest.time_size),
            *(each.contestant.name, each.contestant.version(), each.status()),
            **each.values(),
        )
        for each in found
    ]
    path = file(stem, options.results, options.device, options.dtype)
    write_rows(kind, rows, path, {"dtype": options.dtype, **origin})


def read_file(kind: type[Any], path: Path) -> tuple[list[Any], str]:
    """The rows, and where they were measured, such as "fp32, 2 threads"."""
    origin = read_csv(path)[0]
    device = origin.get("gpu") or threads(origin.get("used_threads", "1"))
    return read_rows(kind, path), f"{origin.get('dtype', 'fp32')}, {device}"


def threads(count: str) -> str:
    """Example:
    >>> threads("1"), threads("2")
    ('one thread', '2 threads')
    """
    return "one thread" if count == "1" else f"{count} threads"
