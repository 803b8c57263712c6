"""Processes over gloo that run many cases one after another and write down what came of each."""

from __future__ import annotations

import json
import os
import traceback
import warnings
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

Case = Callable[[], dict[str, Any]]
"""Runs on every rank; what rank 0 returns is written down."""

# Ranks that wait for a collective that others never reach must fail, not hang.
TIMEOUT = timedelta(seconds=60)


def run_cases(cases: Mapping[str, Case], world: int, folder: Path) -> dict[str, Any]:
    """Results by case; those after a failure are missing, and the failure says why."""
    try:
        mp.spawn(_run, (dict(cases), world, folder), nprocs=world)
    except Exception as error:
        (folder / "failure.txt").write_text(str(error))
    failure = folder / "failure.txt"
    found = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    return {"failure": failure.read_text() if failure.exists() else None, **found}


def result_of(results: Mapping[str, Any], case: str) -> dict[str, Any]:
    """What a case returned; fails the test where it did not get that far."""
    if case not in results:
        pytest.fail(results["failure"] or f"{case} was not run")
    return results[case]


def _run(rank: int, cases: Mapping[str, Case], world: int, folder: Path) -> None:
    warnings.simplefilter("ignore")
    # Sharding would look for a device; the others a launcher would set, and DeepSpeed asks for.
    os.environ.update(
        CUDA_VISIBLE_DEVICES="", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world)
    )
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world,
        timeout=TIMEOUT,
    )
    try:
        for name, case in cases.items():
            torch.manual_seed(0)
            try:
                result = case()
            except BaseException as error:
                raise RuntimeError(f"{name} on rank {rank}: {traceback.format_exc()}") from error
            if rank == 0:
                (folder / f"{name}.json").write_text(json.dumps(result))
        # A rank that leaves early resets the connections of those that are still busy.
        dist.barrier()
    finally:
        dist.destroy_process_group()
