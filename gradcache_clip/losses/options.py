"""Checks of the options of a loss; their errors say name, expected, got and remedy."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any


def check_positive_int(name: str, value: Any, remedy: str) -> None:
    """Raise ValueError unless `value` is a positive integer."""
    _expect(is_positive_int(value), name, "a positive integer", value, remedy)


def check_positive(name: str, value: Any, remedy: str) -> None:
    """Raise ValueError unless `value` is a finite number above zero."""
    right = is_number(value) and 0 < value < math.inf
    _expect(right, name, "a number above zero", value, remedy)


def check_finite(name: str, value: Any, remedy: str) -> None:
    """Raise ValueError unless `value` is a finite number."""
    right = is_number(value) and math.isfinite(value)
    _expect(right, name, "a finite number", value, remedy)


def check_flags(**flags: Any) -> None:
    """Raise TypeError unless all are True or False."""
    for name, value in flags.items():
        right = isinstance(value, bool)
        _expect(right, name, "True or False", value, "pass one of them", TypeError)


def check_choice(name: str, value: Any, choices: tuple[str | None, ...]) -> None:
    """Raise ValueError unless `value` is one of them."""
    *most, last = map(repr, choices)
    expected = f"{', '.join(most)} or {last}"
    _expect(value in choices, name, expected, value, "pass one of them")


def is_positive_int(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) > 0


def is_number(value: Any) -> bool:
    """Whether it is a number of Python or numpy, and not a bool."""
    return isinstance(value, Real) and not isinstance(value, bool)


def _expect(
    right: bool, name: str, expected: str, value: Any, remedy: str, error: type = ValueError
) -> None:
    if not right:
        short = value is None or isinstance(value, (Real, str, tuple, list))
        got = repr(value) if short else type(value).__name__
        raise error(f"{name}: expected {expected}, got {got}; {remedy}")
