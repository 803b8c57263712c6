"""Hold hooks back, put weights and optimizers back: a verification changes nothing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from gradcache_clip.cache.kept import Kept


class HeldAfterHooks:
    """Post-accumulate hooks, kept from running until `release`."""

    def __init__(self, leaves: Iterable[Tensor]) -> None:
        self.leaves: list[Tensor] = []
        self._held: list[tuple[dict[int, Any], dict[int, Any]]] = []
        for leaf in leaves:
            self.hold(leaf)

    def hold(self, leaf: Tensor) -> None:
        hooks = getattr(leaf, "_post_accumulate_grad_hooks", None)
        if hooks:
            # Emptied in place: autograd and the handles of the hooks refer to this very dict.
            self._held.append((hooks, dict(hooks)))
            hooks.clear()
            self.leaves.append(leaf)

    def release(self) -> None:
        for hooks, before in self._held:
            hooks.update(before)
        self._held.clear()


class KeptOptimizers:
    """Optimizers that step before `release`, each with its state before its first step."""

    def __init__(self) -> None:
        self._kept: dict[int, _KeptOptimizer] = {}
        self._handle = register_optimizer_step_pre_hook(self._keep)

    def _keep(self, optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        if id(optimizer) not in self._kept:
            self._kept[id(optimizer)] = _KeptOptimizer(optimizer)

    def put_back(self) -> None:
        for kept in self._kept.values():
            kept.put_back()

    def release(self) -> None:
        self._handle.remove()


class _KeptOptimizer:
    """Weights, state and settings of an optimizer."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._state = optimizer.state
        self._groups = [(group, dict(group)) for group in optimizer.param_groups]
        self._entries = [(key, entry, dict(entry)) for key, entry in optimizer.state.items()]
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        tables = [before for _, before in self._groups]
        tables += [before for _, _, before in self._entries]
        values = [value for table in tables for value in table.values()]
        tensors = [*weights, *(value for value in values if isinstance(value, Tensor))]
        self._tensors = [Kept(tensor) for tensor in tensors]

    def put_back(self) -> None:
        self._state.clear()
        for key, entry, before in self._entries:
            refill(entry, before)
            self._state[key] = entry
        for group, before in self._groups:
            refill(group, before)
        for kept in self._tensors:
            kept.put_back()


def refill(table: dict[Any, Any], before: dict[Any, Any]) -> None:
    table.clear()
    table.update(before)
