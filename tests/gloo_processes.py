"""Processes over gloo that fork from a server which has imported what any of them needs."""

from __future__ import annotations

import gc
import multiprocessing
import multiprocessing.forkserver
import os
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.context import ForkServerContext
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Sharding would look for a device.
ON_THE_CPU = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
# Ranks that wait for a collective that others never reach fail, and do not hang.
PATIENCE = timedelta(seconds=60)


def forkserver() -> ForkServerContext:
    """One server for all tests of a process: the first call starts it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rank_imports"])
    # The server looks for modules where it is told here; ranks look where this process does.
    path = os.pathsep.join(sys.path)
    # It keeps the environment of its first use.
    with mock.patch.dict(os.environ, ON_THE_CPU, PYTHONPATH=path):
        multiprocessing.forkserver.ensure_running()
    return context


def start(
    check: Callable[..., object],
    world: int,
    *arguments: Any,
    patience: timedelta = PATIENCE,
    start_method: str = "forkserver",
) -> None:
    """Call `check(*arguments)` on every rank; raise what the first one raises."""
    if start_method == "forkserver":
        forkserver()
    # Held here, at a port that is free. A store in a file would be asked every 10 ms, not woken.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    given = world, store.port, patience, check, arguments
    mp.start_processes(_run, given, nprocs=world, start_method=start_method)


def _run(
    rank: int,
    world: int,
    port: int,
    patience: timedelta,
    check: Callable[..., object],
    arguments: tuple[Any, ...],
) -> None:
    warnings.simplefilter("ignore")
    # What a launcher would set, and DeepSpeed asks for.
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world}
    os.environ.update(ON_THE_CPU, **{name: str(value) for name, value in places.items()})
    torch.set_num_threads(1)
    # DeepSpeed collects garbage for each engine: what is imported by now is none.
    gc.freeze()
    store = dist.TCPStore("127.0.0.1", port, timeout=patience)
    options = {"rank": rank, "world_size": world, "timeout": patience}
    dist.init_process_group("gloo", store=store, **options)
    try:
        check(*arguments)
        # A rank that leaves early resets the connections of those that are still busy.
        dist.barrier()
    finally:
        # An exception's traceback keeps DDP alive, and DDP its process group, whose threads would
        # still run when the process ends.
        gc.collect()
        dist.destroy_process_group()
