"""Steps of a two-tower model under every strategy. b pairs on each of W processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from engine_steps import encode, image_text
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from gradcache_clip import ClipLoss, GradCache
from gradcache_clip.distributed import (
    AllReduceStrategy,
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
)


class Ready(NamedTuple):
    """A step that leaves gradients, and where they are."""

    step: Callable[[], object]
    gradients: Callable[[], list[Tensor]]


def one_process(options: dict[str, Any]) -> list[Tensor]:
    """Gradients of the whole batch on one process, without gradient caching."""
    b, world = options["engine_rows"], dist.get_world_size()
    encoders, inputs = image_text(world * b, small=True)
    features = [encode(each, given) for each, given in zip(encoders, inputs, strict=True)]
    alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    ClipLoss(group=alone)(*features).loss.backward()
    return _gradients(encoders)


def error_against(truth: list[Tensor], ready: Ready) -> float:
    """Norm of the difference of all gradients over the norm of all."""
    ours = torch.cat([each.flatten() for each in ready.gradients()])
    true = torch.cat([each.flatten() for each in truth])
    return float((ours - true).norm() / true.norm())


def available(name: str) -> bool:
    """Whether the packages that an engine needs are installed."""
    return "ZeRO" not in name or find_spec("deepspeed") is not None


class _TwoTowers(nn.Module):
    """Both encoders behind one forward, as DeepSpeed wants it."""

    def __init__(self, encoders: Sequence[nn.Module]) -> None:
        super().__init__()
        self.towers = nn.ModuleList(encoders)

    def forward(self, tower: int, inputs: Any) -> Tensor:
        return encode(self.towers[tower], inputs)


def _local(options: dict[str, Any]) -> tuple[tuple[nn.Module, nn.Module], list[Any]]:
    """Encoders with the weights of all ranks, and the rows of this one."""
    b, world, rank = options["engine_rows"], dist.get_world_size(), dist.get_rank()
    encoders, inputs = image_text(world * b, small=True)
    own = slice(rank * b, (rank + 1) * b)
    texts = {name: each[own] for name, each in inputs[1].items()}
    return encoders, [inputs[0][own], texts]


def _gradients(modules: Sequence[nn.Module]) -> list[Tensor]:
    return [_full(p.grad) for each in modules for p in each.parameters() if p.grad is not None]


def _full(gradient: Tensor) -> Tensor:
    return (gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient).clone()


def _plain_ddp(options: dict[str, Any]) -> Ready:
    encoders, inputs = _local(options)
    wrapped, loss = [DistributedDataParallel(each) for each in encoders], ClipLoss()

    def step() -> None:
        _forget(encoders)
        features = [encode(each, given) for each, given in zip(wrapped, inputs, strict=True)]
        (dist.get_world_size() * loss(*features).loss).backward()

    return Ready(step, partial(_gradients, encoders))


def _cached(
    wrap: Callable[[nn.Module], nn.Module], strategy: Callable[[], Any], options: dict[str, Any]
) -> Ready:
    encoders, inputs = _local(options)
    wrapped = [wrap(each) for each in encoders]
    cache = GradCache(wrapped, ClipLoss(), chunk_size=options["chunk"], strategy=strategy())

    def step() -> None:
        _forget(encoders)
        cache(*inputs)

    return Ready(step, partial(_gradients, encoders))


def _deepspeed(stage: int, options: dict[str, Any]) -> Ready:
    os.environ.setdefault("DS_ACCELERATOR", "cpu" if not torch.cuda.is_available() else "cuda")
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    encoders, inputs = _local(options)
    model = _TwoTowers(encoders)
    config = {
        "train_micro_batch_size_per_gpu": options["engine_rows"],
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.0)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=config, dist_init_required=False
    )
    cache = GradCache(
        engine, ClipLoss(), chunk_size=options["chunk"], strategy=DeepSpeedStrategy(engine)
    )
    last: list[Tensor] = []

    def step() -> None:
        cache(*inputs)
        if not last:
            found = (safe_get_full_grad(each) for each in parameters)
            last.extend(each.clone() for each in found if each is not None)
        engine.step()

    return Ready(step, lambda: last)


def _forget(encoders: Sequence[nn.Module]) -> None:
    for each in encoders:
        each.zero_grad()


ENGINES: dict[str, Callable[[dict[str, Any]], Ready]] = {
    "DDP without gradient caching": _plain_ddp,
    "DDPStrategy": partial(_cached, DistributedDataParallel, DDPStrategy),
    "AllReduceStrategy": partial(_cached, lambda each: each, AllReduceStrategy),
    "FSDPStrategy": partial(_cached, fully_shard, FSDPStrategy),
    "FSDPStrategy(keep_gathered=True)": partial(
        _cached, fully_shard, partial(FSDPStrategy, keep_gathered=True)
    ),
    **{f"DeepSpeedStrategy, ZeRO {stage}": partial(_deepspeed, stage) for stage in range(4)},
}
