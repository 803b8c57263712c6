"""A cached step for a LightningModule of `lightning` or `pytorch_lightning`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gradcache_clip.cache import GradCache
from gradcache_clip.cache.deferred import deferred_step
from gradcache_clip.distributed import AllReduceStrategy, world_size


def cached_step(module: Any, cache: GradCache, *inputs: Any, **loss_kwargs: Any) -> Any:
    """Embed a batch and compute its loss, for `training_step` to return; its backward replays.

    Lightning's automatic optimization treats the loss like any other: it divides it for
    accumulation, scales it, clips and steps. With strategy "ddp" the loss covers the pairs of all
    processes, and the backward reduces the encoders' gradients once, instead of DDP. In
    `validation_step` the call evaluates the batch chunk by chunk.

    Args:
        module: the LightningModule, with encoders and loss as submodules.
        cache: of these encoders and this loss.
        inputs: one batch per encoder, as in `cache(*inputs)`.
        loss_kwargs: further arguments of the loss.

    Returns:
        The output of the loss, differentiable; a bare tensor is returned as an object with `.loss`.

    Raises:
        TypeError: `cache` is not a `GradCache`.
        ValueError: a Lightning strategy that shards the model, encoders or a loss that are not
            submodules, or anything that `deferred_step` refuses.

    Example:
        from gradcache_clip.integrations.lightning import cached_step
        class Pairs(LightningModule):
            def __init__(self, image_encoder, text_encoder):
                super().__init__()
                self.image, self.text, self.loss = image_encoder, text_encoder, ClipLoss()
                self.cache = GradCache((self.image, self.text), self.loss, chunk_size=64)

            def training_step(self, batch, _):
                return cached_step(self, self.cache, *batch).loss

            def configure_optimizers(self):
                return torch.optim.AdamW(self.parameters())

        Trainer(max_steps=1000).fit(Pairs(image_encoder, text_encoder), loader)
    """
    _check_cache(cache)
    wrapped = module.trainer.strategy.model
    _check_parts(module, cache)
    if isinstance(wrapped, DistributedDataParallel):
        _reduce_instead_of(wrapped, cache)
    elif wrapped is not module or (world_size() > 1 and torch.is_grad_enabled()):
        raise ValueError(
            'strategy: expected one device or "ddp", got '
            f"{type(module.trainer.strategy).__name__}, which frees parameters between the embed "
            "and the backward, or must run every backward itself; use "
            'Trainer(strategy="ddp"), or GradCache with FSDPStrategy or DeepSpeedStrategy in '
            "your own loop"
        )
    elif world_size() > 1:
        _reduce_over_ranks(cache)
    return deferred_step(cache, *inputs, loss_kwargs=loss_kwargs)


def _reduce_instead_of(ddp: DistributedDataParallel, cache: GradCache) -> None:
    """Let the cache reduce gradients instead of DDP, which expects one backward per step."""
    if ddp.static_graph:
        raise ValueError(
            "strategy: expected DDP without static_graph, got static_graph=True, which assumes "
            "one backward per step; leave it out"
        )
    _reduce_over_ranks(cache)
    # Lightning itself sets this for manual optimization, and reads it after every training_step.
    ddp.require_backward_grad_sync = False


def _reduce_over_ranks(cache: GradCache) -> None:
    if not isinstance(cache.strategy, AllReduceStrategy):
        cache.use_strategy(AllReduceStrategy(cache.strategy.grad_scaler))


def _check_cache(cache: Any) -> None:
    if not isinstance(cache, GradCache):
        raise TypeError(
            f"cache: expected a GradCache, got {type(cache).__name__}; write cached_step(self, "
            "self.cache, *batch) with self.cache = GradCache(encoders, loss) in __init__"
        )


def _check_parts(module: nn.Module, cache: GradCache) -> None:
    """Require all trained parts in the module, for optimizers, checkpoints and devices."""
    encoders = cache.encoders if isinstance(cache.encoders, tuple) else (cache.encoders,)
    known = {id(parameter) for parameter in module.parameters()}
    for part in (*encoders, cache.loss):
        if isinstance(part, nn.Module) and any(id(p) not in known for p in part.parameters()):
            raise ValueError(
                f"cache: expected encoders and a loss that are submodules of "
                f"{type(module).__name__}, got {type(part).__name__} with parameters outside of "
                "it; assign it to an attribute of the module, too"
            )
