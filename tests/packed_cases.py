"""Rows with and without images on several ranks, beside one process with all of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from one_shot import twins, worst
from packed_inputs import Grid, LastToken, compute_in_double, vision_batch, vision_models
from strategy_steps import PlainClip, errors_of
from strategy_wraps import as_they_are, each_in_ddp, each_sharded
from torch import nn

from gradcache_clip import ClipLoss, GradCache, PackedPatches
from gradcache_clip.cache.batch_tree import take_rows
from gradcache_clip.distributed import AllReduceStrategy, DDPStrategy, FSDPStrategy

ROWS = 8
Rows = list[tuple[list[Grid], list[Grid], int]]
ONE: list[Grid] = [(1, 4, 4)]
TWO: list[Grid] = [(1, 2, 4), (1, 4, 2)]

# The second of two ranks has text alone; its tower of images still has to get the gradients.
ON_ONE_RANK: Rows = [(ONE, [], 3), ([], [], 5), (TWO, [], 2), ([], [], 2)] + [([], [], 4)] * 4
# As FSDP needs it: the same modules in every chunk.
ON_BOTH: Rows = [(ONE, [], 3), ([], [], 5), ([], [], 2), ([], [], 7)] * 2


def vision_language(
    name: str, rows: Rows, wrap: Callable[[list[nn.Module]], Any], strategy: Callable[[], Any]
) -> dict[str, Any]:
    encoder = LastToken(vision_models()[name]())
    compute_in_double(encoder, pytest.MonkeyPatch())
    ours, truth = twins(encoder.double(), nn.Sequential(nn.Linear(3, 32)).double())
    batch, numbers = vision_batch(rows, by_frame=name == "Qwen3-VL"), torch.randn(ROWS, 3).double()
    loss, true_loss = ClipLoss().double(), PlainClip().double()
    cache = GradCache(
        wrap(ours), loss, chunk_size=2, rows=[PackedPatches(), None], strategy=strategy()
    )
    own = ROWS // dist.get_world_size()
    start = dist.get_rank() * own
    cache(take_rows(PackedPatches()(batch), start, start + own), numbers[start : start + own])
    true_loss(truth[0](**batch), truth[1](numbers)).backward()
    sides = nn.ModuleList([*ours, loss]), nn.ModuleList([*truth, true_loss])
    parameter, error = worst(errors_of(*sides))
    return {"error": error, "parameter": parameter}


def packed_cases() -> dict[str, Any]:
    cases = {}
    for name in ("Qwen2.5-VL", "Qwen3-VL"):
        case = partial(vision_language, name)
        cases[f"{name}, AllReduce"] = partial(case, ON_ONE_RANK, as_they_are, AllReduceStrategy)
        cases[f"{name}, DDP"] = partial(case, ON_ONE_RANK, each_in_ddp, DDPStrategy)
        cases[f"{name}, FSDP"] = partial(case, ON_BOTH, each_sharded, FSDPStrategy)
    return cases
