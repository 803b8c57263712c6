"""Adds the name of the running module to errors about tensors without values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook


@contextmanager
def naming_modules(
    roots: Mapping[str, nn.Module], needs_data: tuple[type[Exception], ...]
) -> Iterator[None]:
    """Turn errors of these types into a `ValueError` that names the module that was running.

    Args:
        roots: modules to look for the running one in, by name.
        needs_data: errors that torch raises when the values of a tensor are needed.

    Raises:
        ValueError: a module branches on tensor values, or uses an op with data-dependent shapes.
    """
    running: list[nn.Module] = []

    def enter(module: nn.Module, _: Any) -> None:
        running.append(module)

    # Not called for a module that raises, so that one stays on the stack, above its parents.
    def leave(module: nn.Module, _: Any, __: Any) -> None:
        while running.pop() is not module:
            pass

    hooks = register_module_forward_pre_hook(enter), register_module_forward_hook(leave)
    try:
        yield
    except needs_data as error:
        raise ValueError(
            f"{_running_name(running, roots)}: expected ops whose shapes follow from their inputs' "
            f"shapes, got {error}, which needs the values of a tensor; pass an input that avoids "
            "this branch, or measure a real step under LiveBytes"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()


def _running_name(running: list[nn.Module], roots: Mapping[str, nn.Module]) -> str:
    """Name the innermost running module, e.g. "encoder 1, module 'layers.0.router' (Router)"."""
    names = {
        id(child): f"{root}, module {name or '(itself)'!r} ({type(child).__name__})"
        for root, module in roots.items()
        for name, child in module.named_modules()
    }
    return next((names[id(m)] for m in reversed(running) if id(m) in names), "loss")
