"""Counts the memory of a training step on fake tensors, without allocating or computing.

B rows of the batch, D feature width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gradcache_clip.cache.arguments import checked_division
from gradcache_clip.cache.auxiliary import evaluate, loss_of
from gradcache_clip.cache.checks import one_for_each
from gradcache_clip.cache.packed import Division
from gradcache_clip.cache.torch_state import autocast_off, forget_autocast_casts
from gradcache_clip.cache.tower import Tower
from gradcache_clip.memory.counter import LiveBytes, Rounding
from gradcache_clip.memory.fake_step import (
    FakeStep,
    GetFeatures,
    Keeping,
    fake_tensors,
    mark_gradient,
)

Encoders = nn.Module | Sequence[nn.Module]


@dataclass(frozen=True)
class StepMemory:
    """Bytes alive at the peak of a training step, by purpose."""

    parameter_bytes: int
    """Parameters and buffers of encoders and loss."""
    gradient_bytes: int
    """Parameter gradients that exist at the peak; there may be none yet."""
    optimizer_bytes: int
    """States of the optimizer, such as the two moments of AdamW."""
    input_bytes: int
    """Inputs of the whole batch."""
    feature_bytes: int
    """Features of the whole batch and their gradients."""
    activation_bytes: int
    """Everything else: what autograd saved, the loss's workspace, temporaries."""

    @property
    def total_bytes(self) -> int:
        """The peak of the step."""
        return (
            self.parameter_bytes
            + self.gradient_bytes
            + self.optimizer_bytes
            + self.input_bytes
            + self.feature_bytes
            + self.activation_bytes
        )


def count_plain_step(
    encoders: Encoders,
    loss: Callable[..., Any],
    example_inputs: Sequence[Any],
    batch_size: int,
    *,
    rows: Division | Sequence[Division | None] | None = None,
    get_features: GetFeatures | None = None,
    auxiliary_losses: Mapping[str, float] | None = None,
    optimizer_states: int = 2,
    rounding: Rounding = "none",
) -> StepMemory:
    """Count `loss(*[encoder(x) for encoder, x in zip(encoders, inputs)]).backward()`.

    The step starts without gradients, as after `optimizer.zero_grad()`, under the autocast state
    and training modes of the caller. Temporaries of the optimizer and workspaces inside an op are
    not counted.

    Args:
        encoders: as for `GradCache`; on any device, also meta.
        loss: of the features; returns a scalar tensor or an object whose `.loss` is one. For a
            plain CLIP step pass `ClipLoss(impl="reference")`, which stores the B x B matrix.
        example_inputs: one per encoder, in its own structure, with any number of rows.
        batch_size: B, the number of rows to count for.
        rows: how packed inputs divide, as for `GradCache`. Encoders that read values, such as the
            grids of images of a vision-language model, cannot be counted.
        get_features: extracts the features from the encoders' outputs, as for `GradCache`.
        auxiliary_losses: weights of losses that the encoders return, as for `GradCache`.
        optimizer_states: tensors that the optimizer keeps per trainable parameter: 2 for AdamW, 1
            for momentum, 0 for plain SGD.
        rounding: as for `LiveBytes`.

    Raises:
        ValueError: sizes below 1, inputs that disagree, or a module whose work depends on tensor
            values; the error names it.

    Example:
        >>> import torch
        >>> encoders = torch.nn.Linear(8, 4), torch.nn.Linear(6, 4)
        >>> example = torch.ones(1, 8), torch.ones(1, 6)
        >>> def loss(a, b):
        ...     return (a @ b.T).logsumexp(1).mean()
        >>> memory = count_plain_step(encoders, loss, example, 1_000_000)
        >>> memory.activation_bytes > 4 * 1_000_000**2
        True
    """
    _check_positive(batch_size=batch_size)
    keeping = Keeping(get_features, optimizer_states, auxiliary_losses or {})
    inputs = _divided(example_inputs, rows)
    with fake_tensors(encoders, loss):
        step = FakeStep(encoders, loss, inputs, batch_size, keeping)
        live = _watch(step, rounding)
        with live:
            features = [_forward(tower) for tower in step.towers]
            live.mark(_whole_storages(features), "feature")
            loss_value = loss_of(step.plan, evaluate(step.plan, features, {}))
            # The caller's autocast block usually ends, and drops its casts, before the backward.
            forget_autocast_casts()
            with autocast_off(step.device_types):
                loss_value.backward()
    return _step_memory(live)


