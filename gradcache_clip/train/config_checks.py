"""Checks that fields of a configuration share, and the error that they raise."""

from __future__ import annotations

import math
from typing import Any


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names the key and the remedy."""


def check(ok: bool, section: str, config: Any, name: str, expected: str) -> None:
    if not ok:
        raise ConfigError(
            f"{section}.{name}: expected {expected}, got {getattr(config, name)!r}; "
            f"change it in the config or with {section}.{name}=VALUE"
        )


def at_least(bound: float, section: str, config: Any, *names: str) -> None:
    for name in names:
        ok = bound <= getattr(config, name) < math.inf
        check(ok, section, config, name, f"at least {bound}")


def above(bound: float, section: str, config: Any, *names: str) -> None:
    for name in names:
        ok = bound < getattr(config, name) < math.inf
        check(ok, section, config, name, f"more than {bound}")


_RANGES = {
    "[0, 1]": (lambda value: 0 <= value <= 1, "a number from 0 to 1"),
    "[0, 1)": (lambda value: 0 <= value < 1, "a number from 0 to less than 1"),
    "(0, 1]": (lambda value: 0 < value <= 1, "a number of more than 0 and at most 1"),
}


def in_range(interval: str, section: str, config: Any, *names: str) -> None:
    contains, expected = _RANGES[interval]
    for name in names:
        check(contains(getattr(config, name)), section, config, name, expected)


def not_empty(section: str, config: Any, *names: str) -> None:
    for name in names:
        check(bool(getattr(config, name)), section, config, name, "some text")


def one_of(choices: tuple[str, ...], section: str, config: Any, *names: str) -> None:
    for name in names:
        expected = "one of " + ", ".join(choices)
        check(getattr(config, name) in choices, section, config, name, expected)
