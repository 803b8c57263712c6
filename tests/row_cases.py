"""Encoders whose rows depend on each other on one rank, under every strategy; on every rank."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import strategy_steps as steps
import torch
import torch.distributed as dist
from deepspeed_cases import engine_for
from strategy_wraps import as_they_are, each_in_ddp, each_sharded
from torch import Tensor, nn

from gradcache_clip import ClipLoss, GradCache
from gradcache_clip.distributed import (
    AllReduceStrategy,
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
)


class Centres(nn.Module):
    """Subtracts the mean of its rows where the first of them asks for it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, rows: Tensor) -> Tensor:
        features = self.inner(rows)
        return features - features.mean(0) if bool((rows[:, 0] > 50).any()) else features


def centring() -> list[nn.Module]:
    return [Centres(tower) for tower in steps.two_towers()]


def rows_that_ask(on: int) -> list[Tensor]:
    inputs = steps.rows_of(dist.get_rank(), steps.global_batch(0))
    if dist.get_rank() == on:
        inputs[1][:, 0] = 100
    return inputs


def refused_on_every_rank(
    wrap: Callable[[list[nn.Module]], Any],
    strategy: Callable[[], Any],
    *,
    on: int,
    chunk: int,
) -> dict[str, Any]:
    """All raise, the rank whose rows mix with the place; a batch that does not ask may follow."""
    encoders = [encoder.double() for encoder in centring()]
    cache = GradCache(wrap(encoders), ClipLoss().double(), chunk_size=chunk, strategy=strategy())
    message = refusal(on, r"encoder 1 \(\w+\)")
    with pytest.raises(ValueError, match=message):
        cache(*rows_that_ask(on))
    assert all(p.grad is None for p in nn.ModuleList(encoders).parameters())
    cache(*rows_that_ask(-1))
    assert all(p.grad is not None for p in nn.ModuleList(encoders).parameters())
    return {}


def refusal(on: int, name: str) -> str:
    if dist.get_rank() == on:
        return rf"{name}: expected features of a row that do not depend on .*change by"
    return rf"{name}: expected .* got another rank where they do, whose error says where"


def refused_under_zero(stage: int, *, on: int, chunk: int) -> dict[str, Any]:
    engine = engine_for(steps.OneModule(centring()).float(), stage)
    strategy = DeepSpeedStrategy(engine)
    cache = GradCache(engine, ClipLoss(), chunk_size=chunk, strategy=strategy)
    with pytest.raises(ValueError, match=refusal(on, r"encoder 1 \(\w+\)")):
        cache(*(rows.float() for rows in rows_that_ask(on)))
    cache(*(rows.float() for rows in rows_that_ask(-1)))
    engine.step()
    return {}


def products(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum()


def one_rank_has_single_rows() -> dict[str, Any]:
    """One pass there, two elsewhere, would wait for each other under FSDP."""
    encoders = each_sharded([encoder.double() for encoder in steps.two_towers()])
    # Two chunks on every rank, of one row and of two.
    size = 1 if dist.get_rank() == 0 else 2
    few = [rows[: 2 * size] for rows in rows_that_ask(-1)]
    cache = GradCache(encoders, products, chunk_size=size, strategy=FSDPStrategy())
    cache(*few)
    assert torch.stack([p.grad.full_tensor().norm() for p in encoders[0].parameters()]).all()
    return {}


def row_cases() -> dict[str, Any]:
    gathered = partial(FSDPStrategy, keep_gathered=True)
    ways: dict[str, tuple[Any, Any]] = {
        "AllReduce": (as_they_are, AllReduceStrategy),
        "DDP": (each_in_ddp, DDPStrategy),
        "FSDP": (each_sharded, FSDPStrategy),
        "FSDP, gathered": (each_sharded, gathered),
    }
    cases: dict[str, Any] = {}
    for name, way in ways.items():
        for chunk in (4, 1):
            on = len(cases) % 2
            case = partial(refused_on_every_rank, *way, on=on, chunk=chunk)
            cases[f"{name}: rank {on}, chunk size {chunk}"] = case
    for stage in (1, 3):
        cases[f"ZeRO-{stage}"] = partial(refused_under_zero, stage, on=stage // 2, chunk=4)
    cases["FSDP: single rows on one rank"] = one_rank_has_single_rows
    return cases
