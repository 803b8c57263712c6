"""A pytest plugin: counts the kernels that a run in the interpreter would compile on a GPU.

Each launch is keyed as Triton's own cache of compiled kernels would key it: types, divisibility of
what is specialised, compile-time values and options. Cases of a dtype take bfloat16 on a GPU where
the interpreter has only float16.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction, create_function_from_signature

KEYS: set[tuple[str, str]] = set()
_BINDERS: dict[Any, Any] = {}
_counting, _in_bfloat16 = True, False
_run = InterpretedFunction.run


def pytest_runtest_setup(item: pytest.Item) -> None:
    """What a GPU skips compiles nothing there."""
    global _counting, _in_bfloat16
    _counting = item.get_closest_marker("skipif") is None
    case = getattr(item, "callspec", None)
    _in_bfloat16 = case is not None and case.params.get("dtype") is torch.float16


def _recorded(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
    if _counting:
        KEYS.add((self.fn.__name__, _key(self, *args, **kwargs)))
    return _run(self, *args, grid=grid, warmup=warmup, **kwargs)


def _key(function: Any, *args: Any, **kwargs: Any) -> str:
    if function.fn not in _BINDERS:
        kernel = JITFunction(function.fn, **function.kwargs)
        backend = make_backend(GPUTarget("cuda", 90, 32))
        _BINDERS[function.fn] = create_function_from_signature(
            kernel.signature, kernel.params, backend
        )
    _, specialization, options = _BINDERS[function.fn](*args, **kwargs)
    key = repr((specialization, sorted(options.items())))
    return key.replace("fp16", "bf16") if _in_bfloat16 else key


def record() -> None:
    """From now on each launch leaves its key in KEYS."""
    InterpretedFunction.run = _recorded


def pytest_configure(config: pytest.Config) -> None:
    record()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.write_line(f"compiled kernels: {len(KEYS)}")
