"""The gradient-caching step: embed, loss, replay. B rows, D feature width."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gradcache_clip.cache.checks import (
    check_finite,
    check_inputs,
    check_unchanged,
    checked_chunk_size,
    checked_encoders,
    one_for_each,
    scalar_loss_of,
)
from gradcache_clip.cache.nested import count_rows, map_tensors
from gradcache_clip.cache.random_state import RandomState
from gradcache_clip.cache.replay_check import (
    ON_ANOTHER_RANK,
    ReplayCheck,
    ReplayMismatchError,
    describe,
)
from gradcache_clip.cache.schedule import replay_order
from gradcache_clip.cache.settings import (
    autocast_off,
    forget_autocast_casts,
    frozen_running_statistics,
    refuse_cached_parametrizations,
    warn_of_batch_norm,
)
from gradcache_clip.cache.tower import Encode, Tower, call_encoder, chunk_bounds, surely_trainable
from gradcache_clip.distributed.strategies import LocalStrategy

GetFeatures = Callable[[Any], Any]


class LossOnly(NamedTuple):
    """What a step returns when the loss function returns a bare tensor."""

    loss: Tensor


class GradCache:
    """Forward and backward over a large batch with the memory of one chunk, exactly.

    `cache(*inputs)` (1) embeds every input chunk by chunk without graphs, (2) evaluates `loss` on
    the features of the whole batch and takes their gradients, (3) replays each chunk with its
    graph and sends the cached gradients into the parameters. `.grad` then equals that of
    `loss(*[encoder(x) for encoder, x in zip(encoders, inputs)]).backward()` up to rounding, with
    dropout and autocast as well. Source: Gao et al. 2021, "Scaling Deep Contrastive Learning
    Batch Size under Memory Limited Setup" (arXiv 2101.06983), section 3.

    Args:
        encoders: one module for each input (the same module may stand several times), or one
            module with `forward(tower, inputs)`, called with the index of the input. A mapping
            is passed to an encoder as keyword arguments, a tuple as positional ones, anything
            else as one argument.
        loss: called with the features of each input, (B, D) tensors or what `get_features`
            returns for all rows; returns a scalar tensor or an object whose `.loss` is one.
        chunk_size: rows that go through an encoder at once, for all inputs or one for each.
        get_features: extracts features from an encoder's output, for all or one for each.
            Without it a tensor or tuple of tensors is taken as it is, and of a transformers
            output `image_embeds`, `text_embeds`, `sentence_embedding` or `pooler_output`.
        strategy: how the backward is taken; `LocalStrategy()` by default.
        replay_check: "error" raises `ReplayMismatchError` at the end of a step whose replay
            computed other features than its embed, "warn" warns, "off" does not look.

    Raises:
        ValueError, TypeError: before any gradient is touched, for inputs that disagree, features
            that are not finite, encoders whose output is not understood.

    Example:
        >>> import torch
        >>> from gradcache_clip import ClipLoss, GradCache
        >>> image_encoder, text_encoder = torch.nn.Linear(8, 4), torch.nn.Linear(6, 4)
        >>> cache = GradCache((image_encoder, text_encoder), ClipLoss(), chunk_size=16)
        >>> out = cache(torch.randn(64, 8), torch.randn(64, 6))
        >>> image_encoder.weight.grad.shape
        torch.Size([4, 8])
    """

    def __init__(
        self,
        encoders: nn.Module | Sequence[nn.Module],
        loss: Callable[..., Any],
        *,
        chunk_size: int | Sequence[int] = 64,
        get_features: GetFeatures | Sequence[GetFeatures | None] | None = None,
        strategy: LocalStrategy | None = None,
        replay_check: Literal["error", "warn", "off"] = "error",
    ) -> None:
        self.encoders = checked_encoders(encoders)
        self.loss = loss
        self.chunk_size = checked_chunk_size(chunk_size)
        self.get_features = get_features
        self.strategy = strategy or LocalStrategy()
        if replay_check not in ("error", "warn", "off"):
            raise ValueError(
                f"replay_check: expected 'error', 'warn' or 'off', got {replay_check!r}"
            )
        self.replay_check = replay_check
        self._warned_of_batch_norm = False

    def __call__(self, *inputs: Any, loss_kwargs: Mapping[str, Any] | None = None) -> Any:
        """One step's forward and backward; adds to `.grad` of encoders and loss.

        Args:
            inputs: one batch for each encoder, nested as the encoder wants it.
            loss_kwargs: further arguments of the loss, such as labels for the whole batch.

        Returns:
            What the loss returned, detached; a bare tensor comes back as an object with `.loss`.
        """
        if not torch.is_grad_enabled():
            raise RuntimeError(
                "GradCache: expected gradients to be enabled, got a call inside torch.no_grad(); "
                "call it outside, or run the encoders alone to evaluate"
            )
        refuse_cached_parametrizations()
        towers = self._towers(inputs)
        check_inputs(towers)
        self.strategy.check([tower.module for tower in towers])
        modules = [tower.bare_module for tower in towers]
        if not self._warned_of_batch_norm:
            self._warned_of_batch_norm = warn_of_batch_norm(modules)
        for tower in towers:
            tower.embed()
        check_finite(towers, self.strategy)
        output = self._backward_of_loss(towers, loss_kwargs or {})
        with frozen_running_statistics(modules):
            self._report(self._replay([tower for tower in towers if tower.trainable]))
        return output

    def _towers(self, inputs: tuple[Any, ...]) -> list[Tower]:
        modules = self._modules_for(len(inputs))
        encode: Encode = call_encoder
        sizes = one_for_each(self.chunk_size, len(inputs), "chunk_size")
        extractors = one_for_each(self.get_features, len(inputs), "get_features")
        rows = [count_rows(given, f"input {index}") for index, given in enumerate(inputs)]
        # A joint first and last replay need two chunks of every tower, unless all have just one.
        several = self.strategy.joint_ends and any(n > s for n, s in zip(rows, sizes, strict=True))
        towers = []
        for index, (module, given) in enumerate(zip(modules, inputs, strict=True)):
            if isinstance(self.encoders, nn.Module):
                encode = partial(_call_tower, index)
            bounds = chunk_bounds(rows[index], sizes[index], at_least=2 if several else 1)
            name = f"encoder {index} ({type(self.strategy.bare(module)).__name__})"
            bare = self.strategy.bare(module)
            tower = Tower(name, module, bare, encode, extractors[index], given, bounds)
            # One module for all inputs may be frozen for this one; only its graph tells.
            if not isinstance(self.encoders, nn.Module) and surely_trainable(module, given):
                tower.trainable = True
            towers.append(tower)
        return towers

    def _modules_for(self, count: int) -> list[nn.Module]:
        if isinstance(self.encoders, nn.Module):
            return [self.encoders] * count
        if len(self.encoders) != count:
            raise ValueError(
                f"inputs: expected {len(self.encoders)}, one for each encoder, got {count}; an "
                "encoder with several arguments takes them as one tuple or dict"
            )
        return list(self.encoders)

    def _backward_of_loss(self, towers: list[Tower], loss_kwargs: Mapping[str, Any]) -> Any:
        """Fill every tower's `gradients`, and `.grad` of the loss's own parameters."""
        leaves = [
            [feature.requires_grad_(_takes_gradient(tower, feature)) for feature in tower.features]
            for tower in towers
        ]
        features = [
            pytree.tree_unflatten(flat, tower.structure)
            for tower, flat in zip(towers, leaves, strict=True)
        ]
        versions = [feature._version for tower in towers for feature in tower.features]
        forget_autocast_casts()
        output = self.loss(*features, **loss_kwargs)
        loss = scalar_loss_of(output)
        check_unchanged(towers, versions)
        with autocast_off(_device_types(towers)):
            self.strategy.scale_loss(loss).backward()
        factor = self.strategy.gradient_factor()
        for tower, flat in zip(towers, leaves, strict=True):
            tower.gradients = [_taken_gradient(leaf, factor) for leaf in flat]
        return _detached(output)

    def _replay(self, towers: list[Tower]) -> ReplayCheck:
        check = ReplayCheck()
        order = replay_order([len(tower.bounds) for tower in towers], self.strategy.joint_ends)
        drawn = any(state is not None for tower in towers for state in tower.random_states)
        after_embed = RandomState.capture(_drawn_on(towers)) if drawn else None
        try:
            for position, group in enumerate(order):
                chunks = [(towers[tower], index) for tower, index in group]
                modules = [tower.module for tower in towers]
                with self.strategy.replaying(modules, last=position == len(order) - 1):
                    self._replay_together(chunks, check)
        finally:
            # Whatever draws next continues from where one pass over the batch would have left off.
            if after_embed is not None:
                after_embed.restore()
            forget_autocast_casts()
        return check

    def _replay_together(self, chunks: list[tuple[Tower, int]], check: ReplayCheck) -> None:
        """Forward the chunks with their graphs, then one backward for all of them."""
        outputs: list[Tensor] = []
        gradients: list[Tensor] = []
        forget_autocast_casts()
        for tower, index in chunks:
            features = tower.replay(index)
            if self.replay_check != "off":
                check.compare(tower, index, features)
            for feature, gradient in zip(features, tower.gradients_of(index), strict=True):
                if gradient is not None and feature.requires_grad:
                    outputs.append(feature)
                    gradients.append(gradient)
        with autocast_off(_device_types([tower for tower, _ in chunks])):
            torch.autograd.backward(outputs, gradients)

    def _report(self, check: ReplayCheck) -> None:
        if self.replay_check == "off" or check.device is None:
            return
        failures = check.failures()
        # On the features' device: NCCL reduces nothing that lies on the host.
        if not self.strategy.on_any_rank(torch.tensor(bool(failures), device=check.device)):
            return
        message = describe(failures) if failures else ON_ANOTHER_RANK
        if self.replay_check == "error":
            raise ReplayMismatchError(message)
        warnings.warn(message, stacklevel=3)


def _call_tower(index: int, module: nn.Module, inputs: Any) -> Any:
    return module(index, inputs)


def _takes_gradient(tower: Tower, feature: Tensor) -> bool:
    return bool(tower.trainable) and feature.is_floating_point()


def _taken_gradient(leaf: Tensor, factor: float) -> Tensor | None:
    """The gradient moves out of the leaf, so that no feature stays alive with a second one."""
    gradient, leaf.grad = leaf.grad, None
    leaf.requires_grad_(False)
    return gradient if gradient is None or factor == 1 else gradient * factor


def _detached(output: Any) -> Any:
    if isinstance(output, Tensor):
        return LossOnly(output.detach())
    detached = map_tensors(torch.detach, output)
    if detached is not output:
        return detached
    # An object of some other class: its attributes hold the tensors.
    detached = copy.copy(output)
    for name, value in getattr(output, "__dict__", {}).items():
        setattr(detached, name, map_tensors(torch.detach, value))
    return detached


def _device_types(towers: Iterable[Tower]) -> set[str]:
    return {feature.device.type for tower in towers for feature in tower.features} | {"cpu"}


def _drawn_on(towers: Iterable[Tower]) -> tuple[torch.device, ...]:
    """Devices whose generators a replay will set back."""
    states = (state for tower in towers for state in tower.random_states if state is not None)
    return tuple(sorted({device for state in states for device, _ in state.devices}, key=str))
