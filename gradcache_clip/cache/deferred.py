"""A cached step in two halves: embed and loss now, the replay in the backward of the loss.

For whoever takes the backward elsewhere: trainers that divide a loss, scale it, or add another.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from gradcache_clip.cache.arguments import refuse_keywords
from gradcache_clip.cache.auxiliary import LossOnly, evaluate, minimised
from gradcache_clip.cache.checks import check_plain_backward, check_unchanged
from gradcache_clip.cache.grad_cache import GradCache
from gradcache_clip.cache.step import CachedStep, device_types
from gradcache_clip.cache.torch_state import forget_autocast_casts
from gradcache_clip.cache.tower import Tower

_REMEDY = "call cache(*inputs), which takes the whole step by itself"


def deferred_step(
    cache: GradCache,
    *inputs: Any,
    loss_kwargs: Mapping[str, Any] | None = None,
    **unknown: NoReturn,
) -> Any:
    """Embed a batch and evaluate the loss; the backward of the loss replays the chunks.

    `out.loss.backward()` then leaves in `.grad` what `cache(*inputs)` would, and the loss is a
    tensor like any other until then: whatever multiplies it, divides it or is added to it reaches
    every parameter, of the encoders and of the loss. Features and the graph of the loss over them
    stay alive until the backward, graphs of the encoders only within `memory_budget`. Autocast is
    in the replay as it was here. Inside `torch.no_grad()` the loss has no graph, and the batch was
    evaluated chunk by chunk.

    A step that runs out of memory is not started again; `on_out_of_memory` has no effect.

    Args:
        cache: encoders, loss and settings; its strategy is local, `DDPStrategy` or
            `AllReduceStrategy`, without a `grad_scaler`.
        inputs: one batch for each encoder, as in `cache(*inputs)`.
        loss_kwargs: further arguments of the loss, as in `cache(*inputs, loss_kwargs=...)`.

    Returns:
        As `cache(*inputs)` does, with the graph of the loss.

    Raises:
        ValueError: as `GradCache`; or the strategy scales losses, or leaves no backward to others.
        RuntimeError: in the backward, if it is the second one or asks for a graph of its own.
        ReplayMismatchError: in the backward, as in a step of `GradCache`.

    Example:
        >>> import torch
        >>> from gradcache_clip import ClipLoss, GradCache, deferred_step
        >>> encoders = torch.nn.Linear(8, 4), torch.nn.Linear(6, 4)
        >>> cache = GradCache(encoders, ClipLoss(), chunk_size=16)
        >>> out = deferred_step(cache, torch.randn(64, 8), torch.randn(64, 6))
        >>> (out.loss / 2).backward()
        >>> encoders[0].weight.grad.shape
        torch.Size([4, 8])
    """
    refuse_keywords(unknown, "deferred_step")
    _check_strategy(cache)
    step = _prepared(cache, inputs)
    towers, with_graph = step.towers, torch.is_grad_enabled()
    flat = _Deferred(step).features() if with_graph else _without_graph(towers)
    features = [pytree.tree_unflatten(flat[i], tower.structure) for i, tower in enumerate(towers)]
    # Tensors of inference mode have no versions, and nothing is replayed there.
    given = [feature for parts in flat for feature in parts]
    versions = [feature._version for feature in given] if with_graph else []
    # A copy of a weight that autocast made without a graph must not reach the loss.
    forget_autocast_casts()
    with step.loss_context() if with_graph else nullcontext():
        output = evaluate(cache.plan, features, loss_kwargs or {})
    if with_graph:
        check_unchanged(given, versions)
        minimised(cache.plan, output)
        step.check_finite()
    return LossOnly(output) if isinstance(output, Tensor) else output


def _check_strategy(cache: GradCache) -> None:
    strategy = cache.plan.strategy
    check_plain_backward(strategy, "deferred_step", _REMEDY)
    if strategy.grad_scaler is not None:
        raise ValueError(
            "deferred_step: expected a strategy without grad_scaler, got one, by which the loss "
            f"would be scaled twice; write grad_scaler.scale(out.loss).backward(), or {_REMEDY}"
        )


def _prepared(cache: GradCache, inputs: Sequence[Any]) -> CachedStep:
    with torch.enable_grad():
        return cache.prepare(inputs)


def _without_graph(towers: Sequence[Tower]) -> list[list[Tensor]]:
    for tower in towers:
        tower.embed()
    return [[tower.as_passed(feature) for feature in tower.features] for tower in towers]


class _Deferred:
    """A step that was embedded and waits for the gradients of its features."""

    def __init__(self, step: CachedStep) -> None:
        step.embed()
        self._step: CachedStep | None = step
        towers = step.towers
        self._autocast = _autocast_now(device_types(towers))
        self.embedded = [t.as_passed(feature) for t in towers for feature in t.features]
        self._counts = [len(tower.features) for tower in towers]
        self.frozen = [not tower.trainable for tower in towers for _ in tower.features]

    def features(self) -> list[list[Tensor]]:
        """Return the flat features of each tower, with a graph whose backward is the replay."""
        # Autograd calls a backward only for inputs that ask for a gradient.
        switch = torch.zeros((), requires_grad=True)
        flat = iter(_Replay.apply(switch, self))
        return [[next(flat) for _ in range(count)] for count in self._counts]

    def replay(self, gradients: Sequence[Tensor | None]) -> None:
        """Send the gradients of all features into the parameters."""
        if torch.is_grad_enabled():
            raise RuntimeError(
                "deferred_step: expected a backward without create_graph, got create_graph=True, "
                "but a replay leaves no graph of its gradients; take one derivative"
            )
        step, self._step = self._step, None
        if step is None:
            raise RuntimeError(
                "deferred_step: expected one backward, got a second one through the same step, "
                "whose chunks are gone; call deferred_step again, or add the losses first"
            )
        with torch.enable_grad(), ExitStack() as autocast:
            for context in self._autocast:
                autocast.enter_context(context)
            mismatches = step.run_replay(gradients)
        if mismatches:
            warnings.warn(mismatches, stacklevel=2)


class _Replay(torch.autograd.Function):
    """Identity on features whose backward is the replay."""

    @staticmethod
    def forward(ctx: Any, switch: Tensor, deferred: _Deferred) -> tuple[Tensor, ...]:
        ctx.deferred = deferred
        ctx.set_materialize_grads(False)
        # Other tensors over the same memory: a step must not hold on to its own graph.
        features = [feature.detach() for feature in deferred.embedded]
        pairs = zip(features, deferred.frozen, strict=True)
        ctx.mark_non_differentiable(*(feature for feature, frozen in pairs if frozen))
        return tuple(features)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[None, None]:
        ctx.deferred.replay(gradients)
        return None, None


def _autocast_now(device_types: Iterable[str]) -> list[torch.autocast]:
    """Contexts for a backward that may run when autocast is another."""
    caches = torch.is_autocast_cache_enabled()
    return [
        torch.autocast(
            kind,
            torch.get_autocast_dtype(kind),
            enabled=torch.is_autocast_enabled(kind),
            cache_enabled=caches,
        )
        for kind in sorted(device_types)
    ]
