"""Steps that Ctrl-C, or an error, ends in their midst, under every strategy; on every rank."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import strategy_steps as steps
import torch
import torch.distributed as dist
from deepspeed_cases import engine_for, weights_of
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

CHUNK = 3


class Interrupts(nn.Module):
    """Passes its input on; raises in a chosen forward, or on the way back of a chosen one."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.left, self.backward, self.fired = inner, 0, False, False

    def arm(self, call: int, *, backward: bool = False) -> None:
        """In that many calls from now; 0 never."""
        self.left, self.backward, self.fired = call, backward, False

    def forward(self, rows: Tensor) -> Tensor:
        self.left -= 1
        # A kept or replayed graph alone has a backward.
        fires = self.left == 0
        if fires and not self.backward:
            self.raise_()
        features = self.inner(rows)
        if fires and features.requires_grad:
            features = Gate.apply(features, self)
        return features

    def raise_(self) -> None:
        self.fired = True
        raise KeyboardInterrupt("Ctrl-C")


class Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, owner: Interrupts) -> Tensor:
        ctx.owner = owner
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.owner.raise_()
        return gradient, None


class Loss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pair, self.interrupts = ClipLoss(), False

    def forward(self, a: Tensor, b: Tensor) -> Any:
        out = self.pair(a, b)
        if self.interrupts:
            self.interrupts = False
            raise KeyboardInterrupt("Ctrl-C")
        return out


def towers() -> list[nn.Module]:
    return [Interrupts(tower) for tower in steps.two_towers()]


def gradients(side: nn.Module) -> list[Tensor | None]:
    return [None if p.grad is None else local(p.grad).clone() for p in side.parameters()]


def same(before: Tensor | None, after: Tensor | None) -> bool:
    return before is after if before is None or after is None else torch.equal(before, after)


