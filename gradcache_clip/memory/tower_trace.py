"""Traces the passes of one tower over a chunk on the meta device: embed, plain pass, replay."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gradcache_clip.cache.batch_tree import tensors_in
from gradcache_clip.memory.device_rules import DeviceKind, DeviceRules
from gradcache_clip.memory.running_module import naming_modules
from gradcache_clip.memory.trace import Recorder, Trace, join_recordings

# Two sizes, for storages that grow linearly.
_ROWS = (8, 16)
# Errors that torch raises when the value of a meta tensor is needed.
_NEEDS_DATA = (RuntimeError, NotImplementedError)

Pass = Literal["plain", "replay", "shared"]
"""A forward and backward either outside of the engine, where autocast drops its casts before the
backward, or as a replay, which keeps them until the next one."""


def trace_tower(
    encode: Callable[[Any], Tensor],
    module: nn.Module,
    make_inputs: Callable[[int], Any],
    *,
    device_kind: DeviceKind = "cuda",
    dtype: torch.dtype | None = None,
    passes: Sequence[Pass] = ("plain", "replay"),
) -> Trace:
    """Record a tower on the meta device.

    Segments: "embed", and "embed end", which drops casts; for each pass, e.g. "plain": "forward
    plain", "backward plain", "end plain", which drops the remaining casts, and "backward plain,
    added", which adds to existing gradients. After "replay" also "shared", a replay that finds the
    casts of an earlier one.

    Args:
        encode: inputs -> features (rows, D).
        module: holds the parameters, on the meta device and in training mode.
        make_inputs: number of rows -> inputs on the meta device.
        device_kind: device whose kernels to follow.
        dtype: of autocast; None without autocast.
        passes: passes to record in addition to the embed.

    Raises:
        ValueError: a module needs the values of a tensor; the error names it.
    """
    recordings = [
        _recorded(encode, module, make_inputs(rows), DeviceRules(device_kind, dtype), passes)
        for rows in _ROWS
    ]
    return join_recordings(recordings, _ROWS)


def _recorded(
    encode: Callable[[Any], Tensor],
    module: nn.Module,
    inputs: Any,
    rules: DeviceRules,
    passes: Sequence[Pass],
) -> Recorder:
    recorder = Recorder([*module.parameters(), *module.buffers(), *tensors_in(inputs)])
    rules.on_cast = lambda cast: recorder.mark(cast, "cast")
    parameters = [each for each in module.parameters() if each.requires_grad]
    marks = recorder.mark_gradient
    hooks = [each.register_post_accumulate_grad_hook(marks) for each in parameters]
    try:
        with recorder, rules, naming_modules({"encoder": module}, _NEEDS_DATA):
            with torch.no_grad():
                encode(inputs)
            recorder.cut("embed")
            rules.forget_casts()
            recorder.cut("embed end")
            for name in passes:
                _clear(parameters)
                recorder.cut("")
                _record_pass(recorder, rules, lambda: encode(inputs), name)
                if name == "replay":
                    _clear(parameters)
                    encode(inputs)
                    recorder.cut("")
                    _record_pass(recorder, rules, lambda: encode(inputs), "shared")
    finally:
        for hook in hooks:
            hook.remove()
        _clear(parameters)
    return recorder


def _record_pass(
    recorder: Recorder, rules: DeviceRules, encode: Callable[[], Tensor], name: Pass
) -> None:
    features = encode()
    if name == "plain":
        rules.forget_casts()
    recorder.cut(f"forward {name}")
    # In a plain backward, checkpoints recompute without cached casts; a replay still has them.
    rules.keeps_casts = name != "plain"
    if features.requires_grad:
        features.backward(torch.empty_like(features))
    del features
    recorder.cut(f"backward {name}")
    rules.keeps_casts = True
    rules.forget_casts()
    recorder.cut(f"end {name}")


def _clear(parameters: Iterable[Tensor]) -> None:
    for parameter in parameters:
        parameter.grad = None
