"""A pytest plugin: counts the kernels that a run in the interpreter would compile on a GPU.

Each launch is keyed as Triton's own cache of compiled kernels would key it: types, divisibility of
what is specialised, compile-time values and options.
"""

from __future__ import annotations

from typing import Any

import pytest
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction, create_function_from_signature

KEYS: set[tuple[str, str]] = set()
_BINDERS: dict[Any, Any] = {}
_counting = True
_run = InterpretedFunction.run


def pytest_runtest_setup(item: pytest.Item) -> None:
    """What a GPU skips compiles nothing there."""
    global _counting
    _counting = item.get_closest_marker("skipif") is None


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
    return repr((specialization, sorted(options.items())))


def record() -> None:
    """From now on each launch leaves its key in KEYS."""
    InterpretedFunction.run = _recorded


def pytest_configure(config: pytest.Config) -> None:
    record()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.write_line(f"compiled kernels: {len(KEYS)}")
