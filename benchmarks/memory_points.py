"""The training steps that memory_vs_batch.py measures, and one measurement of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from engine_contestants import Step
from engine_models import Workload, rows_of
from fresh_process import PeakGrowth, interleaved_times_ms
from memory_methods import METHODS
from memory_models import SIZES, ModelSize, build_encoders, make_inputs
from torch import nn


def measure_memory(arguments: dict[str, Any]) -> dict[str, Any]:
    """Growth of peak resident memory over model, optimizer, inputs and steps; time of a step."""
    warnings.simplefilter("ignore")
    size, method = SIZES[arguments["size"]], arguments["method"]
    _load_libraries(size, method)
    with PeakGrowth() as growth:
        steps = make_steps([method], size, arguments["batch_size"], arguments["chunk_size"])
        rounds = interleaved_times_ms(steps, arguments["steps"], arguments["seconds"])
    return {
        "peak_growth_bytes": growth.bytes,
        "step_ms": median(duration for (duration,) in rounds),
        "steps": len(rounds),
    }


def measure_pair(arguments: dict[str, Any]) -> dict[str, Any]:
    """Plain and cached steps that take turns in one process: the median ratio of their times."""
    warnings.simplefilter("ignore")
    shape = SIZES[arguments["size"]], arguments["batch_size"], arguments["chunk_size"]
    steps = make_steps(["plain", "cached"], *shape)
    rounds = interleaved_times_ms(steps, arguments["steps"], arguments["seconds"])
    return {"cached_over_plain_time": median(cached / plain for plain, cached in rounds)}


def make_steps(
    methods: Sequence[str], size: ModelSize, batch_size: int, chunk_size: int
) -> list[Callable[[], None]]:
    """One step of each method on the same model, inputs and optimizer: gradients, then AdamW."""
    torch.manual_seed(0)
    checkpointed = any(METHODS[name].checkpointed for name in methods)
    encoders = build_encoders(size, checkpointed=checkpointed)
    work = Workload(encoders, make_inputs(size, batch_size))
    optimizer = torch.optim.AdamW(nn.ModuleList(encoders).parameters(), lr=1e-4)
    # Two pairs make the optimizer's states, which then stand in memory from the first step on.
    few = Workload(encoders, tuple(rows_of(given, slice(2)) for given in work.inputs))
    _with_update(METHODS["plain"].make(few, 2), optimizer)()
    return [_with_update(METHODS[name].make(work, chunk_size), optimizer) for name in methods]


def _with_update(gradients: Step, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    def step() -> None:
        gradients()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _load_libraries(size: ModelSize, method: str) -> None:
    """Import what a step imports on its way; code is no part of a step's memory."""
    if size.image:
        import timm  # noqa: F401
        from transformers import BertConfig, BertModel  # noqa: F401
    for step in make_steps([method], SIZES["mlp"], 2, 1):
        step()