def count_cached_step(
    encoders: Encoders,
    loss: Callable[..., Any],
    example_inputs: Sequence[Any],
    batch_size: int,
    chunk_size: int,
    *,
    rows: Division | Sequence[Division | None] | None = None,
    get_features: GetFeatures | None = None,
    auxiliary_losses: Mapping[str, float] | None = None,
    optimizer_states: int = 2,
    rounding: Rounding = "none",
) -> StepMemory:
    """Count `GradCache(encoders, loss, chunk_size=chunk_size)(*inputs)` on one process.

    The peak holds parameters, gradients, optimizer states, inputs and features of the whole batch,
    and the largest of: one chunk without its graph, the loss's workspace, one chunk with its graph.
    The engine itself runs on fake tensors, over three chunks per encoder; further ones would repeat
    the second.

    Args, raises: as for `count_plain_step`; `chunk_size` is the number of rows per chunk, and
        `loss` should work in tiles, as `ClipLoss()` does.

    Example:
        >>> import torch
        >>> from torch.nn import Linear, Sequential, Tanh
        >>> def encoder():
        ...     return Sequential(Linear(8, 512), Tanh(), Linear(512, 4))
        >>> encoders = [encoder(), encoder()]
        >>> def loss(a, b):
        ...     return (a * b).sum(1).mean()
        >>> example = torch.ones(1, 8), torch.ones(1, 8)
        >>> plain = count_plain_step(encoders, loss, example, 8192)
        >>> cached = count_cached_step(encoders, loss, example, 8192, 64)
        >>> cached.total_bytes < plain.total_bytes / 10
        True
    """
    _check_positive(batch_size=batch_size, chunk_size=chunk_size)
    keeping = Keeping(get_features, optimizer_states, auxiliary_losses or {})
    inputs = _divided(example_inputs, rows)
    with fake_tensors(encoders, loss):
        step = FakeStep(encoders, loss, inputs, batch_size, keeping)
        live = _watch(step, rounding)
        cached = step.cached(chunk_size, live.mark)
        with live:
            cached.run({})
    return _step_memory(live)


def _divided(inputs: Sequence[Any], rows: Division | Sequence[Division | None] | None) -> list[Any]:
    """Divide packed inputs into rows, by their values, which fake tensors do not have."""
    divisions = one_for_each(checked_division(rows), len(inputs), "rows")
    pairs = zip(inputs, divisions, strict=True)
    return [given if division is None else division(given) for given, division in pairs]


def _watch(step: FakeStep, rounding: Rounding) -> LiveBytes:
    kinds = {"parameter": step.state, "optimizer": step.optimizer, "input": step.inputs}
    live = LiveBytes(start=kinds, rounding=rounding)
    for parameter in step.trainable:
        mark_gradient(parameter, live.mark, "gradient")
    return live


def _forward(tower: Tower) -> Any:
    flat = tower.forward(tower.module, tower.chunks[0])
    return pytree.tree_unflatten(flat, tower.structure)


def _whole_storages(features: Any) -> list[Tensor]:
    """Return features that own their memory; a view keeps the whole activation alive."""
    return [
        tensor
        for tensor in pytree.tree_leaves(features)
        if tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    ]


def _step_memory(live: LiveBytes) -> StepMemory:
    return StepMemory(
        *(
            live.peak_by_kind.get(kind, 0)
            for kind in ("parameter", "gradient", "optimizer", "input", "feature", "activation")
        )
    )


def _check_positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{name}: expected a positive integer, got {size!r}; pass e.g. 1024")
