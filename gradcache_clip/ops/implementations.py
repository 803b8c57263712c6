"""Which implementation of an op runs: "reference", "tiled" or "triton"."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd.forward_ad import unpack_dual

Impl = Literal["auto", "reference", "tiled", "triton"]

_IMPLEMENTATIONS = ("reference", "tiled", "triton")
_OLDEST_CAPABILITY = (8, 0)
# At import, because torch.compile warns of functions with a cache.
_TRITON_IS_INSTALLED = find_spec("triton") is not None


def resolve_impl(impl: str, device: torch.device, dtype: torch.dtype) -> str:
    """Return the implementation to run: `impl`, or the choice for the device if it is "auto".

    Raises:
        ValueError: an unknown impl.
        RuntimeError: impl="triton" where it cannot run.
    """
    if impl not in ("auto", *_IMPLEMENTATIONS):
        raise ValueError(
            f'impl: expected "auto", "reference", "tiled" or "triton", got {impl!r}; '
            'use impl="auto" to choose by device'
        )
    if impl == "auto":
        runs = device.type == "cuda" and triton_obstacle(device, dtype) is None
        return "triton" if runs else "tiled"
    if impl == "triton" and (obstacle := triton_obstacle(device, dtype)) is not None:
        raise RuntimeError(
            f'impl: expected an implementation that runs here, got "triton", but {obstacle}; '
            f'impl="tiled" runs on {device.type} with any floating dtype (or set '
            "TRITON_INTERPRET=1 before the first import to interpret the kernels on a CPU)"
        )
    return impl


def triton_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Say why the kernels cannot run here; None if they can. Imports triton only if it must."""
    if not _TRITON_IS_INSTALLED:
        return "triton is not installed (torch for NVIDIA GPUs brings it; else pip install triton)"
    if dtype == torch.float64:
        return "the kernels have no float64"
    if device.type == "cpu":
        return _interpreter_obstacle(dtype)
    if device.type != "cuda" or torch.version.hip is not None:
        return f"the kernels need an NVIDIA GPU, the features are on {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability < _OLDEST_CAPABILITY:
        return f"the kernels need compute capability 8.0 or later, this GPU has {capability}"
    return None


def refuse_transforms(loss: str, *tensors: Tensor | None) -> None:
    """Raise for tensors under torch.func or forward-mode differentiation.

    Without this, forward mode would see a constant and report a derivative of zero.
    """
    if torch.compiler.is_compiling():
        return
    for tensor in tensors:
        if tensor is None:
            continue
        if is_functorch_wrapped_tensor(tensor) or unpack_dual(tensor).tangent is not None:
            raise RuntimeError(
                f"{loss}: expected ordinary tensors, got a tensor under torch.func or forward-mode "
                'differentiation; impl="tiled" and "triton" have reverse mode only, '
                'use impl="reference"'
            )


def second_derivative_refused(loss: str) -> RuntimeError:
    """Build the error of a second derivative through an op that differentiates once."""
    return RuntimeError(
        f'{loss}: expected one derivative, got a second one; impl="tiled" and "triton" '
        'differentiate once, impl="reference" as often as you like'
    )


def autocast_disabled(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which products keep the dtype of their operands."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def _interpreter_obstacle(dtype: torch.dtype) -> str | None:
    if os.environ.get("TRITON_INTERPRET", "").lower() not in ("1", "true", "on"):
        return "the features are on the CPU and Triton's interpreter is off"
    from gradcache_clip.kernels.launch_config import INTERPRETED

    if not INTERPRETED:
        return "TRITON_INTERPRET was set after the kernels had been imported"
    # Products of bfloat16 in the interpreter are silently wrong.
    return "Triton's interpreter has no bfloat16" if dtype == torch.bfloat16 else None
