"""Checks of the options of a loss; their errors say name, expected, got and remedy."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any


def check_positive_int(name: str, value: Any, remedy: str) -> None:
    """Raise ValueError unless `value` is a positive integer."""
    if not is_positive_int(value):
        raise ValueError(f"{name}: expected a positive integer, got {_shown(value)}; {remedy}")


def check_positive(name: str, value: Any, remedy: str) -> None:
    """Raise ValueError unless `value` is a finite number above zero."""
    if not is_number(value) or not 0 < value < math.inf:
        raise ValueError(f"{name}: expected a number above zero, got {_shown(value)}; {remedy}")


def check_finite(name: str, value: Any, remedy: str) -> None:
    """Raise ValueError unless `value` is a finite number."""
    if not is_number(value) or not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {_shown(value)}; {remedy}")


def check_flags(**flags: Any) -> None:
    """Raise TypeError unless all are True or False."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(
                f"{name}: expected True or False, got {_shown(value)}; pass one of them"
            )


def check_choice(name: str, value: Any, choices: tuple[str | None, ...]) -> None:
    """Raise ValueError unless `value` is one of them."""
    if value not in choices:
        *most, last = map(repr, choices)
        expected = f"{', '.join(most)} or {last}"
        raise ValueError(f"{name}: expected {expected}, got {_shown(value)}; pass one of them")


def is_positive_int(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) > 0


def is_number(value: Any) -> bool:
    """Whether it is a number of Python or numpy, and not a bool."""
    return isinstance(value, Real) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    short = value is None or isinstance(value, (Real, str, tuple, list))
    return repr(value) if short else type(value).__name__
