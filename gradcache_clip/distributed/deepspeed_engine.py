"""What is read from a DeepSpeed engine, checked of it, and held back in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from gradcache_clip.distributed.collectives import world_size

OLDEST = "0.19.4"


def check_version() -> None:
    """Several backwards of one step lose gradients, in silence, in releases before `OLDEST`."""
    if _is_older_than(OLDEST):
        raise ImportError(
            f"deepspeed: expected {OLDEST} or newer, got {_version()}; earlier releases lose "
            "gradients where a step has several backwards (DeepSpeed issues 7718 and 8224, pull "
            f"request 7981); pip install 'deepspeed>={OLDEST}'"
        )


def _version() -> str:
    import deepspeed

    return str(deepspeed.__version__)


def _is_older_than(release: str) -> bool:
    from packaging.version import Version

    return Version(_version()) < Version(release)


def loss_scale(engine: Any) -> float:
    """Loss scale of the engine; read once a step, because reading may wait for the device."""
    scaler_of_zero = getattr(engine.optimizer, "torch_autocast_gradscaler", None)
    for scaler in (scaler_of_zero, engine.torch_autocast_z0_gradscaler):
        if scaler is not None:
            return float(scaler.get_scale())
    return float(engine.optimizer.loss_scale) if engine.fp16_enabled() else 1.0


@contextmanager
def one_prologue(engine: Any) -> Iterator[None]:
    """Let the engine prepare for one backward once, although it had a forward for each tower.

    Each output prepares for itself, at the moment that the backward reaches it; with bf16 that
    drops the gradients which the outputs before have given.
    """
    prepare = engine._backward_prologue
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
    if not engine.managed_gradient_accumulation():
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
    if world_size() > 1 and _is_older_than("0.19.8"):
        _check_reductions(engine)


def _check_reductions(engine: Any) -> None:
    """Releases before 0.19.8 step on the gradients of one rank under these settings."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    own_sums = getattr(optimizer, "use_grad_accum_attribute", False)
    if stage == 1 and own_sums and optimizer.cpu_offload:
        raise ValueError(
            "grad_accum_dtype: expected that of the weights with offload_optimizer under ZeRO-1 "
            f"and DeepSpeed {_version()}, which reduces no other, got another; leave it out, set "
            "zero_optimization.stage to 2, or pip install 'deepspeed>=0.19.8'"
        )
    if engine.device.type == "cpu" and not getattr(optimizer, "contiguous_gradients", True):
        raise ValueError(
            f"contiguous_gradients: expected true on CPUs under DeepSpeed {_version()}, which "
            "reduces no others there, got false; leave it out, or pip install 'deepspeed>=0.19.8'"
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
