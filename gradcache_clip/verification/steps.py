"""Take the steps that a verification compares: the cached one, and plain ones in a single graph."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gradcache_clip.cache.auxiliary import evaluate, loss_of, minimised
from gradcache_clip.cache.checks import check_plain_backward
from gradcache_clip.cache.chunks import Chunk, indices, row_count
from gradcache_clip.cache.grad_cache import GradCache
from gradcache_clip.cache.gradient_hooks import HeldHooks, hooked_leaves
from gradcache_clip.cache.prepare import build_towers, prepare
from gradcache_clip.cache.random_state import RandomState
from gradcache_clip.cache.settings import History
from gradcache_clip.cache.step import CachedStep
from gradcache_clip.cache.torch_state import (
    autocast_off,
    forget_autocast_casts,
    kernels_as_with_gradients,
)
from gradcache_clip.cache.tower import Tower, device_of, trained_modules
from gradcache_clip.distributed.collectives import world_size
from gradcache_clip.distributed.graph import leaves_behind
from gradcache_clip.distributed.strategies import LocalStrategy, innermost
from gradcache_clip.distributed.strategy_all_reduce import AllReduceStrategy
from gradcache_clip.verification.cut import Cut, in_order, with_small_chunks
from gradcache_clip.verification.ranks import sum_over_ranks
from gradcache_clip.verification.state import Gradients, Start


class Outcome(NamedTuple):
    """Result of a step; features in the order of the caller's rows."""

    gradients: Gradients
    loss: Tensor
    features: list[Tensor]
    trained: list[bool]
    """Whether a feature has a graph."""
    before_loss: RandomState


