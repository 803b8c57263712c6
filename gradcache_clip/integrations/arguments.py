"""Arguments of the drop-ins: checks, and the engine's errors in the names that a drop-in has."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from numbers import Integral, Real
from typing import Any

ENGINE_ARGUMENTS = {
    "gradient_hooks: expected parameters": "model: expected parameters",
    'pass gradient_hooks="once" to run hooks on the finished gradient, or "every_chunk" if parts '
    "are what they want": "take the hooks off, or write a loop of your own with "
    'GradCache(..., gradient_hooks="once")',
    "or pass check_rows=False if chunks are meant to stand alone": "or write a loop of your own "
    "with GradCache(..., check_rows=False) if chunks are meant to stand alone",
}
"""Arguments of `GradCache` that errors of the engine name and no trainer has."""


def check_positive_int(name: str, value: Any, remedy: str) -> None:
    """Raise for anything but a positive integer."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}: expected a positive integer, got {_shown(value)}; {remedy}")


def check_positive(name: str, value: Any, remedy: str) -> None:
    """Raise for anything but a finite number above zero."""
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or not 0 < value < math.inf:
        raise ValueError(f"{name}: expected a number above zero, got {_shown(value)}; {remedy}")


def check_flag(name: str, value: Any) -> None:
    """Raise for anything but True and False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {_shown(value)}; pass one of them")


def _shown(value: Any) -> str:
    short = value is None or isinstance(value, (Real, str, tuple, list))
    return repr(value) if short else type(value).__name__


@contextmanager
def translate_errors(names: Mapping[str, str]) -> Iterator[None]:
    """Errors of the engine, with every key of `names` in them replaced by its value."""
    try:
        yield
    except (TypeError, ValueError) as error:
        message = str(error)
        for engine, own in names.items():
            message = message.replace(engine, own)
        if message == str(error):
            raise
        raise type(error)(message).with_traceback(error.__traceback__) from None
