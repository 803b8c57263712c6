"""What a step changes, so that every step of a verification begins alike and leaves no trace."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gradcache_clip.cache.nested import _children
from gradcache_clip.cache.random_state import RandomState
from gradcache_clip.cache.recovery import StepSnapshot
from gradcache_clip.cache.tower import Tower
from gradcache_clip.distributed.strategies import innermost

_PLAIN = (bool, int, float, complex, str, type(None), Tensor)

Gradients = dict[int, Tensor | None]
"""By id of the leaf."""


class Kept:
    """A tensor and the values that it had."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.before = tensor, tensor.detach().clone()

    @property
    def changed(self) -> bool:
        return not _bit_equal(self.tensor.detach(), self.before)

    @torch.no_grad()
    def put_back(self) -> None:
        # Written only where something changed: an expanded input cannot be written to.
        if self.changed:
            self.tensor.detach().resize_(self.before.shape).copy_(self.before)


class Start(StepSnapshot):
    """Gradients, generators, inputs, and what modules keep in buffers and plain attributes.

    Generators are torch's, numpy's, Python's, and those that a module holds as an attribute. What
    modules keep elsewhere, such as in lists, stays as the last step left it.
    """

    def __init__(self, modules: Sequence[nn.Module], towers: Sequence[Tower]) -> None:
        super().__init__(modules, towers)
        self.inputs = {
            path: Kept(tensor)
            for index, tower in enumerate(towers)
            for path, tensor in named_tensors(tower.inputs, f"input {index}")
        }
        children = (child for module in modules for child in innermost(module).modules())
        self._attributes = {id(child): _Attributes(child) for child in children}
        self._generators = list(_global_generators())

    def restore(self) -> None:
        """Everything as at the start, but for gradients, of which there are none."""
        super().restore()
        for put_back in self._generators:
            put_back()
        for kept in self.inputs.values():
            kept.put_back()
        for attributes in self._attributes.values():
            attributes.put_back()

    def end(self) -> None:
        """Everything as at the start, gradients too."""
        self.restore()
        self.finish()

    @property
    def leaves(self) -> list[Tensor]:
        """Every tensor that a step of this verification may give a gradient."""
        return [leaf for leaf, _ in self._aside.values()]

    def gradients(self) -> Gradients:
        """Copies, for DistributedDataParallel may write the next gradients into the same memory."""
        return {id(leaf): _dense(leaf.grad) for leaf in self.leaves}

    def random_state(self) -> RandomState:
        return RandomState.capture(self._devices)

    def changed_in(self, module: nn.Module) -> list[str]:
        """Buffers and plain attributes of a module that are not what they were at the start."""
        attributes = self._attributes.get(id(module))
        return [] if attributes is None else attributes.changed()


class _Attributes:
    """Buffers and plain attributes of one module."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._names = set(vars(module))
        self._buffers = dict(module._buffers)
        self._plain = {k: v for k, v in vars(module).items() if isinstance(v, _PLAIN)}
        named = [*self._buffers.items(), *self._plain.items()]
        self._tensors = {name: Kept(v) for name, v in named if isinstance(v, Tensor)}
        found = (_put_back_generator(value) for value in vars(module).values())
        self._generators = [put_back for put_back in found if put_back is not None]

    def put_back(self) -> None:
        for name in set(vars(self._module)) - self._names:
            del vars(self._module)[name]
        vars(self._module).update(self._plain)
        self._module._buffers.clear()
        self._module._buffers.update(self._buffers)
        for kept in self._tensors.values():
            kept.put_back()
        for put_back in self._generators:
            put_back()

    def changed(self) -> list[str]:
        now = {**vars(self._module), **self._module._buffers}
        before = {**self._plain, **self._buffers}
        written = {name for name, kept in self._tensors.items() if kept.changed}
        replaced = {name for name, value in before.items() if not _same(now.get(name), value)}
        return sorted(written | replaced | set(vars(self._module)) - self._names)


def named_tensors(inputs: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    """Tensors and writeable NumPy arrays inside `inputs`, each with its place."""
    if isinstance(inputs, Tensor):
        if not inputs.is_inference():
            yield path, inputs
        return
    if type(inputs).__module__ == "numpy":
        if inputs.dtype.kind in "biufc" and inputs.ndim and inputs.flags.writeable:
            yield path, torch.from_numpy(inputs)
        return
    children: Iterable[Any] = enumerate(inputs) if isinstance(inputs, list) else _children(inputs)
    for key, child in children:
        yield from named_tensors(child, f"{path}[{key!r}]")


def _global_generators() -> Iterator[Callable[[], object]]:
    yield partial(random.setstate, random.getstate())
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        yield partial(numpy.random.set_state, numpy.random.get_state())


def _put_back_generator(value: Any) -> Callable[[], object] | None:
    """Sets a generator back to where it is now; None for what is none."""
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
        return _bit_equal(one, other)
    return one is other or (type(one) is type(other) and bool(one == other))


def _bit_equal(one: Tensor, other: Tensor) -> bool:
    """NaN equals NaN."""
    if one.shape != other.shape or one.dtype != other.dtype or one.device != other.device:
        return False
    return torch.equal(*(x.detach().reshape(-1).view(torch.uint8) for x in (one, other)))
