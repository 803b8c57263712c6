"""Auxiliary losses under every strategy, beside one process with the rows of all ranks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from auxiliary_models import ROWS, WEIGHT, WIDTHS, Contrast, WithRouter, batch, one_shot
from deepspeed_cases import NEEDS_DEEPSPEED, engine_for, gradients_of
from strategy_processes import result_of, run_cases
from strategy_steps import OneModule, full
from strategy_wraps import as_they_are, each_in_ddp, each_sharded
from torch import Tensor, nn

from gradcache_clip import GradCache, deferred_step, verify
from gradcache_clip.cache import auxiliary
from gradcache_clip.distributed import (
    AllReduceStrategy,
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    LocalStrategy,
)

OPTIONS = {"chunk_size": 4, "auxiliary_losses": {"router": WEIGHT}}


def encoders() -> list[nn.Module]:
    torch.manual_seed(3)
    return [WithRouter(width).double() for width in WIDTHS]


def own_rows(inputs: list[Tensor]) -> list[Tensor]:
    mine = ROWS // dist.get_world_size()
    return [x[dist.get_rank() * mine :][:mine] for x in inputs]


def truth() -> tuple[dict[str, Tensor], Tensor]:
    """Gradients and loss of one process."""
    modules, loss = nn.ModuleList(encoders()), Contrast(lambda x: x).double()
    value = one_shot([*modules], loss, batch())
    gradients = {name: p.grad for name, p in modules.named_parameters()}
    return {**gradients, "scale": loss.scale.grad}, value


def worst(ours: dict[str, Tensor]) -> float:
    expected = truth()[0]
    assert ours.keys() == expected.keys()
    return max(
        float((gradient - expected[name]).norm() / expected[name].norm())
        for name, gradient in ours.items()
    )


def step(
    wrap: Callable[[list[nn.Module]], Any],
    strategy: Callable[[], Any],
    take: Callable[..., Any] = lambda cache, *inputs: cache(*inputs),
    **options: Any,
) -> dict[str, Any]:
    modules, loss = encoders(), Contrast().double()
    ours = nn.ModuleList(modules)
    cache = GradCache(wrap(modules), loss, strategy=strategy(), **{**OPTIONS, **options})
    out = take(cache, *own_rows(batch()))
    gradients = {name: full(p.grad).clone() for name, p in ours.named_parameters()}
    if isinstance(cache.strategy, LocalStrategy) and cache.strategy.reduce_myself:
        for gradient in gradients.values():
            dist.all_reduce(gradient)
    expected = truth()[1]
    return {
        "error": worst({**gradients, "scale": loss.scale.grad}),
        "loss": float((out.loss.detach() - expected).abs() / expected),
    }


def deferred(cache: GradCache, *inputs: Tensor) -> Any:
    out = deferred_step(cache, *inputs)
    out.loss.backward()
    return out


def by_number_of_chunks(loss: Tensor | None, like: Tensor) -> Tensor:
    chunks = torch.stack([part.mean() for part in loss.split(4)])
    return torch.stack([chunks.sum(), *loss.new_tensor([len(chunks), 1])])


def mutated(*args: Any) -> dict[str, Any]:
    """What the comparison must notice: every chunk counts alike, whatever its rows."""
    with mock.patch.object(auxiliary, "_sum_and_rows", by_number_of_chunks):
        return step(*args)


def under_deepspeed(stage: int) -> dict[str, Any]:
    engine, loss = engine_for(OneModule(encoders()).float(), stage), Contrast()
    cache = GradCache(engine, loss, strategy=DeepSpeedStrategy(engine), **OPTIONS)
    out = cache(*(x.float() for x in own_rows(batch())))
    gradients = {name.removeprefix("towers."): g for name, g in gradients_of(engine).items()}
    engine.step()
    expected = truth()[1]
    return {
        "error": worst({**gradients, "scale": loss.scale.grad.double()}),
        "loss": float((out.loss - expected).abs() / expected),
    }


def verified() -> dict[str, Any]:
    loss, strategy = Contrast().double(), AllReduceStrategy()
    report = verify(GradCache(encoders(), loss, strategy=strategy, **OPTIONS), *own_rows(batch()))
    assert report.exact, str(report)
    return {}


class OnRankZero(WithRouter):
    def forward(self, x: Tensor) -> Any:
        output = super().forward(x)
        return output if dist.get_rank() == 0 else {"embedding": output["embedding"]}


def on_one_rank() -> dict[str, Any]:
    modules = [OnRankZero(6).double(), encoders()[1]]
    for parameter in nn.ModuleList(modules).parameters():
        dist.broadcast(parameter.detach(), 0)
    cache = GradCache(modules, Contrast().double(), strategy=AllReduceStrategy(), **OPTIONS)
    with pytest.raises(ValueError, match="'router' from an encoder on every rank, got it on 1 of"):
        cache(*own_rows(batch()))
    assert all(p.grad is None for p in modules[0].parameters())
    return {}


def of_nobody() -> dict[str, Any]:
    options = {**OPTIONS, "auxiliary_losses": {"router": 0.1, "z": 0.1}}
    cache = GradCache(encoders(), Contrast().double(), strategy=AllReduceStrategy(), **options)
    with pytest.raises(ValueError, match="got 'z', which none returns"):
        cache(*own_rows(batch()))
    return {}


EXACT = {
    "AllReduce": partial(step, as_they_are, AllReduceStrategy),
    "AllReduce, deferred": partial(step, as_they_are, AllReduceStrategy, deferred),
    "reduced by the caller": partial(step, as_they_are, partial(LocalStrategy, reduce_myself=True)),
    "DDP": partial(step, each_in_ddp, DDPStrategy),
    "DDP, kept": partial(step, each_in_ddp, DDPStrategy, memory_budget=10**9),
    "DDP, deferred": partial(step, each_in_ddp, DDPStrategy, deferred),
    "FSDP": partial(step, each_sharded, FSDPStrategy),
    "FSDP, embedded together": partial(step, each_sharded, FSDPStrategy, embed_chunk_size=8),
}
MUTATED = {
    "AllReduce, mutated": partial(mutated, as_they_are, AllReduceStrategy),
    "DDP, mutated": partial(mutated, each_in_ddp, DDPStrategy),
    "FSDP, mutated": partial(mutated, each_sharded, FSDPStrategy),
}
OTHERS = {"verified": verified, "on one rank": on_one_rank, "of nobody": of_nobody}
STAGES = {f"ZeRO-{stage}": partial(under_deepspeed, stage) for stage in range(4)}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_cases({**EXACT, **MUTATED, **OTHERS}, 2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def zero(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_cases(STAGES, 2, tmp_path_factory.mktemp("zero"))


@pytest.mark.parametrize("case", EXACT)
def test_two_processes_give_the_gradients_of_one(two: dict[str, Any], case: str):
    result = result_of(two, case)
    assert result["error"] < 1e-10 and result["loss"] < 1e-12


@pytest.mark.parametrize("case", MUTATED)
def test_chunks_that_count_alike_are_noticed(two: dict[str, Any], case: str):
    assert result_of(two, case)["error"] > 1e-3


@pytest.mark.parametrize("case", OTHERS)
def test_all_ranks_agree(two: dict[str, Any], case: str):
    assert result_of(two, case) == {}


@NEEDS_DEEPSPEED
@pytest.mark.parametrize("case", STAGES)
def test_deepspeed(zero: dict[str, Any], case: str):
    result = result_of(zero, case)
    assert result["error"] < 1e-5 and result["loss"] < 1e-5