def local(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def interrupted(
    wrap: Callable[[list[nn.Module]], Any], strategy: Callable[[], Any], *, earlier: bool
) -> dict[str, Any]:
    """After a step that is broken off anywhere the next one is exact, or refused until zero_grad.

    Calls 1 to 4 of an encoder are its embed (10 rows in chunks of three), the later ones replays.
    """
    ours = [tower.double() for tower in towers()]
    truth = list(copy.deepcopy(nn.ModuleList(ours)))
    loss, true_loss = Loss().double(), steps.PlainClip().double()
    sides = nn.ModuleList([*ours, loss.pair]), nn.ModuleList([*truth, true_loss])
    cache = GradCache(wrap(ours), loss, chunk_size=CHUNK, strategy=strategy(), check_rows="off")
    inputs = steps.global_batch(1)
    mine = steps.rows_of(dist.get_rank(), inputs)
    errors: dict[str, float] = {}
    for place, tower, call, backward in PLACES:
        for side in sides:
            side.zero_grad()
        if earlier:
            cache(*mine)
        before = [
            p.grad if p.grad is None else local(p.grad).clone() for p in sides[0].parameters()
        ]
        if place == "loss":
            loss.interrupts = True
        else:
            ours[tower].arm(call, backward=backward)
        with pytest.raises(KeyboardInterrupt):
            cache(*mine)
        assert place == "loss" or ours[tower].fired, place
        changed = not all(map(same, before, gradients(sides[0])))
        if changed or (earlier and place != "embed"):
            with pytest.raises(RuntimeError, match=r"broken off; call optimizer.zero_grad"):
                cache(*mine)
            sides[0].zero_grad()
        cache(*mine)
        if earlier and place == "embed":
            true_loss(*(t(x) for t, x in zip(truth, inputs, strict=True))).backward()
        true_loss(*(t(x) for t, x in zip(truth, inputs, strict=True))).backward()
        errors |= {
            f"{place} {tower} {call}: {name}": error for name, error in errors_of(*sides).items()
        }
    name, error = worst(errors)
    return {"error": error, "where": name}


def errors_of(ours: nn.Module, truth: nn.Module) -> dict[str, float]:
    pairs = zip(ours.named_parameters(), truth.parameters(), strict=True)
    return {n: float((local(p.grad) - t.grad).norm() / t.grad.norm()) for (n, p), t in pairs}


# Place, encoder, call of it, and whether its backward raises. Ten rows of a rank: four chunks.
PLACES = (
    # The last replay of the first encoder, in which wrappers reduce; before any step has ended.
    ("replay", 0, 8, False),
    ("replay", 0, 8, True),
    ("embed", 0, 2, False),
    ("embed", 1, 4, False),
    ("loss", 0, 0, False),
    ("replay", 0, 5, False),
    ("replay", 0, 5, True),
    ("replay", 1, 6, False),
    ("replay", 1, 7, True),
)


def interrupted_under_zero(stage: int, place: str, call: int, backward: bool) -> dict[str, Any]:
    """The engine adds up gradients that nothing can drop: then it says so, again and again."""
    engine = engine_for(steps.OneModule(towers()).float(), stage)
    loss, strategy = Loss(), DeepSpeedStrategy(engine)
    cache = GradCache(engine, loss, chunk_size=CHUNK, strategy=strategy, check_rows="off")
    tower = engine.module.towers[0]
    mine = [rows.float() for rows in steps.rows_of(dist.get_rank(), steps.global_batch(1))]
    loss.interrupts = place == "loss"
    tower.arm(call, backward=backward)
    with pytest.raises(KeyboardInterrupt):
        cache(*mine)
    if place == "replay":
        for _ in range(2):
            with pytest.raises(ValueError, match=r"engine: .*broken off.*load a checkpoint into"):
                cache(*mine)
        return {}
    if place == "loss":
        loss.zero_grad()
    return exact_step(engine, cache, mine, stage)


def exact_step(engine: Any, cache: GradCache, mine: list[Tensor], stage: int) -> dict[str, Any]:
    before = weights_of(engine, stage, "fp32")
    truth = steps.OneModule(towers()).double()
    truth.load_state_dict(before, strict=False)
    cache(*mine)
    engine.step()
    after = weights_of(engine, stage, "fp32")
    features = [truth(i, rows) for i, rows in enumerate(steps.global_batch(1))]
    steps.PlainClip().double()(*features).backward()
    errors = {}
    for name in before:
        expected = truth.get_parameter(name).grad
        change = (before[name] - after[name]) / 0.1
        errors[name] = float((change - expected).norm() / expected.norm().clamp_min(1e-2))
    name, error = worst(errors)
    return {"change": error, "where": name}


def in_ddp_with_views(encoders: list[nn.Module]) -> list[nn.Module]:
    return [DDP(encoder, gradient_as_bucket_view=True) for encoder in encoders]


def interrupted_cases() -> dict[str, Any]:
    gathered = partial(FSDPStrategy, keep_gathered=True)
    ways: dict[str, tuple[Any, Any]] = {
        "AllReduce": (as_they_are, AllReduceStrategy),
        "DDP": (each_in_ddp, DDPStrategy),
        "DDP, bucket views": (in_ddp_with_views, DDPStrategy),
        "DDP, one module": (one_in_ddp, DDPStrategy),
        "FSDP": (each_sharded, FSDPStrategy),
        "FSDP, gathered": (each_sharded, gathered),
    }
    cases: dict[str, Any] = {}
    for name, way in ways.items():
        for earlier in (False, True):
            case = partial(interrupted, *way, earlier=earlier)
            cases[f"{name}{', earlier gradients' * earlier}"] = case
    for stage in range(4):
        for place, call, backward in (
            ("embed", 2, False),
            ("loss", 0, False),
            ("replay", 6, False),
            ("replay", 5, True),
        ):
            way = "backward" if backward else "forward"
            cases[f"ZeRO-{stage}: {place}, {way}"] = partial(
                interrupted_under_zero, stage, place, call, backward
            )
    return cases
