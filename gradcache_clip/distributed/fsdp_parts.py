"""Modules that `fully_shard` was called on; torch offers no public way to much of this."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from gradcache_clip.distributed.wrappers import FSDP2, is_kind, uncompiled


def gather_all(roots: Iterable[Any], parts: Iterable[Any]) -> None:
    """All parameters, in one order on every rank, until the end of the step."""
    for root in roots:
        # Otherwise a part that gathers first would take itself for a root.
        root._get_fsdp_state()._lazy_init()
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.set_reshard_after_backward(False, recurse=False)
        part.unshard()


def has_gradient(parameter: Any) -> bool:
    unsharded = getattr(parameter, "_unsharded_param", None)
    return parameter.unsharded_accumulated_grad is not None or (
        unsharded is not None and unsharded.grad is not None
    )


def give_zeros(parameter: Any) -> None:
    unsharded = parameter._unsharded_param
    if _accumulates_apart(parameter):
        dtype = parameter.reduce_dtype or unsharded.dtype
        parameter.unsharded_accumulated_grad = torch.zeros_like(unsharded, dtype=dtype)
    else:
        unsharded.grad = torch.zeros_like(unsharded, dtype=unsharded.grad_dtype)


def _accumulates_apart(parameter: Any) -> bool:
    # In torch 2.15 this only reads the gradient of the unsharded parameter.
    return not hasattr(type(parameter), "unsharded_accumulated_grad")


def sharded_parts(modules: Iterable[nn.Module]) -> list[Any]:
    """Every module that `fully_shard` was called on, each once."""
    parts = {id(p): p for module in modules for p in uncompiled(module).modules()}
    return [part for part in parts.values() if is_kind(part, FSDP2)]


def groups_of(part: Any) -> list[Any]:
    """Parameters that are gathered together; torch offers no public way to read their settings."""
    return list(part._get_fsdp_state()._fsdp_param_groups)


def resharding_of(part: Any) -> tuple[Any, bool, list[tuple[Any, Any, bool]]]:
    state = part._get_fsdp_state()
    groups = [(g, g.post_forward_mesh_info, g.reshard_after_backward) for g in groups_of(part)]
    return state, state._auto_reshard_after_forward, groups


def put_back(settings: tuple[Any, bool, list[tuple[Any, Any, bool]]]) -> None:
    state, automatic, groups = settings
    for group, after_forward, after_backward in groups:
        # Which module is a root shows in its first forward; those stay gathered until a backward.
        group.post_forward_mesh_info = None if state._is_root and automatic else after_forward
        group.reshard_after_backward = after_backward
    state._auto_reshard_after_forward = automatic


def end_backward(root: Any) -> None:
    state = root._get_fsdp_state()
    # In torch 2.15 a backward says that it began; on this rank there may have been none.
    if getattr(state._state_ctx, "manual_backward_finalization_active", False) is None:
        state._state_ctx.manual_backward_finalization_active = False
    state._root_post_backward_final_callback()


def forget_gradients(parts: Sequence[Any]) -> None:
    """Gradients of replays before an error must not be added to those of the next step."""
    sharded = [p for part in parts for group in groups_of(part) for p in group.fsdp_params]
    # The reset of torch 2.15 also drops the gradients of earlier steps.
    earlier = [(p.sharded_param, p.sharded_param.grad) for p in sharded]
    for part in parts:
        state = part._get_fsdp_state()
        if state._is_root and hasattr(state._comm_ctx, "all_gather_state"):
            part.reset_iter_state()
    for each in sharded:
        if _accumulates_apart(each):
            each.unsharded_accumulated_grad = None
        if hasattr(each, "_unsharded_param"):
            each._unsharded_param.grad = None
    for parameter, gradient in earlier:
        parameter.grad = gradient
