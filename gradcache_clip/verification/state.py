"""Capture what a step changes, so that every step of a verification starts alike."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gradcache_clip.cache.kept import Kept, bit_equal, named_tensors
from gradcache_clip.cache.random_state import RandomState
from gradcache_clip.cache.recovery import StepSnapshot
from gradcache_clip.cache.tower import Tower
from gradcache_clip.distributed.strategies import innermost
from gradcache_clip.verification.kept import HeldAfterHooks, KeptOptimizers, refill

_PLAIN = (bool, int, float, complex, str, type(None), Tensor)

Gradients = dict[int, Tensor | None]
"""By id of the leaf."""


class Start(StepSnapshot):
    """Gradients, weights, generators, inputs, buffers and plain attributes at the start.

    Generators are torch's, numpy's, Python's, and those that a module holds as an attribute.
    Frozen parameters are not copied, nor what modules keep elsewhere, such as in lists.
    """

    def __init__(self, modules: Sequence[nn.Module], towers: Sequence[Tower]) -> None:
        self._weights: dict[int, Kept] = {}
        self._held: HeldAfterHooks | None = None
        self._optimizers: KeptOptimizers | None = None
        super().__init__(modules, towers)
        self.inputs = {
            path: Kept(tensor)
            for index, tower in enumerate(towers)
            for path, tensor in named_tensors(tower.passed, f"input {index}")
        }
        children = (child for module in modules for child in innermost(module).modules())
        self._attributes = {id(child): _Attributes(child) for child in children}
        self._generators = list(_global_generators())

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Hold hooks back meanwhile; afterwards put back everything, gradients too."""
        self._optimizers, self._held = KeptOptimizers(), HeldAfterHooks(self.leaves)
        try:
            yield
        finally:
            self._optimizers.release()
            self._held.release()
            self.restore()
            self.finish()

    def set_aside(self, leaves: Iterable[Tensor]) -> None:
        leaves = [leaf for leaf in leaves if leaf.requires_grad and leaf.is_leaf]
        for leaf in leaves:
            if id(leaf) not in self._weights:
                self._weights[id(leaf)] = Kept(leaf)
            if self._held is not None:
                self._held.hold(leaf)
        super().set_aside(leaves)

    def taken_back(self, leaf: Tensor) -> Tensor | None:
        """Keep earlier gradients aside: hooks of a verification see those of its step alone."""
        return None

    def restore(self) -> None:
        """Put back everything but gradients, which become None."""
        super().restore()
        for put_back in self._generators:
            put_back()
        if self._optimizers is not None:
            self._optimizers.put_back()
        for kept in (*self._weights.values(), *self.inputs.values()):
            kept.put_back()
        for attributes in self._attributes.values():
            attributes.put_back()

    @property
    def leaves(self) -> list[Tensor]:
        """Every tensor that a step may give a gradient."""
        return [leaf for leaf, _ in self._aside.values()]

    @property
    def held(self) -> list[Tensor]:
        """Leaves whose post-accumulate hooks are held back."""
        return [] if self._held is None else self._held.leaves

    def gradients(self) -> Gradients:
        """Copy them: DistributedDataParallel may write the next gradients into the same memory."""
        return {id(leaf): _dense(leaf.grad) for leaf in self.leaves}

    def random_state(self) -> RandomState:
        return RandomState.capture(self._devices)

    def changed_in(self, module: nn.Module) -> list[str]:
        """Name the buffers, plain attributes and frozen parameters that a module has changed."""
        attributes = self._attributes.get(id(module))
        return [] if attributes is None else attributes.changed()


class _Attributes:
    """Parameters, buffers and plain attributes of one module; values of the latter two."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._names = set(vars(module))
        self._buffers, self._parameters = dict(module._buffers), dict(module._parameters)
        frozen = [(k, p) for k, p in self._parameters.items() if p is not None]
        self._frozen = {k: (p, p._version) for k, p in frozen if not p.requires_grad}
        self._plain = {k: v for k, v in vars(module).items() if isinstance(v, _PLAIN)}
        named = [*self._buffers.items(), *self._plain.items()]
        self._tensors = {name: Kept(v) for name, v in named if isinstance(v, Tensor)}
        found = (_put_back_generator(value) for value in vars(module).values())
        self._generators = [put_back for put_back in found if put_back is not None]

    def put_back(self) -> None:
        for name in set(vars(self._module)) - self._names:
            del vars(self._module)[name]
        vars(self._module).update(self._plain)
        refill(self._module._buffers, self._buffers)
        refill(self._module._parameters, self._parameters)
        for kept in self._tensors.values():
            kept.put_back()
        for put_back in self._generators:
            put_back()

    def changed(self) -> list[str]:
        now = {**vars(self._module), **self._module._buffers}
        before = {**self._plain, **self._buffers}
        written = {name for name, kept in self._tensors.items() if kept.changed}
        replaced = {name for name, value in before.items() if not _same(now.get(name), value)}
        frozen = {name for name, (p, version) in self._frozen.items() if p._version != version}
        return sorted(written | replaced | frozen | set(vars(self._module)) - self._names)


def _global_generators() -> Iterator[Callable[[], object]]:
    yield partial(random.setstate, random.getstate())
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        yield partial(numpy.random.set_state, numpy.random.get_state())


def _put_back_generator(value: Any) -> Callable[[], object] | None:
    """A function that sets a generator back to its present state; None for other values."""
    if isinstance(value, torch.Generator):
        return partial(value.set_state, value.get_state())
    if isinstance(value, random.Random):
        return partial(value.setstate, value.getstate())
    if not type(value).__module__.startswith("numpy.random"):
        return None
    if hasattr(value, "bit_generator"):
        return partial(setattr, value.bit_generator, "state", value.bit_generator.state)
    return partial(value.set_state, value.get_state()) if hasattr(value, "set_state") else None


def _dense(gradient: Tensor | None) -> Tensor | None:
    if gradient is None:
        return None
    return gradient.to_dense() if gradient.is_sparse else gradient.clone()


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return bit_equal(one, other)
    return one is other or (type(one) is type(other) and bool(one == other))
