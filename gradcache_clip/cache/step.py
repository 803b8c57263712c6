"""One gradient-caching step over towers that are built for it: embed, loss, replay."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, groupby
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gradcache_clip.cache.checks import (
    check_finite,
    check_leaves,
    check_same_chunks,
    check_unchanged,
    scalar_loss_of,
)
from gradcache_clip.cache.chunks import Chunk
from gradcache_clip.cache.finished_loss import finished
from gradcache_clip.cache.gradient_hooks import HeldHooks
from gradcache_clip.cache.graph_budget import GraphBudget, Retention
from gradcache_clip.cache.random_state import RandomState
from gradcache_clip.cache.recovery import StepSnapshot
from gradcache_clip.cache.replay_check import ReplayCheck, failures_of
from gradcache_clip.cache.row_check import check_rows
from gradcache_clip.cache.schedule import replay_order
from gradcache_clip.cache.settings import History, Settings
from gradcache_clip.cache.torch_state import (
    autocast_off,
    forget_autocast_casts,
    frozen_running_statistics,
    kept_running_statistics,
)
from gradcache_clip.cache.tower import Tower, modules_of, trained_modules
from gradcache_clip.distributed.graph import leaves_behind
from gradcache_clip.distributed.strategies import LocalStrategy


class CachedStep:
    """Embed, loss and replay of one batch, which is cut and checked.

    Attributes:
        phase: "embed", "loss" or "replay", whichever was begun last.
    """

    def __init__(
        self,
        settings: Settings,
        strategy: LocalStrategy,
        towers: list[Tower],
        hooks: HeldHooks,
        budget: GraphBudget,
        history: History,
    ) -> None:
        self.towers, self.strategy, self.phase = towers, strategy, "embed"
        self._settings, self._hooks, self._budget = settings, hooks, budget
        self._history, self._rows_checked = history, history.rows_checked
        self._snapshot: StepSnapshot | None = None
        self._device_types: set[str] = set()
        self._autocasts = True
        self._looked_behind: set[str] = set()

    @property
    def modules(self) -> list[nn.Module]:
        """Encoders, heads, and the loss if it is a module."""
        return modules_of(self.towers, self._settings.loss)

    def run(
        self, loss_kwargs: Mapping[str, Any], snapshot: StepSnapshot | None = None
    ) -> tuple[Any, str]:
        """Fill `.grad`; return the detached output of the loss, and mismatches to warn of.

        A snapshot learns of leaves and changes that it could not know of before.
        """
        self._snapshot = snapshot
        with self._noting_errors(), self._hooks.held(snapshot):
            with self.strategy.step_context(trained_modules(self.towers)):
                self.embed()
                output = self._backward_of_loss(loss_kwargs)
                check = self.replay()
            return output, self._finish(check)

    def run_replay(self, gradients: Sequence[Tensor | None]) -> str:
        """Fill `.grad` from the gradients of all features; return mismatches to warn of."""
        self.phase, flat, factor = "replay", iter(gradients), self.strategy.gradient_factor()
        for tower in self.towers:
            tower.gradients = [_times(next(flat), factor) for _ in tower.features]
        with self._noting_errors(), self._hooks.held():
            with self.strategy.step_context(trained_modules(self.towers)):
                check = self.replay()
            return self._finish(check)

    def _finish(self, check: ReplayCheck) -> str:
        self._hooks.run_all()
        failures = failures_of(check, self._settings.replay_check, self.strategy)
        self._history.stepped, self._history.rows_checked = True, self._rows_checked
        return failures

    @contextmanager
    def _noting_errors(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            # A snapshot takes back what was added, and there is nothing before the loss.
            undone = self._snapshot is not None and self._snapshot.changed is None
            self._history.broken_off = not undone and self.phase != "embed"
            raise

    def embed(self) -> None:
        """Fill every tower's `features`; graphs are kept as far as the budget goes."""
        unknown = [tower for tower in self.towers if tower.trainable is None]
        for tower, retention in zip(self.towers, self._retentions(), strict=True):
            tower.embed(retention)
        self.strategy.embedded()
        together = any(tower.embed_chunk_size is not None for tower in self.towers)
        if self.strategy.collective_forward and together:
            # Chunks that drew random numbers together are replayed together.
            check_same_chunks(self.strategy, self.towers)
        for tower in unknown:
            # What one rank's rows leave without a graph, those of another may train.
            device = tower.features[0].device
            tower.trainable = self.strategy.anywhere(bool(tower.trainable), device)
        check_finite(self.towers, self.strategy)
        if self._settings.check_rows and not self._rows_checked:
            self._rows_checked = check_rows(self.towers, self.strategy)
        self._device_types = device_types(self.towers)

    def _retentions(self) -> list[Retention]:
        budget = self._budget
        if self.strategy.joint_first_and_last:
            # The first and the last replay go through the wrapper that exchanges gradients.
            ends = [range(1, len(t.chunks) - 1) for t in self.towers]
            return [Retention(budget, t.chunks, r) for t, r in zip(self.towers, ends, strict=True)]
        places = range(len(self.towers))
        # Where all are unknown the last one may turn out to be frozen; then none is kept.
        last = max((i for i in places if self.towers[i].trainable), default=places[-1])
        return [
            Retention(budget, t.chunks, range(n), always=n - 1 if i == last else None)
            for i, t, n in ((i, self.towers[i], len(self.towers[i].chunks)) for i in places)
        ]

    def _backward_of_loss(self, loss_kwargs: Mapping[str, Any]) -> Any:
        """Fill every tower's `gradients`, and `.grad` of the loss's own parameters."""
        self.phase = "loss"
        leaves = [
            [feature.requires_grad_(_takes_gradient(tower, feature)) for feature in tower.features]
            for tower in self.towers
        ]
        features = [
            pytree.tree_unflatten(flat, tower.structure)
            for tower, flat in zip(self.towers, leaves, strict=True)
        ]
        versions = [feature._version for tower in self.towers for feature in tower.features]
        forget_autocast_casts()
        output = self._settings.loss(*features, **loss_kwargs)
        loss = scalar_loss_of(output)
        check_unchanged(self.towers, versions)
        if self._snapshot is not None:
            reached = list(leaves_behind([loss]))
            self._snapshot.set_aside(reached)
            self._hooks.leave_to_autograd(reached)
        with autocast_off(self._device_types):
            self.strategy.backward_of_loss(loss, [leaf for flat in leaves for leaf in flat])
        factor = self.strategy.gradient_factor()
        for tower, flat in zip(self.towers, leaves, strict=True):
            tower.gradients = [_taken_gradient(leaf, factor) for leaf in flat]
        return finished(output, loss)

    def replay(self) -> ReplayCheck:
        """Every tower's `gradients` go into the parameters; what both passes computed, compared."""
        self.phase = "replay"
        towers = [tower for tower in self.towers if tower.trainable]
        device = self.towers[0].features[0].device
        check, order = ReplayCheck(device), _replays(towers, self.strategy)
        replayed = [chunk for _, chunk in chain(*order) if not chunk.graph]
        states = [chunk.random_state for chunk in replayed if chunk.random_state is not None]
        after_embed = RandomState.capture(_drawn_on(states)) if states else None
        norms = [module for tower in towers for module in tower.modules]
        self._autocasts = any(map(torch.is_autocast_enabled, self._device_types))
        copies = any(tower.copies for tower in towers)
        upcoming = [*order[1:], []] if copies else [[]] * len(order)
        if not self.strategy.reduces:
            self._hooks.expect(tower for tower, _ in chain(*order))
        once = self._hooks.waiting and not self.strategy.reduces
        turns = zip(map(_is_kept, order), order, _encoders(order), upcoming, strict=True)
        try:
            for kept, same in groupby(turns, key=itemgetter(0)):
                with (kept_running_statistics if kept else frozen_running_statistics)(norms):
                    for _, group, (modules, finished), following in same:
                        with self.strategy.replay_context(modules, finished):
                            self._replay_together(group, check, kept)
                        if once:
                            self._hooks.replayed(tower for tower, _ in group)
                        for tower, chunk in following:
                            if chunk.graph is None:
                                tower.expect(chunk)
        finally:
            # Whatever draws next continues from where one pass over the batch would have left off.
            if after_embed is not None:
                after_embed.restore()
            forget_autocast_casts()
        return check

    def _replay_together(
        self, group: Sequence[tuple[Tower, Chunk]], check: ReplayCheck, kept: bool
    ) -> None:
        """Forward the chunks that left no graph, then one backward for all of them."""
        if not kept:
            forget_autocast_casts()
        compares = self._settings.replay_check != "off"
        looks = not self._history.stepped or self._snapshot is not None
        reached: list[Tensor] = []
        gradients: list[Tensor] = []
        for tower, chunk in group:
            graph, chunk.graph = chunk.graph, None
            features = tower.replay(chunk) if graph is None else graph
            if compares and graph is None:
                check.compare(tower, chunk, features)
            if looks and tower.name not in self._looked_behind:
                self._look_behind(tower, features)
            for feature, gradient in zip(features, tower.gradients, strict=True):
                if gradient is not None and feature.requires_grad:
                    reached.append(feature)
                    gradients.append(gradient[chunk.rows])
        if self._autocasts:
            with autocast_off(self._device_types):
                self.strategy.backward(reached, gradients)
        else:
            self.strategy.backward(reached, gradients)

    def _look_behind(self, tower: Tower, features: Sequence[Tensor]) -> None:
        """Leaves that no module has registered: refused where they go wrong, or set aside."""
        leaves = list(leaves_behind(features))
        if not self._history.stepped:
            check_leaves(tower, leaves, self.strategy)
            self._hooks.check_leaves(tower, leaves)
        if self._snapshot is not None:
            self._snapshot.set_aside(leaves)
        # One chunk shows what an encoder hides; a function may use other parameters each time.
        if tower.get_features is None or isinstance(tower.get_features, nn.Module):
            self._looked_behind.add(tower.name)


