"""Fails on operators that torch refuses on CUDA under deterministic algorithms.

The list is that of `torch.use_deterministic_algorithms`, without pooling, padding, interpolation
and losses that no code here calls.
"""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

_REFUSED = {"cumsum", "cumsum_", "histc", "kthvalue", "median", "put_", "scatter_reduce"}


class Deterministic(TorchDispatchMode):
    """Raises where an operator of the list meets numbers that are no integers."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        if name in _REFUSED and args[0].is_floating_point():
            raise AssertionError(f"{name} of {args[0].dtype} is not deterministic on CUDA")
        return func(*args, **(kwargs or {}))
