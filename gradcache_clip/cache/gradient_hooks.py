"""Hooks on the gradients of parameters, which autograd would run once per chunk.

A hook that clips sees parts of a gradient then, and an optimizer in a hook steps once per chunk.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from gradcache_clip.cache.nested import tensors_in
from gradcache_clip.cache.recovery import StepSnapshot
from gradcache_clip.cache.tower import Tower
from gradcache_clip.distributed.strategies import LocalStrategy

MODES = ("error", "once", "every_chunk")
# Wrappers put their own hooks on parameters, and know that a step has several backwards.
_WRAPPERS = ("torch.distributed", "torch.nn.parallel", "deepspeed")


@dataclass
class Hooked:
    """A leaf with hooks of the caller's, and the towers whose replays add to its gradient."""

    name: str
    leaf: Tensor
    towers: list[Tower]

    @property
    def hooks(self) -> list[Callable[..., Any]]:
        return [*_before(self.leaf).values(), *_after(self.leaf).values()]


def hooked_leaves(towers: Iterable[Tower]) -> list[Hooked]:
    """Parameters and leaf inputs of towers that carry hooks which no wrapper put there."""
    found: dict[int, Hooked] = {}
    for tower in towers:
        for name, leaf in _named_leaves(tower):
            # One look at two attributes for nearly all of them.
            if not (_before(leaf) or _after(leaf)):
                continue
            hooked = found.setdefault(id(leaf), Hooked(f"{tower.name}: {name}", leaf, []))
            if not any(each is tower for each in hooked.towers):
                hooked.towers.append(tower)
    return [each for each in found.values() if not all(map(_is_wrappers, each.hooks))]


def check_hooks(mode: str, hooked: Sequence[Hooked], strategy: LocalStrategy) -> None:
    """Refuse hooks that nobody said how often to run, or that see no finished gradient.

    Raises:
        ValueError: before any gradient is touched.
    """
    if not hooked or mode == "every_chunk":
        return
    first, more = hooked[0], f" and {len(hooked) - 1} more" if len(hooked) > 1 else ""
    what = f"{first.name}{more} with {_described(first.hooks[0])}"
    if mode == "error":
        raise ValueError(
            f"gradient_hooks: expected parameters without hooks on their gradients, got {what}, "
            'which would run once per chunk on parts of the gradient; pass gradient_hooks="once" '
            'to run hooks on the finished gradient, or "every_chunk" if parts are what they want'
        )
    if not strategy.fills_grad:
        raise ValueError(
            f'gradient_hooks: expected "every_chunk" or no hooks under {type(strategy).__name__}, '
            f'whose engine keeps the gradients to itself, got "once" and {what}; let the engine '
            "clip and step"
        )


class HeldHooks:
    """Hooks taken off for a step, and run on each leaf's gradient once it is finished.

    A hook of `register_hook` is given the gradient of this step, whatever `.grad` held before; one
    of `register_post_accumulate_grad_hook` the leaf with their sum, as after a single backward.
    """

    def __init__(self, hooked: Sequence[Hooked], snapshot: StepSnapshot | None = None) -> None:
        self._waiting = {id(each.leaf): each for each in hooked}
        self._snapshot = snapshot
        self._left: Counter[int] = Counter()
        self._earlier: dict[int, Tensor | None] = {}
        self._before: dict[int, Any] = {}
        self._after: dict[int, Any] = {}

    @contextmanager
    def held(self) -> Iterator[None]:
        """Around a step; after an error `.grad` of leaves whose hooks have not run is as before."""
        leaves = [each.leaf for each in self._waiting.values()]
        for leaf in leaves:
            self._hold(leaf)
        try:
            yield
        finally:
            for leaf in leaves:
                leaf._backward_hooks = self._before[id(leaf)]
                leaf._post_accumulate_grad_hooks = self._after[id(leaf)]
                if id(leaf) in self._waiting:
                    leaf.grad = self._earlier[id(leaf)]

    def _hold(self, leaf: Tensor) -> None:
        self._before[id(leaf)], self._after[id(leaf)] = _before(leaf), _after(leaf)
        # Empty ones, for None leaves the C++ side of the old ones in place.
        leaf._backward_hooks = OrderedDict()
        leaf._post_accumulate_grad_hooks = OrderedDict()
        self._earlier[id(leaf)], leaf.grad = leaf.grad, None

    def expect(self, replays: Iterable[Tower]) -> None:
        """Towers as often as they will be replayed; a leaf of none of them is finished."""
        self._left = Counter(map(id, replays))
        self._run_finished()

    def replayed(self, towers: Iterable[Tower]) -> None:
        """Run the hooks of leaves to which no replay is left to add."""
        if self._waiting:
            self._left.subtract(map(id, towers))
            self._run_finished()

    def _run_finished(self) -> None:
        for hooked in list(self._waiting.values()):
            if not any(self._left[id(tower)] for tower in hooked.towers):
                self._run(hooked.leaf)

    def run_all(self) -> None:
        """Run those that wait for the gradients of all ranks."""
        for hooked in list(self._waiting.values()):
            self._run(hooked.leaf)

    def _run(self, leaf: Tensor) -> None:
        del self._waiting[id(leaf)]
        earlier, gradient = self._earlier.pop(id(leaf)), leaf.grad
        if gradient is None:
            leaf.grad = earlier
            return
        if self._snapshot is not None:
            self._snapshot.changed = "hooks have run on gradients, such as an optimizer's"
            earlier = self._snapshot.taken_back(leaf)
        for hook in self._before[id(leaf)].values():
            result = hook(gradient)
            gradient = gradient if result is None else result
        leaf.grad = gradient if earlier is None else earlier + gradient
        for hook in self._after[id(leaf)].values():
            hook(leaf)


@contextmanager
def without_hooks(towers: Iterable[Tower]) -> Iterator[None]:
    """Around backwards that are no step, such as those that measure a chunk size."""
    with HeldHooks(hooked_leaves(towers)).held():
        yield


def _named_leaves(tower: Tower) -> Iterator[tuple[str, Tensor]]:
    for module in tower.modules:
        yield from module.named_parameters()
    for tensor in tensors_in(tower.inputs):
        if tensor.requires_grad and tensor.is_leaf:
            yield "an input", tensor


def _before(leaf: Tensor) -> Any:
    """Hooks on the gradient that arrives."""
    hooks = leaf._backward_hooks
    return OrderedDict() if hooks is None else hooks


def _after(leaf: Tensor) -> Any:
    """Hooks that run once it was added to `.grad`."""
    hooks = getattr(leaf, "_post_accumulate_grad_hooks", None)
    return OrderedDict() if hooks is None else hooks


def _is_wrappers(hook: Callable[..., Any]) -> bool:
    return str(getattr(_unwrapped(hook), "__module__", "")).startswith(_WRAPPERS)


def _described(hook: Callable[..., Any]) -> str:
    hook = _unwrapped(hook)
    name = getattr(hook, "__qualname__", type(hook).__name__)
    return f"the hook {name} of {getattr(hook, '__module__', '?')}"


def _unwrapped(hook: Any) -> Any:
    """The function in a functools.partial."""
    while isinstance(hook, partial):
        hook = hook.func
    return hook
