"""Errors about tensors without values that say in which module they arose."""

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
    """Turn errors of these kinds into a `ValueError` that names the module that was running.

    Args:
        roots: modules whose parts are named, by what a person calls them.
        needs_data: what torch raises where the values of a tensor are asked for.

    Raises:
        ValueError: a module branches on the values of a tensor, or uses an op without shapes.
    """
    running: list[nn.Module] = []

    def enter(module: nn.Module, _: Any) -> None:
        running.append(module)

    # Not called for a module that raises, which therefore stays above those around it.
    def leave(module: nn.Module, _: Any, __: Any) -> None:
        while running.pop() is not module:
            pass

    hooks = register_module_forward_pre_hook(enter), register_module_forward_hook(leave)
    try:
        yield
    except needs_data as error:
        raise ValueError(
            f"{_place(running, roots)}: expected ops whose shapes follow from their inputs' "
            f"shapes, got {error}, which needs the values of a tensor; pass an input that avoids "
            "this branch, or measure a real step under LiveBytes"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()


def _place(running: list[nn.Module], roots: Mapping[str, nn.Module]) -> str:
    """Where a step stopped, such as "encoder 1, module 'layers.0.router' (Router)"."""
    names = {
        id(child): f"{root}, module {name or '(itself)'!r} ({type(child).__name__})"
        for root, module in roots.items()
        for name, child in module.named_modules()
    }
    return next((names[id(m)] for m in reversed(running) if id(m) in names), "loss")
