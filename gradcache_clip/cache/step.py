"""One step of gradient caching: embed, loss, replay."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gradcache_clip.cache.auxiliary import evaluate, minimised
from gradcache_clip.cache.checks import (
    all_finite,
    check_finite,
    check_leaves,
    check_same_chunks,
    check_unchanged,
)
from gradcache_clip.cache.chunks import Chunk
from gradcache_clip.cache.finished_loss import finished
from gradcache_clip.cache.first_step import check_rows
from gradcache_clip.cache.gradient_hooks import HeldHooks
from gradcache_clip.cache.graph_budget import GraphBudget
from gradcache_clip.cache.padding_check import check_trims
from gradcache_clip.cache.recovery import StepSnapshot
from gradcache_clip.cache.replay_check import ReplayCheck, failures_of
from gradcache_clip.cache.schedule import Turn, draws_repeated, retentions, turns
from gradcache_clip.cache.settings import History, Settings
from gradcache_clip.cache.side_effects import SideEffects
from gradcache_clip.cache.torch_state import (
    SharedCasts,
    autocast_off,
    forget_autocast_casts,
    frozen_running_statistics,
    kept_running_statistics,
)
from gradcache_clip.cache.tower import Tower, modules_of, trained_modules
from gradcache_clip.distributed.graph import leaves_behind

# Entered once per chunk.
_NOTHING = nullcontext()


class CachedStep:
    """Embed, loss and replay of one batch, which `prepare` has cut and checked.

    Attributes:
        phase: "embed", "loss" or "replay", whichever was begun last.
    """

    def __init__(
        self,
        plan: Settings,
        towers: list[Tower],
        hooks: HeldHooks,
        budget: GraphBudget,
        history: History,
    ) -> None:
        self.towers, self.strategy, self.phase = towers, plan.strategy, "embed"
        self._plan, self._hooks, self._budget = plan, hooks, budget
        self._history, self._rows_checked = history, history.rows_checked
        self._trims_checked = history.trims_checked
        self._warnings: list[str] = []
        self._unchecked: list[Exception] = []
        self._finite: Tensor | None = None
        self._snapshot: StepSnapshot | None = None
        self._device_types: set[str] = set()
        self._autocasts = True
        self._looked_behind: set[str] = set()
        checks = {plan.check_rows, plan.check_replay} != {"off"}
        self._effects = SideEffects(towers) if checks and not history.stepped else None

    @property
    def modules(self) -> list[nn.Module]:
        """Encoders, heads, and the loss if it is a module."""
        return modules_of(self.towers, self._plan.loss)

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
            given = (tower.as_held(next(flat)) for _ in tower.features)
            tower.gradients = [_times(gradient, factor) for gradient in given]
        with self._noting_errors(), self._hooks.held():
            with self.strategy.step_context(trained_modules(self.towers)):
                check = self.replay()
            return self._finish(check)

    def _finish(self, check: ReplayCheck) -> str:
        self._hooks.run_all()
        mode, undone = self._plan.check_replay, self._is_undone()
        failures = failures_of(check, mode, self.strategy, undone=undone)
        self._history.stepped, self._history.rows_checked = True, self._rows_checked
        self._history.trims_checked = self._trims_checked
        return "\n".join([*self._warnings, *filter(None, [failures])])

    @contextmanager
    def _noting_errors(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            # There is nothing in .grad before the loss.
            self._history.broken_off = not self._is_undone() and self.phase != "embed"
            raise

    def _is_undone(self) -> bool:
        """Whether an error takes back what the step has added to `.grad`."""
        return self._snapshot is not None and self._snapshot.changed is None

    def embed(self) -> None:
        """Fill every tower's `features`; graphs are kept as far as the budget goes."""
        looks = self._effects is not None and self._plan.check_rows != "off"
        with self._effects.watching() if self._effects and looks else _NOTHING:
            # Before any graph is kept.
            self._check_rows()
            self._embed()
            self._finite = all_finite(self.towers)
            if self._effects is not None or _has_state(self._plan.loss):
                self.check_finite()
            self._check_embedded()
        self._device_types = device_types(self.towers)

    def _embed(self) -> None:
        unknown = [tower for tower in self.towers if tower.trainable is None]
        kept = retentions(self.towers, self._budget, self.strategy)
        for tower, retention in zip(self.towers, kept, strict=True):
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

    def check_finite(self) -> None:
        """Refuse features that are not finite; waits for the device, once."""
        finite, self._finite = self._finite, None
        # All ranks raise, and nothing is in .grad yet, wherever the answer is read.
        phase, self.phase = self.phase, "embed"
        check_finite(finite, self.towers, self.strategy)
        self.phase = phase

    def _check_rows(self) -> None:
        """Check encoders that no earlier step has; on every rank, with the same passes."""
        if self._plan.check_rows != "off":
            found, later = partial(self._report, self._plan.check_rows), self._unchecked.append
            rows, warn = self._not_in(self._rows_checked), self._warnings.append
            self._rows_checked |= check_rows(rows, self.strategy, found, later, warn)

    def _check_embedded(self) -> None:
        plan, strategy = self._plan, self.strategy
        for error in self._unchecked:
            self._report(plan.check_rows, error)
        if self._effects is not None:
            self._effects.check(plan, strategy, self._report)
        if plan.check_rows != "off":
            found, trims = partial(self._report, plan.check_rows), self._not_in(self._trims_checked)
            self._trims_checked |= check_trims(trims, strategy, found)

    def loss_context(self) -> AbstractContextManager[object]:
        """Surround the evaluation of the loss."""
        if self._effects is None:
            return _NOTHING
        return self._effects.unreadable(partial(self._report, self._plan.check_rows))

    def _report(self, mode: str, error: Exception) -> None:
        if mode == "error":
            raise error
        self._warnings.append(str(error))

    def _not_in(self, checked: Set[str]) -> list[Tower]:
        return [tower for tower in self.towers if tower.name not in checked]

    def _backward_of_loss(self, loss_kwargs: Mapping[str, Any]) -> Any:
        """Fill every tower's `gradients`, and `.grad` of the loss's own parameters."""
        self.phase = "loss"
        leaves = [
            [
                tower.as_passed(feature).requires_grad_(_takes_gradient(tower, feature))
                for feature in tower.features
            ]
            for tower in self.towers
        ]
        features = [
            pytree.tree_unflatten(flat, tower.structure)
            for tower, flat in zip(self.towers, leaves, strict=True)
        ]
        versions = [leaf._version for flat in leaves for leaf in flat]
        forget_autocast_casts()
        with self.loss_context():
            output = evaluate(self._plan, features, loss_kwargs)
        loss = minimised(self._plan, output)
        # Now that the device has the loss to compute meanwhile.
        self.check_finite()
        check_unchanged([leaf for flat in leaves for leaf in flat], versions)
        if self._snapshot is not None:
            reached = list(leaves_behind([loss]))
            self._snapshot.set_aside(reached)
            self._hooks.leave_to_autograd(reached)
        with autocast_off(self._device_types):
            self.strategy.backward_of_loss(loss, [leaf for flat in leaves for leaf in flat])
        factor = self.strategy.gradient_factor()
        for tower, flat in zip(self.towers, leaves, strict=True):
            tower.gradients = [tower.as_held(_taken_gradient(leaf, factor)) for leaf in flat]
        return finished(output, loss)

    def replay(self) -> ReplayCheck:
        """Send every tower's `gradients` into the parameters; return how far features moved."""
        self.phase = "replay"
        towers = [tower for tower in self.towers if tower.trainable]
        norms = [module for tower in towers for module in tower.modules]
        check, order = ReplayCheck(self.towers[0].features[0].device), turns(towers, self.strategy)
        self._autocasts = any(map(torch.is_autocast_enabled, self._device_types))
        copies = any(tower.copies for tower in towers)
        upcoming = [turn.group if copies else [] for turn in order[1:]]
        if not self.strategy.reduces:
            self._hooks.expect(tower for turn in order for tower, _ in turn.group)
        pairs = zip(order, [*upcoming, []], strict=False)
        with draws_repeated(order), SharedCasts() as casts:
            for kept, same in groupby(pairs, key=lambda pair: pair[0].kept):
                with (kept_running_statistics if kept else frozen_running_statistics)(norms):
                    for turn, following in same:
                        casts.of([tower for tower, _ in turn.group])
                        self._take(turn, check)
                        for tower, chunk in following:
                            if chunk.graph is None:
                                tower.expect(chunk)
        return check

    def _take(self, turn: Turn, check: ReplayCheck) -> None:
        """Forward the chunks that left no graph, then one backward for all of them."""
        looks = not self._history.stepped or self._snapshot is not None
        reached: list[Tensor] = []
        gradients: list[Tensor] = []
        with self.strategy.replay_context(turn.modules, turn.finished):
            for tower, chunk in turn.group:
                features = self._features(tower, chunk, check)
                if looks and tower.name not in self._looked_behind:
                    self._look_behind(tower, chunk, features)
                for feature, gradient in zip(features, tower.gradients, strict=True):
                    if gradient is not None and feature.requires_grad:
                        reached.append(feature)
                        gradients.append(gradient[chunk.rows])
            with autocast_off(self._device_types) if self._autocasts else _NOTHING:
                self.strategy.backward(reached, gradients)
        if self._hooks.waiting and not self.strategy.reduces:
            self._hooks.replayed(tower for tower, _ in turn.group)

    def _features(self, tower: Tower, chunk: Chunk, check: ReplayCheck) -> list[Tensor]:
        """Return features with the graph from the embed, or replay the chunk."""
        graph, chunk.graph = chunk.graph, None
        if graph is not None:
            return graph
        features = tower.replay(chunk)
        if self._plan.check_replay != "off":
            check.compare(tower, chunk, features)
        return features

    def _look_behind(self, tower: Tower, chunk: Chunk, features: Sequence[Tensor]) -> None:
        """Find leaves that no module has registered; refuse them, or set their gradients aside."""
        leaves = list(leaves_behind(features))
        if not self._history.stepped:
            check_leaves(tower, chunk, leaves, self.strategy)
            self._hooks.check_leaves(tower, leaves)
        if self._snapshot is not None:
            self._snapshot.set_aside(leaves)
        # A walk is as long as the graph. One chunk shows what an encoder hides, but a function
        # that holds parameters of its own may use others each time.
        registered = {id(p) for module in tower.modules for p in module.parameters()}
        is_function = not isinstance(tower.get_features, (nn.Module, type(None)))
        if not is_function or registered.issuperset(map(id, leaves)):
            self._looked_behind.add(tower.name)


def _has_state(loss: Any) -> bool:
    """Whether it may keep what it is given, such as a queue."""
    return isinstance(loss, nn.Module) and any(True for _ in loss.buffers())


def _takes_gradient(tower: Tower, feature: Tensor) -> bool:
    return bool(tower.trainable) and feature.is_floating_point()


def _taken_gradient(leaf: Tensor, factor: float) -> Tensor | None:
    """Move the gradient out of the leaf, so that no feature stays alive with a second one."""
    gradient, leaf.grad = leaf.grad, None
    leaf.requires_grad_(False)
    return _times(gradient, factor)


def _times(gradient: Tensor | None, factor: float) -> Tensor | None:
    return gradient if gradient is None or factor == 1 else gradient * factor


def device_types(towers: Iterable[Tower]) -> set[str]:
    return {feature.device.type for tower in towers for feature in tower.features} | {"cpu"}
