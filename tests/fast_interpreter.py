"""A pytest plugin: Triton's interpreter without work that changes no result, in half the time.

It patches its language at each launch and at each call of a function in a kernel: once will do in
a process that interprets all of its kernels. And it computes whether integers overflow, only to
drop the answer, for it asserts nothing unless it debugs.
"""

from __future__ import annotations

from dataclasses import replace
from types import FunctionType, SimpleNamespace

from triton.runtime import interpreter

_patch = interpreter._patch_lang
_PATCHED: set[int] = set()


def _patch_once(function: FunctionType) -> SimpleNamespace:
    """Patch what the module of this function imports; nothing is restored."""
    module = id(function.__globals__)
    if module not in _PATCHED:
        _PATCHED.add(module)
        _patch(function)
    return SimpleNamespace(restore=lambda: None)


interpreter._patch_lang = _patch_once
_builder = interpreter.interpreter_builder
assert not _builder.options.debug
_builder.options = replace(_builder.options, sanitize_overflow=False)
