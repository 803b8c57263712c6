"""Contestants of one task: each measured in a fresh process, then all timed in turns."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import Any, TypeVar

from fresh_process import Limits, call_in_fresh_process, median_ratio
from results import installed

Row = TypeVar("Row", bound=Any)
Measure = Callable[[dict[str, Any]], dict[str, Any]]


def compared(
    row_of: Callable[..., Row],
    packages: Mapping[str, str],
    measure_point: Measure,
    measure_times: Measure,
    shared: dict[str, Any],
    options: argparse.Namespace,
) -> Iterator[Row]:
    """Yield a row for each contestant; the first is the one that times are divided by.

    Args:
        row_of: makes a row from contestant, version, status and what `measure_point` returns. Its
            status is "measured", or why not.
        packages: which package each contestant comes from.
        measure_point: called with `shared` and "name"; may return its "failure" alone.
        measure_times: called with `shared`, "names", "rounds" and "seconds"; returns "rounds", of
            milliseconds of each name.
        options: of the command: `rounds`, `seconds`, `threads`.
    """
    limits = Limits(seconds=1800, threads=options.threads)
    rows: dict[str, Row] = {}
    for name, package in packages.items():
        rows[name] = _measured(row_of, name, installed(package), measure_point, shared, limits)
    names = [name for name, row in rows.items() if row.status == "measured"]
    given = {**shared, "names": names, "rounds": options.rounds, "seconds": options.seconds}
    rounds = call_in_fresh_process(measure_times, given, limits).values["rounds"]
    times = dict(zip(names, zip(*rounds, strict=True), strict=True))
    for name, row in rows.items():
        yield row if name not in times else _timed(row, times[name], times[names[0]])


def _measured(
    row_of: Callable[..., Row], name: str, version: str, measure: Measure,
    shared: dict[str, Any], limits: Limits,
) -> Row:  # fmt: skip
    if not version:
        return row_of(name, version, "not installed")
    found = call_in_fresh_process(measure, {**shared, "name": name}, limits)
    if failure := found.failure or found.values.get("failure", ""):
        return row_of(name, version, failure)
    return row_of(name, version, "measured", **found.values)


def _timed(row: Row, times: Sequence[float], of_first: Sequence[float]) -> Row:
    ratio = median_ratio(times, of_first)
    return replace(row, milliseconds=median(times), time_ratio=ratio)
