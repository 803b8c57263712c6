"""What a replay must not inherit from the embed: cached casts and a second statistics update."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def forget_autocast_casts() -> None:
    """Drop the 16-bit copies of weights that autocast holds.

    Autocast reuses a cast whatever the grad mode it was made in, so a copy from the embed, which
    has no graph, would silently cut the replay off from its weights.
    """
    torch.clear_autocast_cache()


@contextmanager
def autocast_off(device_types: Iterable[str]) -> Iterator[None]:
    """Backward runs outside autocast, as after a one-shot step's `with` block."""
    with ExitStack() as stack:
        for device_type in device_types:
            if torch.is_autocast_enabled(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        yield


@contextmanager
def frozen_running_statistics(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Batch norm in train mode still normalises by its chunk, but records it only at the embed."""
    norms = _norms_in_training(modules)
    for _, norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for _, norm in norms:
            norm.track_running_stats = True


def warn_of_batch_norm(modules: Iterable[nn.Module]) -> bool:
    """Name the layers through which features depend on the chunk; False when there are none."""
    names = [name for name, _ in _norms_in_training(modules)]
    if not names:
        return False
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    warnings.warn(
        "batch norm in train mode normalises each chunk by itself, so gradients are those of "
        f"chunk statistics and not of the one-shot step: {shown}. Put these layers in eval mode, "
        "or use a model with layer or group norm, to be exact.",
        stacklevel=4,
    )
    return True


def _norms_in_training(modules: Iterable[nn.Module]) -> list[tuple[str, _BatchNorm]]:
    unique = {id(module): module for module in modules}.values()
    return [
        (name or type(child).__name__, child)
        for module in unique
        for name, child in module.named_modules()
        if isinstance(child, _BatchNorm) and child.training and child.track_running_stats
    ]
