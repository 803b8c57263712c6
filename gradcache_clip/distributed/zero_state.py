"""Weights and moments of a DeepSpeed engine, whole and by name, under ZeRO 0 to 3."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from gradcache_clip.distributed.state import (
    StateByName,
    check_moments,
    load_state_by_name,
    rank0_keeps,
    saved_of,
    state_by_name,
)

Named = Mapping[str, nn.Parameter]


def holds_parts(engine: Any) -> bool:
    """Whether DeepSpeed keeps flat 32-bit copies, and their moments, apart from parameters."""
    trained = (p for p in engine.parameters() if p.requires_grad)
    return any(hasattr(p, "ds_id") or hasattr(p, "_hp_mapping") for p in trained)


def whole_weight(engine: Any, value: Tensor) -> Tensor:
    """A parameter or buffer in full, in 32 bits where the engine has them; for rank 0."""
    from deepspeed.utils import safe_get_full_fp32_param

    if _is_trained(value) and holds_parts(engine):
        return rank0_keeps(safe_get_full_fp32_param(value))
    with _gathered(value):
        return value.detach().clone()


@torch.no_grad()
def load_weight(engine: Any, value: Tensor, weight: Tensor) -> None:
    """Copy a whole weight into a parameter or buffer, and into its 32-bit copy."""
    weight = weight.to(engine.device)
    with _gathered(value):
        value.copy_(weight)
    if _is_trained(value) and holds_parts(engine):
        _set_part(value, weight.float())


def moments_by_name(engine: Any, named: Named) -> StateByName:
    """State of the engine's optimizer; tensors are complete on rank 0."""
    from deepspeed.utils import safe_get_full_optimizer_state

    base = _base(engine)
    if not holds_parts(engine):
        return state_by_name(base, named, lambda value: value)
    _link_moments(engine)
    first: dict[str, Any] = next(iter(base.state.values()), {})
    state: StateByName = {}
    for name, parameter in named.items():
        # Each its own count of steps: on one tensor the steps of all would add up.
        state[name] = {k: _copy(value) for k, value in first.items() if not _is_moment(value)}
        for key in (key for key, value in first.items() if _is_moment(value)):
            state[name][key] = rank0_keeps(safe_get_full_optimizer_state(parameter, key))
    return state


def load_moments(engine: Any, named: Named, saved: Mapping[str, Mapping[str, Any]]) -> None:
    """Give the engine's optimizer what `moments_by_name` returned, on every rank.

    Raises:
        ValueError: a parameter has no saved state, while others have one.
    """
    if not holds_parts(engine):
        load_state_by_name(_base(engine), named, saved, lambda value, _: value)
        return
    check_moments(_base(engine), named, saved)
    states = [(parameter, saved_of(saved, name)) for name, parameter in named.items() if saved]
    if stepped := [values for _, values in states if values]:
        _make_room(engine, stepped[0])
        _link_moments(engine)
    for parameter, values in states:
        for key, value in values.items():
            if _is_moment(value):
                _set_part(parameter, value.to(engine.device), key)


def _base(engine: Any) -> Optimizer:
    """The optimizer that DeepSpeed's own, if it has one, wraps."""
    inner: Optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    return inner


def _make_room(engine: Any, of_one: Mapping[str, Any]) -> None:
    """Moments of the flat copies, which the first step would make, so that they can be set."""
    base = _base(engine)
    # What the wrapped optimizer steps; ZeRO-3 shows it one group at a time.
    of_stage_3 = getattr(engine.optimizer, "fp32_partitioned_groups_flat", None)
    for flat in of_stage_3 or [p for group in base.param_groups for p in group["params"]]:
        for key, value in of_one.items():
            base.state[flat][key] = torch.zeros_like(flat) if _is_moment(value) else _copy(value)


def _link_moments(engine: Any) -> None:
    """Let parameters find their moments; DeepSpeed (0.19.8) does so when the first group of
    parameters has taken its first step, and the other groups have none yet."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()


def _set_part(parameter: Any, whole: Tensor, key: str | None = None) -> None:
    """What this process holds of a moment, or without a key of the 32-bit weights."""
    from deepspeed import utils

    if not hasattr(parameter, "ds_id"):
        if key is None:
            utils.safe_set_full_fp32_param(parameter, whole)
        else:
            utils.safe_set_full_optimizer_state(parameter, whole, key)
        return
    # ZeRO-3 pads the last part, which its functions for whole values do not.
    size = parameter.ds_tensor.numel()
    padded = whole.new_zeros(size * dist.get_world_size())
    padded[: whole.numel()] = whole.flatten()
    part = padded[size * dist.get_rank() : size * (dist.get_rank() + 1)]
    if key is None:
        utils.safe_set_local_fp32_param(parameter, part)
    else:
        utils.safe_set_local_optimizer_state(parameter, part, key)


def _gathered(value: Any) -> AbstractContextManager[Any]:
    """What ZeRO-3 keeps in parts is whole in this context; rank 0's changes stay."""
    import deepspeed

    partitioned = [value] if hasattr(value, "ds_id") else []
    gathered: AbstractContextManager[Any]
    gathered = deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0)
    return gathered


def _is_trained(value: Tensor) -> bool:
    return isinstance(value, nn.Parameter) and value.requires_grad


def _is_moment(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
