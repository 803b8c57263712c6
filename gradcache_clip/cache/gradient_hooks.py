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

from gradcache_clip.cache.batch_tree import tensors_in
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
    if strategy.talks and not strategy.reduces:
        raise ValueError(
            'gradient_hooks: expected "every_chunk" or no hooks with reduce_myself=True, where '
            f'gradients are finished after your own reduction, got "once" and {what}; pass '
            "strategy=AllReduceStrategy(), or run them after the reduction"
        )


class HeldHooks:
    """Hooks taken off for a step, and run on each leaf's gradient once it is finished.

    A hook of `register_hook` is given the gradient of this step, whatever `.grad` held before; one
    of `register_post_accumulate_grad_hook` the leaf with their sum, as after a single backward.
    """

    def __init__(self, hooked: Sequence[Hooked] = (), *, on_parts: bool = False) -> None:
        self._waiting = {} if on_parts else {id(each.leaf): each for each in hooked}
        self._on_parts = hooked if on_parts else None
        self._snapshot: StepSnapshot | None = None
        self._left: Counter[int] = Counter()
        self._earlier: dict[int, Tensor | None] = {}
        self._before: dict[int, Any] = {}
        self._after: dict[int, Any] = {}

    @contextmanager
    def held(self, snapshot: StepSnapshot | None = None) -> Iterator[None]:
        """Hold hooks during a step; after an error restore `.grad` where they have not run."""
        self._snapshot = snapshot
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
        # A copy, for it may be a view of a bucket that the next backward fills.
        self._earlier[id(leaf)] = None if leaf.grad is None else leaf.grad.clone()
        leaf.grad = None

    @property
    def waiting(self) -> bool:
        return bool(self._waiting)

    def check_leaves(self, tower: Tower, leaves: Iterable[Tensor]) -> None:
        """Refuse hooks on leaves that no module has registered, so that they could not be held."""
        for leaf in leaves:
            hooks = [*_before(leaf).values(), *_after(leaf).values()]
            if self._on_parts is None and not all(map(_is_wrappers, hooks)):
                raise ValueError(
                    f"{tower.name}: expected hooks on parameters that a module has registered, got "
                    f"{_described(hooks[0])} on a tensor of shape {tuple(leaf.shape)} that only a "
                    "function or attribute holds; make it a parameter of the encoder, or of a "
                    'module in get_features, or pass gradient_hooks="every_chunk"'
                )

    def expect(self, replays: Iterable[Tower]) -> None:
        """Note how often each tower will be replayed; leaves of none of them are finished."""
        if any(_after(each.leaf) for each in self._on_parts or ()):
            self._note_change()
        self._left = Counter(map(id, replays))
        self._run_finished()

    def leave_to_autograd(self, leaves: Iterable[Tensor]) -> None:
        """Let hooks of the loss's own parameters run: their gradient is complete at once."""
        for leaf in leaves:
            if self._snapshot is not None and _after(leaf):
                leaf.grad = self._snapshot.taken_back(leaf)
                self._note_change()

    def _note_change(self) -> None:
        if self._snapshot is not None:
            self._snapshot.changed = "hooks have run on gradients, such as an optimizer's"

    def replayed(self, towers: Iterable[Tower]) -> None:
        """Run the hooks of leaves to which no replay is left to add."""
        self._left.subtract(map(id, towers))
        self._run_finished()

    def _run_finished(self) -> None:
        for hooked in list(self._waiting.values()):
            if not any(self._left[id(tower)] for tower in hooked.towers):
                self._run(hooked.leaf)
                hooked.leaf._backward_hooks = OrderedDict({0: partial(_refuse, hooked.name)})

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
        for hook in self._before[id(leaf)].values():
            result = hook(gradient)
            gradient = gradient if result is None else result
        after = list(self._after[id(leaf)].values())
        if after and self._snapshot is not None:
            self._note_change()
            earlier = self._snapshot.taken_back(leaf)
        leaf.grad = gradient if earlier is None else earlier + gradient
        for hook in after:
            hook(leaf)


def held_hooks(mode: str, towers: Sequence[Tower], strategy: LocalStrategy) -> HeldHooks:
    """Check hooks on gradients, and prepare to hold them for one step as `mode` says.

    Raises:
        ValueError: as `check_hooks`.
    """
    hooked = hooked_leaves(towers)
    check_hooks(mode, hooked, strategy)
    return HeldHooks(hooked, on_parts=mode == "every_chunk")


def _named_leaves(tower: Tower) -> Iterator[tuple[str, Tensor]]:
    for module in tower.modules:
        yield from module.named_parameters()
    for tensor in tensors_in(tower.passed):
        if tensor.requires_grad and tensor.is_leaf:
            yield "an input", tensor


def _refuse(name: str, gradient: Tensor | None) -> None:
    """Raise: a tower that has not registered the parameter used it after its hooks had run."""
    if gradient is not None:
        raise RuntimeError(
            f"{name}: expected only encoders that have registered it to use a parameter with "
            "hooks, got another use, after its hooks have run; register it in every encoder that "
            'uses it, or pass gradient_hooks="every_chunk"'
        )


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
    """Return the function inside a functools.partial."""
    while isinstance(hook, partial):
        hook = hook.func
    return hook
