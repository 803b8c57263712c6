"""What is read from a DeepSpeed engine, checked of it, and held back in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from gradcache_clip.distributed.collectives import world_size


def loss_scale(engine: Any) -> float:
    """Loss scale of the engine; read once a step, because reading may wait for the device."""
    scalers = (
        getattr(engine.optimizer, "torch_autocast_gradscaler", None),
        getattr(engine, "torch_autocast_z0_gradscaler", None),
    )
    for scaler in scalers:
        if scaler is not None:
            return float(scaler.get_scale())
    return float(engine.optimizer.loss_scale) if engine.fp16_enabled() else 1.0


@contextmanager
def one_prologue(engine: Any) -> Iterator[None]:
    """Let the engine prepare for one backward once, although it had a forward for each tower.

    Each output prepares for itself, at the moment that the backward reaches it; with bf16 that
    drops the gradients which the outputs before have given.
    """
    prepare = getattr(engine, "_backward_prologue", None)
    if prepare is None:
        yield
        return
    done: list[bool] = []

    def once() -> None:
        if not done:
            done.append(True)
            prepare()

    engine._backward_prologue = once
    try:
        yield
    finally:
        del engine._backward_prologue


def check_settings(engine: Any) -> None:
    steps = engine.gradient_accumulation_steps()
    if steps != 1:
        raise ValueError(
            "gradient_accumulation_steps: expected 1, for a cached step is one optimizer step "
            f"whatever its chunk_size, got {steps} in the DeepSpeed configuration; set it to 1 and "
            "train_batch_size to the rows of all ranks"
        )
    if not getattr(engine, "managed_gradient_accumulation", lambda: True)():
        raise ValueError(
            "managed_gradient_accumulation: expected true, for the cached step says which backward "
            "is the last, got false in the DeepSpeed configuration; leave it out"
        )
    if engine.fp16_enabled() and engine.zero_optimization_stage() == 0:
        raise ValueError(
            "fp16: expected ZeRO 1, 2 or 3, got ZeRO 0, where DeepSpeed 0.19 divides gradients by "
            "a loss scale that nothing was multiplied by; set zero_optimization.stage to 1, or use "
            "bf16"
        )
    if engine.dp_world_size != world_size():
        raise ValueError(
            f"engine: expected data parallelism over all {world_size()} ranks, got "
            f"{engine.dp_world_size}; leave model, pipeline and sequence parallelism out"
        )


def engine_state(engine: Any) -> dict[str, Any]:
    """Scheduler and loss scale, where the configuration has them."""
    state: dict[str, Any] = {}
    if engine.lr_scheduler is not None:
        state["scheduler"] = engine.lr_scheduler.state_dict()
    if engine.fp16_enabled():
        state["loss_scale"] = float(engine.optimizer.loss_scale)
    return state


def load_engine_state(engine: Any, state: Mapping[str, Any]) -> None:
    """Load what `engine_state` returned, as far as the configuration still has it."""
    if "scheduler" in state and engine.lr_scheduler is not None:
        engine.lr_scheduler.load_state_dict(state["scheduler"])
    if "loss_scale" in state and engine.fp16_enabled():
        engine.optimizer.loss_scaler.cur_scale = state["loss_scale"]
