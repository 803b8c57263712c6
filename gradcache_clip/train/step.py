"""One optimizer step, with negatives from the whole batch or, for comparison, from a chunk only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradcache_clip.cache import ByLength, GradCache
from gradcache_clip.cache.batch_tree import count_rows, take_rows
from gradcache_clip.distributed import LocalStrategy
from gradcache_clip.losses import ContrastiveOutput
from gradcache_clip.train.config import TrainConfig

Backward = Callable[..., ContrastiveOutput]
"""Takes the inputs of the towers and `loss_kwargs`; runs forward and backward of a batch."""


class StepResult(NamedTuple):
    """Metrics of one optimizer step: 0-dim device tensors, so reading one synchronises."""

    loss: Tensor
    accuracy: Tensor
    grad_norm: Tensor


def make_backward(
    encoder: nn.Module,
    loss: nn.Module,
    config: TrainConfig,
    strategy: LocalStrategy,
    sort_by_length: Sequence[ByLength | None] | None = None,
) -> Backward:
    """Build the forward and backward of a batch: gradient caching, or plain accumulation.

    Args:
        sort_by_length: how to cut each input into chunks; see `GradCache`.
    """
    if config.grad_cache:
        return GradCache(
            encoder,
            loss,
            chunk_size=config.chunk_size,
            memory_budget=int(config.memory_budget_gib * 2**30) or None,
            sort_by_length=sort_by_length,
            strategy=strategy,
        )

    def accumulate(*inputs: Any, loss_kwargs: Mapping[str, Any]) -> ContrastiveOutput:
        return _accumulate(encoder, loss, strategy, config.chunk_size, inputs, loss_kwargs)

    return accumulate


def take_step(
    backward: Backward, inputs: Sequence[Any], loss_kwargs: Mapping[str, Any], engine: Any
) -> StepResult:
    """Compute gradients of a batch, clip, and step; never synchronises with the device."""
    engine.begin_step()
    with engine.autocast():
        output = backward(*inputs, loss_kwargs=loss_kwargs)
    norm = engine.finish_step()
    return StepResult(output.loss, output.accuracy, norm)


def _accumulate(
    encoder: nn.Module,
    loss: nn.Module,
    strategy: LocalStrategy,
    chunk_size: int,
    inputs: Sequence[Any],
    loss_kwargs: Mapping[str, Any],
) -> ContrastiveOutput:
    """Accumulate gradients plainly: each chunk's own loss, weighted by its share of the rows."""
    outputs, shares, rows = [], [], count_rows(inputs[0], "inputs")
    for start in range(0, rows, chunk_size):
        chunk, more = (
            take_rows(whole, start, start + chunk_size) for whole in (tuple(inputs), loss_kwargs)
        )
        output = loss(*(encoder(tower, given) for tower, given in enumerate(chunk)), **more)
        share = count_rows(chunk[0], "inputs") / rows
        # As torch advises: backward ops use the dtypes of their forward ops, without autocast.
        with torch.autocast(output.loss.device.type, enabled=False):
            strategy.scale_loss(output.loss * share).backward()
        outputs.append(type(output)(*(value.detach() for value in output)))
        shares.append(share)
    losses = torch.stack([output.loss for output in outputs])
    if not losses.isfinite().all():
        raise ValueError(
            f"loss: expected a finite loss of every chunk, got {losses.tolist()}; no step was "
            "taken: check these inputs, and the weights after the last step"
        )
    weights = losses.new_tensor(shares)
    return type(outputs[0])(
        *((torch.stack(values) * weights).sum() for values in zip(*outputs, strict=True))
    )
