"""Cases for AllReduceStrategy, DDPStrategy and FSDPStrategy; each runs on every rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import strategy_steps as steps
import torch
import torch.distributed as dist
from fsdp_cases import fsdp_cases
from one_shot import worst
from strategy_steps import optimizer_steps, rows_of, tied_towers, two_towers
from strategy_wraps import (
    REDUCE,
    SCATTER,
    Counted,
    as_they_are,
    each_in_ddp,
    each_sharded,
    one_in_ddp,
    one_plain,
    one_root,
)
from torch import Tensor, nn

from gradcache_clip import ClipLoss, GradCache
from gradcache_clip.distributed import AllReduceStrategy, DDPStrategy, FSDPStrategy

# What four processes are started for, and tried with parameters that stay gathered.
FEW = ("two towers", "tied", "dropout", "gradients that add up", "ten steps")
GATHERED = (*FEW, "one module", "one chunk", "graphs kept")
Wrap = Callable[[list[nn.Module]], Any]


def engine_cases(
    strategy: Callable[[], Any], each: Wrap, one: Wrap, reduces_by: str | None = None
) -> dict[str, Any]:
    """What every strategy must get right."""

    def case(build: Callable[[], list[nn.Module]], wrap: Wrap, **options: Any) -> Any:
        return partial(_with_new_strategy, strategy, build, wrap, reduces_by, **options)

    both = (6, 6)
    return {
        "two towers": case(two_towers, each),
        "one module": case(two_towers, one),
        "one chunk": case(two_towers, each, chunk=100),
        "tied": case(tied_towers, each, widths=both),
        "frozen text": case(steps.with_frozen_text, each),
        "dropout": case(partial(two_towers, 0.3), each),
        "dropout, one module": case(partial(two_towers, 0.3), one),
        "gradients that add up": case(two_towers, each, keep_gradients=True),
        "ten steps": case(two_towers, each, steps=10),
        "graphs kept": case(two_towers, each, chunk=1, memory_budget=10**9),
        "some graphs kept": case(two_towers, one, chunk=1, memory_budget=4000),
    }


def _with_new_strategy(
    strategy: Callable[[], Any],
    build: Callable[[], list[nn.Module]],
    wrap: Wrap,
    reduces_by: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    if reduces_by is None:
        return optimizer_steps(build, wrap, strategy(), **options)
    with Counted(reduces_by) as counted:
        return optimizer_steps(build, wrap, strategy(), counted=counted, **options)


class OnRankOne(nn.Module):
    """A parameter that other ranks do not use, and one that nobody uses."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 8)
        self.sometimes = nn.Parameter(torch.ones(8))
        self.never = nn.Parameter(torch.ones(3))

    def forward(self, inputs: Tensor) -> Tensor:
        features = self.layer(inputs)
        first = (inputs[:, :1] > 50).any()
        return features * self.sometimes if first else features


def uneven_use() -> dict[str, Any]:
    """A rank without a gradient takes part with zeros; nobody's stays None."""
    torch.manual_seed(7)
    encoder, text, loss = OnRankOne().double(), steps.tower(9).double(), ClipLoss().double()
    cache = GradCache([encoder, text], loss, chunk_size=100, strategy=AllReduceStrategy())
    images, texts = rows_of(dist.get_rank(), steps.global_batch(0))
    if dist.get_rank() == dist.get_world_size() - 1:
        images = images + 100
    cache(images, texts)
    mine = encoder.sometimes.grad
    assert mine is not None and encoder.never.grad is None
    theirs = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(theirs, mine)
    assert all(torch.equal(mine, other) for other in theirs) and mine.abs().sum() > 0
    return {}


def shared_between_towers() -> list[nn.Module]:
    torch.manual_seed(7)
    projection = nn.Linear(24, 8)
    return [
        nn.Sequential(nn.Linear(6, 24), nn.GELU(), projection),
        nn.Sequential(nn.Linear(9, 24), projection),
    ]


def shared_once() -> dict[str, Any]:
    encoders = [module.double() for module in shared_between_towers()]
    cache = GradCache(encoders, ClipLoss().double(), chunk_size=3, strategy=AllReduceStrategy())
    with Counted(REDUCE) as counted:
        cache(*rows_of(dist.get_rank(), steps.global_batch(0)))
    parameters = sum(p.numel() for p in nn.ModuleList(encoders).parameters())
    several = dist.get_world_size() > 1
    assert (counted.calls, counted.elements) == (several, several * parameters)
    return {}


def small_buckets() -> dict[str, Any]:
    with Counted(REDUCE) as counted:
        strategy = AllReduceStrategy(bucket_bytes=2000)
        return optimizer_steps(two_towers, as_they_are, strategy, counted=counted)


def head_beside_the_encoder() -> dict[str, Any]:
    """Trained modules in get_features are reduced too."""
    torch.manual_seed(7)
    modules = [nn.Linear(6, 8), steps.tower(9), nn.Linear(8, 5), nn.Linear(8, 5), ClipLoss()]
    image, text, *heads, loss = (module.double() for module in modules)
    strategy = AllReduceStrategy()
    cache = GradCache([image, text], loss, chunk_size=3, strategy=strategy, get_features=heads)
    cache(*rows_of(dist.get_rank(), steps.global_batch(0)))
    ours = nn.ModuleList([nn.Sequential(image, heads[0]), nn.Sequential(text, heads[1])])
    got = {name: parameter.grad.clone() for name, parameter in ours.named_parameters()}
    ours.zero_grad()
    loss_value = steps.PlainClip().double()
    steps.in_one_graph(ours, loss_value, 0, steps.global_batch(0), 3)
    errors = {
        name: float((got[name] - p.grad).norm() / p.grad.norm())
        for name, p in ours.named_parameters()
    }
    return {"error": worst(errors)[1]}


def plain_cases(world: int) -> dict[str, Any]:
    """Of the strategies that torch alone serves."""
    kept = partial(FSDPStrategy, keep_gathered=True)
    engines = {
        "AllReduce": engine_cases(AllReduceStrategy, as_they_are, one_plain, REDUCE),
        "DDP": engine_cases(DDPStrategy, each_in_ddp, one_in_ddp),
        "FSDP": engine_cases(FSDPStrategy, each_sharded, one_root, SCATTER),
        "FSDP, gathered": engine_cases(kept, each_sharded, one_root, SCATTER),
    }
    cases = {
        f"{engine}: {name}": case
        for engine, its_cases in engines.items()
        for name, case in its_cases.items()
        if name in _chosen(engine, world, its_cases)
    }
    cases["AllReduce: a shared projection"] = partial(
        _with_new_strategy, AllReduceStrategy, shared_between_towers, as_they_are
    )
    cases["AllReduce: head in get_features"] = head_beside_the_encoder
    cases["AllReduce: shared once"] = shared_once
    cases["AllReduce: small buckets"] = small_buckets
    cases["AllReduce: uneven use"] = uneven_use
    return cases if world > 2 else cases | fsdp_cases()


def _chosen(engine: str, world: int, names: Iterable[str]) -> Iterable[str]:
    if world > 2:
        return FEW
    return GATHERED if engine == "FSDP, gathered" else names
