"""Checks of the drop-ins' arguments, and translation of the engine's errors to their names."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from numbers import Integral, Real
from typing import Any

ENGINE_ARGUMENTS = {
    "gradient_hooks: expected parameters": "model: expected parameters",
    'pass gradient_hooks="once" to run hooks on the finished gradient, or "every_chunk" if parts '
    "are what they want": "remove the hooks, or write your own loop with "
    'GradCache(..., gradient_hooks="once")',
    "or pass check_rows=False if chunks are meant to stand alone": "or write your own loop with "
    "GradCache(..., check_rows=False) if chunks are meant to stand alone",
    "or leave sort_by_length out. check_rows=False does not look": "or write your own loop with "
    "GradCache(...) without sort_by_length",
}
"""Texts in errors of the engine that name arguments of `GradCache` -> texts for trainers."""


def check_positive_int(name: str, value: Any, remedy: str) -> None:
    """Raise ValueError unless `value` is a positive integer."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}: expected a positive integer, got {_shown(value)}; {remedy}")


def check_positive(name: str, value: Any, remedy: str) -> None:
    """Raise ValueError unless `value` is a finite number above zero."""
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or not 0 < value < math.inf:
        raise ValueError(f"{name}: expected a number above zero, got {_shown(value)}; {remedy}")


def check_flag(name: str, value: Any) -> None:
    """Raise TypeError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {_shown(value)}; pass one of them")


def _shown(value: Any) -> str:
    short = value is None or isinstance(value, (Real, str, tuple, list))
    return repr(value) if short else type(value).__name__


@contextmanager
def translate_errors(names: Mapping[str, str]) -> Iterator[None]:
    """Replace every key of `names` by its value in errors of the engine."""
    try:
        yield
    except (TypeError, ValueError) as error:
        message = str(error)
        for engine, own in names.items():
            message = message.replace(engine, own)
        if message == str(error):
            raise
        raise type(error)(message).with_traceback(error.__traceback__) from None