def _replays(towers: list[Tower], strategy: LocalStrategy) -> list[list[tuple[Tower, Chunk]]]:
    """Groups that share one backward; a chunk whose graph is there is one, and gives way early."""
    kept = [[(tower, chunk)] for tower in towers for chunk in tower.chunks if chunk.graph]
    left = [[chunk for chunk in tower.chunks if not chunk.graph] for tower in towers]
    order = replay_order([len(chunks) for chunks in left], strategy.joint_first_and_last)
    groups = [[(towers[tower], left[tower][index]) for tower, index in group] for group in order]
    first = 0 if strategy.kept_graphs_first else 1
    return [*groups[:first], *kept, *groups[first:]]


def _encoders(
    order: Sequence[Sequence[tuple[Tower, Chunk]]],
) -> list[tuple[list[nn.Module], set[nn.Module]]]:
    """The encoders of each group, and those of them that no later group runs."""
    found: list[tuple[list[nn.Module], set[nn.Module]]] = []
    later: set[nn.Module] = set()
    for group in reversed(order):
        modules = [tower.module for tower, _ in group]
        found.append((modules, {*modules} - later))
        later.update(modules)
    return found[::-1]


def _is_kept(group: Sequence[tuple[Tower, Chunk]]) -> bool:
    return bool(group[0][1].graph)


def _takes_gradient(tower: Tower, feature: Tensor) -> bool:
    return bool(tower.trainable) and feature.is_floating_point()


def _taken_gradient(leaf: Tensor, factor: float) -> Tensor | None:
    """The gradient moves out of the leaf, so that no feature stays alive with a second one."""
    gradient, leaf.grad = leaf.grad, None
    leaf.requires_grad_(False)
    return _times(gradient, factor)


def _times(gradient: Tensor | None, factor: float) -> Tensor | None:
    return gradient if gradient is None or factor == 1 else gradient * factor


def device_types(towers: Iterable[Tower]) -> set[str]:
    return {feature.device.type for tower in towers for feature in tower.features} | {"cpu"}


def _drawn_on(states: Iterable[RandomState]) -> tuple[torch.device, ...]:
    """Devices whose generators a replay will set back."""
    return tuple(sorted({device for state in states for device, _ in state.devices}, key=str))
