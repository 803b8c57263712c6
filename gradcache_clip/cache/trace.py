"""Trace one pass of a tower over a chunk, module by module."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gradcache_clip.cache.batch_tree import tensors_in
from gradcache_clip.cache.chunks import Chunk
from gradcache_clip.cache.random_state import RandomState, accelerators_among
from gradcache_clip.cache.rounding import relative_change
from gradcache_clip.cache.torch_state import (
    forget_autocast_casts,
    kernels_as_with_gradients,
    normalises_by_chunk,
)
from gradcache_clip.cache.tower import Tower
from gradcache_clip.distributed.strategies import innermost

GENERATORS = ("torch", "numpy", "Python's random")


@dataclass(frozen=True)
class Place:
    """A module of an encoder, or its `get_features` (module None)."""

    label: str
    module: nn.Module | None = None


@dataclass
class Watched:
    """Trace of a pass.

    A moment is the entry to a module or its exit. Code that runs between two moments belongs to
    the innermost module that is active.
    """

    moments: list[tuple[str, list[Tensor]]] = field(default_factory=list)
    """Each module's label with the tensors that it was given or returned, in order."""
    difference: Place | None = None
    """The module whose code ran just before the first moment that was not as expected."""
    drew: dict[str, list[Place]] = field(default_factory=lambda: {name: [] for name in GENERATORS})
    """Modules whose code drew random numbers, by generator."""
    batch_norms: list[Place] = field(default_factory=list)
    """Batch norms that normalised by the rows they were given."""
    features: list[Tensor] = field(default_factory=list)


def watch(
    tower: Tower,
    chunk: Chunk,
    *,
    expected: Watched | None = None,
    tolerance: float = 0.0,
    with_graph: bool = False,
) -> Watched:
    """Run `chunk` and trace every module.

    With `expected`, a pass over the same rows or the first of them, every tensor is compared with
    its counterpart there at once, and none is kept.
    """
    watcher = _Watcher(tower, expected, tolerance)
    forget_autocast_casts()
    with (
        watcher.hooks(),
        eager(tower.bare_module),
        kernels_as_with_gradients(),
        torch.set_grad_enabled(with_graph),
    ):
        features = tower.forward(tower.bare_module, chunk)
        watcher.note(Place("get_features"), features)
    forget_autocast_casts()
    watcher.watched.features = [feature.detach() for feature in features]
    return watcher.watched


def run(tower: Tower, chunk: Chunk) -> list[Tensor]:
    """Return the features of one pass without a graph or a trace."""
    forget_autocast_casts()
    with torch.no_grad(), kernels_as_with_gradients():
        return [feature.clone() for feature in tower.forward(tower.bare_module, chunk)]


def largest_change(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Return the largest relative change of a row; `after` may have further rows and columns."""
    pairs = zip(before, after, strict=False)
    return max((_change(one, other) for one, other in pairs), default=0.0)


class _Watcher:
    def __init__(self, tower: Tower, expected: Watched | None, tolerance: float) -> None:
        self.watched = Watched()
        self._root = innermost(tower.bare_module)
        self._expected, self._tolerance = expected, tolerance
        self._devices = accelerators_among(tower.known_tensors())
        self._stack: list[Place] = []
        self._generators = self._read_generators()

    @contextmanager
    def hooks(self) -> Iterator[None]:
        with ExitStack() as stack:
            for name, module in self._root.named_modules():
                place = Place(f"{name or 'the encoder'} ({type(module).__name__})", module)
                for handle in self._hooks_of(place, module):
                    stack.callback(handle.remove)
            yield

    def _hooks_of(self, place: Place, module: nn.Module) -> Iterator[Any]:
        def enter(_module: nn.Module, args: Any, kwargs: Any) -> None:
            self.note(self._stack[-1] if self._stack else Place("the input"), (args, kwargs))
            self._stack.append(place)
            if normalises_by_chunk(module):
                self.watched.batch_norms.append(place)

        def leave(_module: nn.Module, _args: Any, output: Any) -> None:
            self.note(self._stack.pop(), output)

        yield module.register_forward_pre_hook(enter, with_kwargs=True)
        yield module.register_forward_hook(leave)

    def note(self, place: Place, given: Any) -> None:
        """Record a moment, at the end of code that belongs to `place`."""
        generators = self._read_generators()
        for name, before, after in zip(GENERATORS, self._generators, generators, strict=True):
            if before != after and place not in self.watched.drew[name]:
                self.watched.drew[name].append(place)
        self._generators = generators
        tensors = [tensor.detach() for tensor in tensors_in(given)]
        index = len(self.watched.moments)
        if self._expected is None:
            self.watched.moments.append((place.label, [tensor.clone() for tensor in tensors]))
            return
        self.watched.moments.append((place.label, []))
        if self.watched.difference is None and index < len(self._expected.moments):
            label, before = self._expected.moments[index]
            # Written so that NaN counts as a difference.
            if label != place.label or not largest_change(before, tensors) <= self._tolerance:
                self.watched.difference = place

    def _read_generators(self) -> list[Any]:
        torch_state = RandomState.capture(self._devices)
        tensors = [torch_state.cpu, *(state for _, state in torch_state.devices)]
        return [
            [tensor.numpy().tobytes() for tensor in tensors],
            _numpy_state(),
            random.getstate(),
        ]


def _numpy_state() -> Any:
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return None
    _, key, *rest = numpy.random.get_state()
    return key.tobytes(), rest


def eager(module: nn.Module) -> AbstractContextManager[Any]:
    """Run compiled modules eagerly: compiled code would bypass the hooks."""
    compiled = hasattr(module, "_orig_mod") or any(
        child._compiled_call_impl is not None for child in module.modules()
    )
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


def _change(one: Tensor, other: Tensor) -> float:
    other = _first_of_each_dimension(other, one.shape)
    if one.shape != other.shape or one.dtype != other.dtype:
        # No counterpart, such as an index into all rows of a batch.
        return 0.0
    if one.is_complex():
        one, other = torch.view_as_real(one), torch.view_as_real(other)
    same = (one == other) | ((one != one) & (other != other))
    if bool(same.all()):
        return 0.0
    if not one.is_floating_point():
        return 1.0
    # An infinity on both sides, such as in an attention mask, has no relative change.
    stayed = same & ~one.isfinite()
    one, other = one.masked_fill(stayed, 0), other.masked_fill(stayed, 0)
    return float(relative_change(*(x if x.ndim else x[None] for x in (one, other))))


def _first_of_each_dimension(tensor: Tensor, shape: torch.Size) -> Tensor:
    if tensor.ndim == len(shape):
        for dimension, size in enumerate(shape):
            if tensor.shape[dimension] > size:
                tensor = tensor.narrow(dimension, 0, size)
    return tensor