class Trial:
    """One batch and the steps taken on it, each from the same state."""

    def __init__(
        self, cache: GradCache, inputs: tuple[Any, ...], loss_kwargs: Mapping[str, Any]
    ) -> None:
        check_plain_backward(cache.strategy, "verify", "verify the encoders before wrapping them")
        # Mismatches, and what a first step would raise, are reported with their reasons.
        plan = with_small_chunks(cache.plan, inputs)
        self._plan = replace(plan, check_replay="off", check_rows="off")
        self._inputs, self._loss_kwargs = inputs, loss_kwargs
        self.strategy = cache.strategy
        self.gradient_hooks = cache.settings.gradient_hooks
        step = self._prepared()
        towers = step.towers
        self.hooked = [each.leaf for each in hooked_leaves(towers)]
        self._reduced = _encoder_parameters(self.strategy, towers)
        self.device = device_of(towers)
        self.cut = [tower.chunks for tower in towers]
        self.unreduced: list[Tensor] = []
        self.start = Start(step.modules, towers)

    def towers(self) -> list[Tower]:
        """Make new towers: a step leaves things behind in those that it ran."""
        return build_towers(self._plan, self._inputs)

    def _prepared(self) -> CachedStep:
        return prepare(self._plan, self._inputs, History(stepped=True))

    def whole(self) -> Cut:
        """All rows of an input at once."""
        return [[Chunk(slice(0, row_count(chunks)))] for chunks in self.cut]

    def named_leaves(self) -> dict[int, tuple[str, Tensor]]:
        """Map the id of every leaf known so far to its name and the leaf itself."""
        named = self._names()
        return {
            id(leaf): (named.get(id(leaf), f"a tensor of a function ({number})"), leaf)
            for number, leaf in enumerate(self.start.leaves)
        }

    def known_to_functions(self) -> set[int]:
        """Ids of leaves that belong to no module and to no input."""
        return {id(leaf) for leaf in self.start.leaves} - self._names().keys()

    def _names(self) -> dict[int, str]:
        named = {id(kept.tensor): path for path, kept in self.start.inputs.items()}
        for prefix, module in self._named_modules():
            for name, parameter in innermost(module).named_parameters():
                named.setdefault(id(parameter), f"{prefix}{name}")
        return named

    def loss_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Trained parameters of the loss alone, which no strategy reduces, with their names."""
        loss, reduced = self._plan.loss, {id(parameter) for parameter in self._reduced}
        named = loss.named_parameters() if isinstance(loss, nn.Module) else ()
        return [(f"loss: {k}", p) for k, p in named if p.requires_grad and id(p) not in reduced]

    def _named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        one = isinstance(self._plan.encoders, nn.Module)
        for index, tower in enumerate(self.towers()):
            yield "" if one else f"encoder {index}: ", tower.bare_module
            if isinstance(tower.get_features, nn.Module):
                yield f"get_features {index}: ", tower.get_features
        if isinstance(self._plan.loss, nn.Module):
            yield "loss: ", self._plan.loss

    def cached(self) -> tuple[Outcome, list[Tower]]:
        """Take the engine's step; also return its towers, whose chunks know their random state."""
        self.start.restore()
        step = self._prepared()
        towers = step.towers
        output, _ = step.run(self._loss_kwargs, self.start)
        if reduces_itself(self.strategy):
            sum_over_ranks(self._reduced)
        kept = [
            (t.as_passed(f.detach()), bool(t.trainable))
            for t in towers
            for f in _mean_losses(t, t.features)
        ]
        features, trained = map(list, zip(*kept, strict=True))
        state = self.start.random_state()
        return Outcome(
            self.start.gradients(), loss_of(self._plan, output), features, trained, state
        ), towers

    def plain(
        self,
        cut: Cut,
        *,
        over_chunks: bool = False,
        like: Outcome | None = None,
        rounded_as: Sequence[Tensor] = (),
    ) -> Outcome:
        """Take a plain step; over several ranks, its gradients are summed here, by no strategy.

        `over_chunks`: a frozen trunk runs first and chunks repeat their draws, as in the engine.
        `like`: the loss draws the random numbers that it drew there. `rounded_as`: the loss is
        given these features, equal up to rounding; those returned are the step's own.
        """
        self.start.restore()
        forget_autocast_casts()
        towers = self.towers()
        modules = [tower.module for tower in towers]
        # Nobody has finished: a wrapper leaves the gradients of this rank as they are.
        with (
            self.strategy.replay_context(modules, finished=frozenset()),
            kernels_as_with_gradients(),
        ):
            flat = [
                self._features(tower, chunks, over_chunks)
                for tower, chunks in zip(towers, cut, strict=True)
            ]
            self._structures = [tower.structure for tower in towers]
            before_loss = self.start.random_state()
            if like is not None:
                like.before_loss.restore()
            features = [feature for parts in flat for feature in parts]
            given = _with_values(features, rounded_as) if rounded_as else features
            loss = self._backward(towers, features, given)
        averaged = (_mean_losses(*each) for each in zip(towers, flat, strict=True))
        detached = [feature.detach() for parts in averaged for feature in parts]
        trained = [feature.requires_grad for feature in features]
        return Outcome(self.start.gradients(), loss, detached, trained, before_loss)

    def loss(self, features: Sequence[Tensor], like: Outcome) -> Tensor:
        """Evaluate the loss on other features, with the random numbers that it drew in `like`."""
        self.start.restore()
        forget_autocast_casts()
        like.before_loss.restore()
        return self._loss(features)

    def _loss(self, features: Sequence[Tensor]) -> Tensor:
        given = iter(features)
        nested = [
            pytree.tree_unflatten([next(given) for _ in range(structure.num_leaves)], structure)
            for structure in self._structures
        ]
        return minimised(self._plan, evaluate(self._plan, nested, self._loss_kwargs))

    def _backward(
        self, towers: Sequence[Tower], features: Sequence[Tensor], given: Sequence[Tensor]
    ) -> Tensor:
        """Fill `.grad` from the loss of `given`, which have the gradients of `features`."""
        if world_size() > 1:
            hooks = HeldHooks(hooked_leaves(towers))
            with hooks.held():
                loss = self._backward_over_ranks(features, given)
                hooks.run_all()
            return loss
        loss = self._loss(given)
        self.start.set_aside(leaves_behind([loss]))
        with self._autocast_off(features):
            self.strategy.scale_loss(loss).backward()
        return loss.detach()

    def _backward_over_ranks(self, features: Sequence[Tensor], given: Sequence[Tensor]) -> Tensor:
        """Sum over the ranks what comes through features; the loss's own is complete on each."""
        ends = [
            value.detach().requires_grad_(feature.requires_grad)
            for feature, value in zip(features, given, strict=True)
        ]
        loss = self._loss(ends)
        own = [leaf for leaf in leaves_behind([loss]) if not any(leaf is end for end in ends)]
        behind = list(leaves_behind(features))
        self.start.set_aside([*own, *behind])
        self._note_unreduced(behind)
        with self._autocast_off(features):
            self.strategy.scale_loss(loss).backward()
            complete = [(leaf, leaf.grad) for leaf in self.start.leaves]
            for leaf in self.start.leaves:
                leaf.grad = None
            pairs = [
                (feature, end.grad)
                for feature, end in zip(features, ends, strict=True)
                if end.grad is not None
            ]
            torch.autograd.backward([f for f, _ in pairs], [g for _, g in pairs])
        sum_over_ranks(self._reduced)
        for leaf, gradient in complete:
            if gradient is not None:
                leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient
        return loss.detach()

    def _note_unreduced(self, leaves: Sequence[Tensor]) -> None:
        """Parameters that only a function knows reach no strategy."""
        known = {id(parameter) for parameter in self._reduced}
        known |= {id(kept.tensor) for kept in self.start.inputs.values()}
        self.unreduced = [leaf for leaf in leaves if id(leaf) not in known]

    def _autocast_off(self, features: Sequence[Tensor]) -> AbstractContextManager[object]:
        return autocast_off({feature.device.type for feature in features} | {"cpu"})

    def _features(self, tower: Tower, chunks: Sequence[Chunk], over_chunks: bool) -> list[Tensor]:
        if over_chunks:
            tower.run_trunk_once()
        parts = []
        for chunk in chunks:
            if over_chunks:
                # A cast that chunks share would gather their gradients in 16 bits.
                forget_autocast_casts()
                # By number, for chunks that are views of one tensor could not be written to.
                chunk = replace(chunk, rows=indices(chunk))
            parts.append(tower.replay(chunk))
        held = (in_order(torch.cat(part), chunks) for part in zip(*parts, strict=True))
        return [tower.as_passed(feature) for feature in held]


