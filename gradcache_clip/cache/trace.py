"""Trace one pass of a tower over a chunk, module by module."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from gradcache_clip.cache.batch_tree import tensors_in
from gradcache_clip.cache.chunks import Chunk
from gradcache_clip.cache.random_state import HostState, RandomState, accelerators_among
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

    @property
    def place(self) -> str:
        """The innermost module that is active."""
        return self._stack[-1].label if self._stack else "the input"

    def note(self, place: Place, given: Any) -> None:
        """Record a moment, at the end of code that belongs to `place`."""
        torch_state, host_state = self._generators
        self._generators = self._read_generators()
        drawn = ["torch"] if not torch_state.equals(self._generators[0]) else []
        for name in drawn + host_state.drawn_from():
            if place not in self.watched.drew[name]:
                self.watched.drew[name].append(place)
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

    def _read_generators(self) -> tuple[RandomState, HostState]:
        return RandomState.capture(self._devices), HostState.capture()


def maker_of(tower: Tower, chunk: Chunk, like: Tensor) -> str:
    """Name the module in which a pass over the chunk makes a tensor like this one that stays."""
    watcher = _Watcher(tower, None, 0.0)
    makers = _Makers(watcher)
    try:
        with watcher.hooks(), eager(tower.bare_module), torch.no_grad(), makers:
            tower.forward(tower.bare_module, chunk)
    except Exception:  # The search must not hide what was found.
        return ""
    del watcher.watched
    # Those that stay, and that no module holds itself; chunks may have another number of rows.
    held = {id(x) for part in tower.bare_module.modules() for x in pytree.tree_leaves(vars(part))}
    for made, place in makers.made:
        tensor = made()
        if tensor is not None and id(tensor) not in held and _alike(tensor, like):
            return place
    return ""


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.ndim == other.ndim and one.shape[1:] == other.shape[1:] and one.dtype == other.dtype


class _Makers(TorchDispatchMode):
    def __init__(self, watcher: _Watcher) -> None:
        super().__init__()
        self._watcher = watcher
        self.made: list[tuple[weakref.ref[Tensor], str]] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        output = function(*args, **(kwargs or {}))
        tensors = [each for each in pytree.tree_leaves(output) if isinstance(each, Tensor)]
        self.made.extend((weakref.ref(tensor), self._watcher.place) for tensor in tensors)
        return output


class Operations(TorchDispatchMode):
    """Notes the operations of passes with the shapes and precisions of their results.

    Equal operations on equal shapes run the same kernels.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[tuple[Any, list[torch.Size]]] = []
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        output = function(*args, **(kwargs or {}))
        tensors = [each for each in pytree.tree_leaves(output) if isinstance(each, Tensor)]
        self.kernels.append((function, [tensor.shape for tensor in tensors]))
        self.dtypes.update(tensor.dtype for tensor in tensors if tensor.is_floating_point())
        return output


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
