"""Towers whose rows decide which parameters they use, under every strategy; on every rank."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import strategy_steps as steps
import torch
import torch.distributed as dist
from deepspeed_cases import LR, engine_for, weights_of
from one_shot import worst
from strategy_wraps import as_they_are, each_in_ddp, each_sharded, one_in_ddp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

from gradcache_clip import ClipLoss, GradCache
from gradcache_clip.distributed import (
    AllReduceStrategy,
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
)

ROWS, WIDTH, CHUNK = 24, 6, 3
WIDTHS = (WIDTH, WIDTH)


class WithImages(nn.Module):
    """A text tower that runs an image tower for chunks with images, and has an unused weight.

    A row has an image where its first column is 1. With `always` the image tower runs for every
    chunk, and its output is used for those alone; with `frozen` the text tower is not trained.
    """

    def __init__(self, *, always: bool = False, frozen: bool = False) -> None:
        super().__init__()
        self.text, self.never = nn.Linear(WIDTH, 8), nn.Parameter(torch.ones(3))
        self.text.requires_grad_(not frozen)
        self.image = nn.Sequential(nn.Linear(WIDTH, 8), nn.GELU(), nn.Linear(8, 8))
        self.always = always

    def forward(self, rows: Tensor) -> Tensor:
        text, has_image = self.text(rows), rows[:, :1] == 1
        image = self.image(rows) if self.always or bool(has_image.any()) else None
        return text + has_image * image if image is not None and bool(has_image.any()) else text


def towers(tied: bool, **options: Any) -> list[nn.Module]:
    torch.manual_seed(7)
    first = WithImages(**options).double()
    return [first, first if tied else WithImages(**options).double()]


# Rows with an image, of each input. Every rank has 24 / W rows, in chunks of three.
PATTERNS: dict[str, tuple[Iterable[int], Iterable[int]]] = {
    "not in the last chunk": ((0, 12), (1, 13)),
    "on the first rank alone": ((0, 4), (2,)),
    "on the last rank's last chunk": ((23,), (22,)),
    "in one input": (range(0, 24, 3), ()),
    "in the other, on the last rank": ((), (23,)),
    "nowhere": ((), ()),
    "everywhere": (range(24), range(24)),
}


def batch(step: int, pattern: str) -> list[Tensor]:
    inputs = steps.global_batch(step, WIDTHS, rows=ROWS)
    for rows, images in zip(inputs, PATTERNS[pattern], strict=True):
        rows[:, 0] = 0
        rows[list(images), 0] = 1
    return inputs


def rows_of_rank(inputs: Iterable[Tensor]) -> list[Tensor]:
    local = ROWS // dist.get_world_size()
    return [rows[dist.get_rank() * local :][:local] for rows in inputs]


def steps_of_all_patterns(
    wrap: Callable[[list[nn.Module]], Any],
    strategy: Callable[[], Any],
    *,
    tied: bool,
    **options: Any,
) -> dict[str, Any]:
    """One optimizer step for each pattern: gradients beside one process and one graph."""
    ours = towers(tied, **options)
    truth = list(copy.deepcopy(nn.ModuleList(ours)))
    loss, true_loss = ClipLoss().double(), steps.PlainClip().double()
    cache = GradCache(wrap(ours), loss, chunk_size=CHUNK, strategy=strategy())
    sides = [nn.ModuleList([*ours, loss]), nn.ModuleList([*truth, true_loss])]
    # Weight decay tells a gradient of zero from none.
    optimizers = [torch.optim.AdamW(side.parameters(), lr=0.01) for side in sides]
    errors = {}
    for step, pattern in enumerate(PATTERNS):
        inputs = batch(step, pattern)
        cache(*rows_of_rank(inputs))
        true_loss(*(tower(rows) for tower, rows in zip(truth, inputs, strict=True))).backward()
        name, error = worst(steps.errors_of(*sides))
        errors[f"{pattern}: {name}"] = error
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    name, error = worst(errors)
    return {"error": error, "parameter": name}


def in_ddp(encoders: list[nn.Module], **options: Any) -> list[nn.Module]:
    wrapped = {id(encoder): DDP(encoder, **options) for encoder in encoders}
    return [wrapped[id(encoder)] for encoder in encoders]


def under_zero(stage: int, *, tied: bool, **options: Any) -> dict[str, Any]:
    """The same under DeepSpeed, in 32 bits: gradients, and what plain SGD makes of them."""
    built = towers(tied, **options)
    model = (built[0] if tied else steps.OneModule(built)).float()
    truth, true_loss = copy.deepcopy(model).double(), steps.PlainClip().double()
    engine, loss = engine_for(model, stage), ClipLoss()
    encoders = [engine, engine] if tied else engine
    cache = GradCache(encoders, loss, chunk_size=CHUNK, strategy=DeepSpeedStrategy(engine))
    true_towers = [truth, truth] if tied else truth.towers
    errors = {}
    # ZeRO-3 cannot step without any gradient.
    without = {"nowhere"} if stage == 3 and options.get("frozen") else set()
    for step, pattern in enumerate(name for name in PATTERNS if name not in without):
        inputs = batch(step, pattern)
        weights = weights_of(engine, stage, "fp32")
        truth.load_state_dict(weights, strict=False)
        truth.zero_grad()
        cache(*(rows.float() for rows in rows_of_rank(inputs)))
        engine.step()
        true_towers = [truth, truth] if tied else truth.towers
        true_loss(
            *(tower(rows) for tower, rows in zip(true_towers, inputs, strict=True))
        ).backward()
        after = weights_of(engine, stage, "fp32")
        for name in weights:
            parameter = truth.get_parameter(name)
            expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            change = (weights[name] - after[name]) / LR
            size = expected.norm().clamp_min(1e-2)
            errors[f"{pattern}: {name}"] = float((change - expected).norm() / size)
    name, error = worst(errors)
    return {"change": error, "parameter": name}


def refused_everywhere(cache: GradCache, encoders: nn.Module, dtype: torch.dtype) -> dict[str, Any]:
    """Ranks that run other modules all raise, and no gradient is there."""
    uneven = batch(0, "on the first rank alone")
    with pytest.raises(RuntimeError, match=r"expected every rank to run the same modules.*image"):
        cache(*(rows.to(dtype) for rows in rows_of_rank(uneven)))
    assert all(parameter.grad is None for parameter in encoders.parameters())
    return {}


def other_modules_under_fsdp() -> dict[str, Any]:
    encoders = each_sharded(towers(tied=False))
    cache = GradCache(encoders, ClipLoss().double(), chunk_size=CHUNK, strategy=FSDPStrategy())
    refused_everywhere(cache, nn.ModuleList(encoders), torch.float64)
    # An even batch may follow.
    cache(*rows_of_rank(batch(0, "everywhere")))
    return {}


def other_modules_under_zero(stage: int) -> dict[str, Any]:
    engine = engine_for(steps.OneModule(towers(tied=False)).float(), stage)
    strategy = DeepSpeedStrategy(engine)
    cache = GradCache(engine, ClipLoss(), chunk_size=CHUNK, strategy=strategy)
    return refused_everywhere(cache, engine.module, torch.float32)


def unreached_under_deepspeed(world: int) -> dict[str, Any]:
    cases: dict[str, Any] = {
        f"ZeRO-{stage}: {'tied' if tied else 'untied'}": partial(
            under_zero, stage, tied=tied, always=stage >= 2
        )
        for stage in range(4)
        for tied in (True, False)
    }
    for stage in range(4):
        cases[f"ZeRO-{stage}: frozen text"] = partial(
            under_zero, stage, tied=False, frozen=True, always=stage >= 2
        )
    if world > 1:
        for stage in (2, 3):
            cases[f"ZeRO-{stage}: other modules"] = partial(other_modules_under_zero, stage)
    return cases


def unreached_cases(world: int) -> dict[str, Any]:
    case = steps_of_all_patterns
    gathered = partial(FSDPStrategy, keep_gathered=True)
    views = partial(in_ddp, gradient_as_bucket_view=True)
    finds = partial(in_ddp, find_unused_parameters=True)
    cases: dict[str, Any] = {}
    for tied in (True, False):
        towers = "tied" if tied else "untied"
        cases |= {
            f"AllReduce: {towers}": partial(case, as_they_are, AllReduceStrategy, tied=tied),
            f"DDP: {towers}": partial(case, each_in_ddp, DDPStrategy, tied=tied),
            f"DDP, bucket views: {towers}": partial(case, views, DDPStrategy, tied=tied),
            f"FSDP: {towers}": partial(case, each_sharded, FSDPStrategy, tied=tied, always=True),
            f"FSDP, gathered: {towers}": partial(case, each_sharded, gathered, tied=tied),
        }

    for name, wrap, strategy in (
        ("AllReduce", steps.OneModule, AllReduceStrategy),
        ("DDP", in_ddp, DDPStrategy),
        ("DDP, one module", one_in_ddp, DDPStrategy),
        ("FSDP, gathered", each_sharded, gathered),
    ):
        cases[f"{name}: frozen text"] = partial(case, wrap, strategy, tied=False, frozen=True)
    always = {"tied": False, "frozen": True, "always": True}
    cases["FSDP: frozen text"] = partial(case, each_sharded, FSDPStrategy, **always)
    cases["DDP that finds unused ones"] = partial(case, finds, DDPStrategy, tied=False)
    if world > 1:
        cases["FSDP: other modules"] = other_modules_under_fsdp
    return cases
