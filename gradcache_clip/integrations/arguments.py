"""Translates errors of the engine to the names of the drop-ins' arguments."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

ENGINE_ARGUMENTS = {
    "gradient_hooks: expected parameters": "model: expected parameters",
    'pass gradient_hooks="once" to run hooks on the finished gradient, or "every_chunk" if parts '
    "are what they want": "remove the hooks, or write your own loop with "
    'GradCache(..., gradient_hooks="once")',
    'or leave sort_by_length out. check_rows="off" does not look': "or write your own loop with "
    "GradCache(...) without sort_by_length",
    'pass check_rows="off"': 'write your own loop with GradCache(..., check_rows="off")',
}
"""Texts in errors of the engine that name arguments of `GradCache` -> texts for trainers."""


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
