"""Hooks on gradients under every strategy; on every rank."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import strategy_steps as steps
import torch
from deepspeed_cases import engine_for
from strategy_wraps import as_they_are, each_in_ddp, each_sharded, one_in_ddp, one_root
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

from gradcache_clip import ClipLoss, GradCache
from gradcache_clip.distributed import (
    AllReduceStrategy,
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
)

CHUNK, STEPS = 3, 3


def scaled(gradient: Tensor) -> Tensor:
    """Not linear, so that it tells parts, and shares of ranks, from a whole gradient."""
    return gradient * gradient.abs()


def looked_at(gradient: Tensor) -> None:
    pass


def in_ddp_with_views(encoders: list[nn.Module]) -> list[nn.Module]:
    return [DDP(encoder, gradient_as_bucket_view=True) for encoder in encoders]


def steps_with_hooks(
    wrap: Callable[[list[nn.Module]], Any],
    strategy: Callable[[], Any],
    *,
    earlier: bool = False,
    optimizer_in_hook: bool = True,
    hook: Callable[[Tensor], Tensor | None] = scaled,
) -> dict[str, Any]:
    """Weights after optimizer steps in hooks, beside one process and one graph."""
    ours = [encoder.double() for encoder in steps.two_towers()]
    truth = list(copy.deepcopy(nn.ModuleList(ours)))
    loss, true_loss = ClipLoss().double(), steps.PlainClip().double()
    wrapped = wrap(ours)
    for encoders in (ours, truth):
        for parameter in nn.ModuleList(encoders).parameters():
            parameter.register_hook(hook)
            if optimizer_in_hook:
                step_in_hook(parameter, keep=earlier)
    cache = GradCache(wrapped, loss, chunk_size=CHUNK, strategy=strategy(), gradient_hooks="once")
    rank = torch.distributed.get_rank()
    for step in range(STEPS):
        inputs = steps.global_batch(step)
        cache(*steps.rows_of(rank, inputs))
        true_loss(*(tower(x) for tower, x in zip(truth, inputs, strict=True))).backward()
        if step == 0:
            # DDP makes its buckets anew after the first step.
            nn.ModuleList([*ours, *truth]).zero_grad()
    pairs = zip(nn.ModuleList(ours).parameters(), nn.ModuleList(truth).parameters(), strict=True)
    what = (lambda p: p.detach()) if optimizer_in_hook else (lambda p: p.grad)
    errors = [float((whole(what(a)) - what(b)).norm() / what(b).norm()) for a, b in pairs]
    return {"error": max(errors)}


def step_in_hook(parameter: nn.Parameter, *, keep: bool) -> None:
    optimizer = torch.optim.AdamW([parameter], lr=0.05)

    def take(p: nn.Parameter) -> None:
        optimizer.step()
        if not keep:
            p.grad = None

    parameter.register_post_accumulate_grad_hook(take)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def wrappers_are_not_refused(
    wrap: Callable[[list[nn.Module]], Any], strategy: Callable[[], Any]
) -> dict[str, Any]:
    ours = [encoder.double() for encoder in steps.two_towers()]
    cache = GradCache(wrap(ours), ClipLoss().double(), chunk_size=CHUNK, strategy=strategy())
    rank = torch.distributed.get_rank()
    for step in range(2):
        cache(*steps.rows_of(rank, steps.global_batch(step)))
    next(ours[1].parameters()).register_hook(scaled)
    with pytest.raises(ValueError, match="gradient_hooks: expected .*with the hook scaled of hook"):
        cache(*steps.rows_of(rank, steps.global_batch(2)))
    return {}


def under_deepspeed(stage: int) -> dict[str, Any]:
    """Its own hooks are accepted; the caller's are not, but for those that want parts."""
    engine = engine_for(steps.OneModule(steps.two_towers()), stage)
    rank = torch.distributed.get_rank()
    inputs = [rows.float() for rows in steps.rows_of(rank, steps.global_batch(0))]
    under_it = partial(
        GradCache, engine, ClipLoss(), chunk_size=CHUNK, strategy=DeepSpeedStrategy(engine)
    )
    cache = under_it()
    cache(*inputs)
    engine.step()
    next(engine.module.parameters()).register_hook(scaled)
    with pytest.raises(ValueError, match="gradient_hooks: expected parameters without hooks"):
        cache(*inputs)
    message = 'expected "every_chunk" or no hooks under DeepSpeedStrategy.*the hook scaled'
    with pytest.raises(ValueError, match=message):
        under_it(gradient_hooks="once")(*inputs)
    return {}


def hook_cases() -> dict[str, Any]:
    gathered = partial(FSDPStrategy, keep_gathered=True)
    ways: dict[str, tuple[Any, Any]] = {
        "AllReduce": (as_they_are, AllReduceStrategy),
        "AllReduce, one module": (steps.OneModule, AllReduceStrategy),
        "DDP": (each_in_ddp, DDPStrategy),
        "DDP, bucket views": (in_ddp_with_views, DDPStrategy),
        "DDP, one module": (one_in_ddp, DDPStrategy),
        "FSDP": (each_sharded, FSDPStrategy),
        "FSDP, one root": (one_root, FSDPStrategy),
        "FSDP, gathered": (each_sharded, gathered),
    }
    cases: dict[str, Any] = {}
    for name, way in ways.items():
        cases[f"{name}: optimizer"] = partial(steps_with_hooks, *way)
        cases[f"{name}: optimizer, earlier gradients"] = partial(
            steps_with_hooks, *way, earlier=True
        )
        cases[f"{name}: accumulated"] = partial(steps_with_hooks, *way, optimizer_in_hook=False)
        cases[f"{name}: refused"] = partial(wrappers_are_not_refused, *way)
    # Gradients that hooks leave alone stay views of buckets, which the next step fills.
    cases["DDP, bucket views: looked at"] = partial(
        steps_with_hooks, *ways["DDP, bucket views"], optimizer_in_hook=False, hook=looked_at
    )
    for stage in range(4):
        cases[f"ZeRO-{stage}"] = partial(under_deepspeed, stage)
    return cases
