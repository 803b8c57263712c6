"""Keep cached casts and a second statistics update out of the replay."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.utils import parametrize


def forget_autocast_casts() -> None:
    """Drop the 16-bit copies of weights that autocast holds.

    Autocast reuses a cast whatever the grad mode it was made in, so a copy from the embed, which
    has no graph, would silently cut the replay off from its weights.
    """
    torch.clear_autocast_cache()


class SharedCasts:
    """Lets the replays of a tower share their casts, of which a backward frees nothing.

    Those of the embed have no graph, and those of another tower would take memory for nothing.
    """

    def __init__(self) -> None:
        self._sharing: list[int] = []

    def __enter__(self) -> SharedCasts:
        forget_autocast_casts()
        return self

    def of(self, towers: Sequence[object]) -> None:
        sharing = list(map(id, towers))
        if sharing != self._sharing:
            forget_autocast_casts()
        self._sharing = sharing

    def __exit__(self, *_: object) -> None:
        forget_autocast_casts()


def autocast_off(device_types: Iterable[str]) -> AbstractContextManager[object]:
    """Turn autocast off for a backward, as after the `with` block of a one-shot step."""
    enabled = list(filter(torch.is_autocast_enabled, device_types))
    if not enabled:
        return nullcontext()
    stack = ExitStack()
    for device_type in enabled:
        stack.enter_context(torch.autocast(device_type, enabled=False))
    return stack


@contextmanager
def kernels_as_with_gradients() -> Iterator[None]:
    """Turn off the inference fast path of torch's Transformer layers, which rounds and pads
    differently: the embed must compute what the replay will."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def refuse_cached_parametrizations() -> None:
    """Refuse `parametrize.cached()`: weights cached without a graph would get no gradient."""
    if parametrize._cache_enabled:
        raise RuntimeError(
            "GradCache: expected parametrizations to be computed anew, got a call inside "
            "torch.nn.utils.parametrize.cached(); call it outside"
        )


@contextmanager
def frozen_running_statistics(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Keep norms in train mode from recording statistics, which the embed has recorded."""
    norms = _norms_in_training(modules)
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        # Instance norm records whenever it has buffers, so there the share of the new is zero.
        norm.track_running_stats = not isinstance(norm, _BatchNorm)
        norm.momentum = norm.momentum if isinstance(norm, _BatchNorm) else 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.track_running_stats = True
            norm.momentum = momentum


@contextmanager
def kept_running_statistics(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Put statistics back afterwards. A backward may run a norm again inside a checkpoint, which
    expects the same saved tensors, so the norm must record as it did in the embed."""
    norms = _norms_in_training(modules)
    before = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers(recurse=False)]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)


def warn_of_batch_norm(modules: Iterable[nn.Module]) -> bool:
    """Name the layers through which features depend on the chunk; False when there are none."""
    names = [
        name or type(child).__name__
        for module in {id(module): module for module in modules}.values()
        for name, child in module.named_modules()
        if normalises_by_chunk(child)
    ]
    if not names:
        return False
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    warnings.warn(
        "batch norm in train mode, or without running statistics, normalises each chunk by itself, "
        f"so gradients are those of chunk statistics and not of the one-shot step: {shown}. Put "
        "these layers in eval mode, or use a model with layer or group norm, to be exact.",
        stacklevel=5,
    )
    return True


def batch_norms_of(modules: Iterable[nn.Module]) -> list[nn.Module]:
    return [part for module in modules for part in module.modules() if isinstance(part, _BatchNorm)]


def has_batch_statistics(module: nn.Module) -> bool:
    """Whether a row's features depend on the other rows of its chunk."""
    return any(map(normalises_by_chunk, module.modules()))


def normalises_by_chunk(module: nn.Module) -> bool:
    """Whether it is a batch norm that uses the statistics of the rows that it is given."""
    return isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)


def _norms_in_training(modules: Iterable[nn.Module]) -> list[_NormBase]:
    """List norms that record running statistics."""
    return [
        child
        for module in {id(module): module for module in modules}.values()
        for child in module.modules()
        if isinstance(child, _NormBase) and child.training and child.track_running_stats
    ]