def _mean_losses(tower: Tower, features: Sequence[Tensor]) -> list[Tensor]:
    """Replace auxiliary losses by their means, which alone count, and not how they were cut."""
    first = len(features) - len(tower.losses)
    return [*features[:first], *(loss.mean().expand(len(loss)) for loss in features[first:])]


def reduces_itself(strategy: LocalStrategy) -> bool:
    """Whether the caller reduces the gradients of several processes."""
    return world_size() > 1 and strategy.reduce_myself


def _encoder_parameters(strategy: LocalStrategy, towers: Sequence[Tower]) -> list[nn.Parameter]:
    """Trained parameters that a strategy reduces, in the same order on every rank."""
    modules = trained_modules(towers)
    if reduces_itself(strategy):
        # Nobody else makes sure that the ranks hold the same weights.
        AllReduceStrategy().check(modules)
    found = {id(p): p for module in modules for p in module.parameters() if p.requires_grad}
    return list(found.values())


def _with_values(features: Sequence[Tensor], values: Sequence[Tensor]) -> list[Tensor]:
    """Features with the given values, whose gradients go to `features`."""
    pairs = zip(features, values, strict=True)
    return [
        feature + (value - feature.detach()) if feature.is_floating_point() else feature
        for feature, value in pairs
    ]
