"""Processes over gloo that run many cases one after another and write down what came of each."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from gloo_processes import start

Case = Callable[[], dict[str, Any]]
"""Runs on every rank; what rank 0 returns is written down."""


def run_cases(cases: Mapping[str, Case], world: int, folder: Path) -> dict[str, Any]:
    """Results by case; those after a failure are missing, and the failure says why."""
    failure = None
    try:
        start(_run, world, dict(cases), folder)
    except Exception as error:
        failure = str(error)
    found = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    return {"failure": failure, **found}


def result_of(results: Mapping[str, Any], case: str) -> dict[str, Any]:
    """What a case returned; fails the test where it did not get that far."""
    if case not in results:
        pytest.fail(results["failure"] or f"{case} was not run")
    return results[case]


def _run(cases: Mapping[str, Case], folder: Path) -> None:
    for name, case in cases.items():
        torch.manual_seed(0)
        try:
            result = case()
        except BaseException as error:
            rank = dist.get_rank()
            raise RuntimeError(f"{name} on rank {rank}: {traceback.format_exc()}") from error
        if dist.get_rank() == 0:
            (folder / f"{name}.json").write_text(json.dumps(result))
    # A rank that leaves early resets the connections of those that are still busy.
    dist.barrier()
