"""Processes over gloo that take the steps of many cases one after another."""

from __future__ import annotations

import json
import os
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from gloo_processes import ON_THE_CPU, forkserver
from property_cases import Case
from property_runs import run

Mutation = Callable[[], AbstractContextManager[object]]


def outcomes(
    cases: Sequence[Case],
    world: int,
    folder: Path,
    *,
    mutation: Mutation = nullcontext,
    checks: bool = True,
    until_wrong: bool = False,
    patience_s: float = 30.0,
) -> list[str]:
    """By case what `run` says; an error that is none of ours is the last."""
    forkserver()
    arguments = cases, world, folder, mutation, checks, until_wrong, patience_s
    try:
        mp.start_processes(_run, arguments, nprocs=world, start_method="forkserver")
    except Exception as error:
        (folder / "ended").write_text(str(error))
    lines = folder / "outcomes"
    found = lines.read_text().splitlines() if lines.exists() else []
    failures = [path.read_text() for path in sorted(folder.glob("failure-*"))]
    if not failures and (folder / "ended").exists():
        failures = [(folder / "ended").read_text()]
    return [*map(json.loads, found), *(["crash: " + "\n".join(failures)] if failures else [])]


def _run(
    rank: int,
    cases: Sequence[Case],
    world: int,
    folder: Path,
    mutation: Mutation,
    checks: bool,
    until_wrong: bool,
    patience_s: float,
) -> None:
    warnings.simplefilter("ignore")
    # What a launcher would set, and DeepSpeed asks for.
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world}
    os.environ.update(ON_THE_CPU, **{name: str(value) for name, value in places.items()})
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=patience_s),
    )
    try:
        with mutation():
            _take(cases, rank, folder, checks, until_wrong)
        # A rank that leaves early resets the connections of those that are still busy.
        dist.barrier()
    except BaseException:
        (folder / f"failure-{rank}").write_text(f"rank {rank}: {traceback.format_exc(limit=-6)}")
        raise
    finally:
        dist.destroy_process_group()


def _take(cases: Sequence[Case], rank: int, folder: Path, checks: bool, until_wrong: bool) -> None:
    for case in cases:
        outcome = run(case, checks=checks)
        if rank == 0:
            with (folder / "outcomes").open("a") as lines:
                lines.write(json.dumps(outcome) + "\n")
        if until_wrong and outcome.startswith("wrong"):
            return
