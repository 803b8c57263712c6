"""The programs of the training command, by name."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradcache_clip.train.config import Config
    from gradcache_clip.train.programs.program import Program

PROGRAMS = {
    "pairs": "Pairs",
    "views": "Views",
    "texts": "Texts",
}
"""Name of each program's module in this package -> name of its class."""


def program_class(name: str) -> Any:
    """Import and return the class of a program.

    Example:
        >>> program_class("views").__name__
        'Views'
    """
    return getattr(import_module(f"{__name__}.{name}"), PROGRAMS[name])


def program_of(config: Config) -> Program:
    """Build the program of a configuration."""
    program: Program = program_class(config.program)(config)
    return program
