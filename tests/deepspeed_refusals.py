"""Engines and steps that DeepSpeedStrategy refuses; each case runs on every rank."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import strategy_steps as steps
import torch.distributed as dist
from deepspeed_cases import OFFLOAD, both_towers, engine_for, float_cache, local_floats
from torch import nn

from gradcache_clip import ClipLoss, GradCache
from gradcache_clip.distributed import (
    AllReduceStrategy,
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    LocalStrategy,
)


def refuses(engine: Any, message: str, encoders: Any = None, **options: Any) -> None:
    loss = ClipLoss()
    options = {"chunk_size": 3, "strategy": DeepSpeedStrategy(engine), **options}
    cache = GradCache(encoders or engine, loss, **options)
    with pytest.raises(ValueError, match=message):
        cache(*local_floats())
    assert loss.log_logit_scale.grad is None


def wrong_engines() -> dict[str, Any]:
    engine = engine_for(both_towers(), 1)
    for strategy in (LocalStrategy(), AllReduceStrategy(), DDPStrategy(), FSDPStrategy()):
        message = r"encoder 0: .*DeepSpeedEngine.*strategy=DeepSpeedStrategy\(engine\)"
        refuses(engine, message, strategy=strategy)
    beside = steps.tower(9)
    refuses(engine, "encoder 1: expected the engine of this strategy", [engine, beside])
    refuses(engine, "get_features: .*got weight of Linear", get_features=nn.Linear(8, 4))
    refuses(engine, "chunk_size='auto': .*pass a number", chunk_size="auto")
    accumulates = engine_for(both_towers(), 1, gradient_accumulation_steps=4)
    refuses(accumulates, "gradient_accumulation_steps: expected 1.*got 4.*set it to 1")
    refuses(engine_for(both_towers(), 0, "fp16"), "fp16: expected ZeRO 1, 2 or 3, got ZeRO 0")
    by_caller = engine_for(both_towers(), 1, managed_gradient_accumulation=False)
    refuses(by_caller, "managed_gradient_accumulation: expected true.*got false")
    return {}


def lost_reductions() -> dict[str, Any]:
    """Settings under which DeepSpeed before 0.19.8 steps on the gradients of one rank."""
    offloaded = engine_for(both_towers(), 1, "bf16", zero_optimization={"stage": 1, **OFFLOAD})
    pieces = {"stage": 2, "contiguous_gradients": False}
    with mock.patch("deepspeed.__version__", "0.19.7"):
        refuses(offloaded, "grad_accum_dtype: expected .* under ZeRO-1 and DeepSpeed 0.19.7")
        refuses(
            engine_for(both_towers(), 2, zero_optimization=pieces),
            "contiguous_gradients: expected true on CPUs under DeepSpeed 0.19.7",
        )
    return {}


def unequal_chunks() -> dict[str, Any]:
    """Under ZeRO-3 a rank with more chunks would wait for ever."""
    engine = engine_for(both_towers(), 3)
    sizes = 3 + dist.get_rank()
    refuses(engine, "expected as many chunks on every rank", chunk_size=sizes)
    return {}


def without_a_step_between() -> dict[str, Any]:
    engine = engine_for(both_towers(), 2)
    cache = float_cache(engine)
    cache(*local_floats())
    with pytest.raises(ValueError, match=r"expected engine.step\(\) after the last cached step"):
        cache(*local_floats())
    engine.step()
    cache(*local_floats())
    return {}


DEEPSPEED_REFUSALS = {
    "wrong engines": wrong_engines,
    "lost reductions": lost_reductions,
    "unequal chunks": unequal_chunks,
    "without a step between": without_a_step_between,
}
