"""How a backward is taken: on one process, or on many under DistributedDataParallel.

A strategy answers four questions of the engine: which module embeds (`bare`), what multiplies the
loss and the feature gradients (`scale_loss`, `gradient_factor`), whether gradients are exchanged
during a replay (`replaying`), and whether the first and the last replay must carry a chunk of
every tower together (`joint_ends`).
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, ExitStack, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gradcache_clip.distributed.collectives import world_size


class LocalStrategy:
    """One process: gradients go straight into `.grad`.

    Args:
        grad_scaler: scales the loss, so that every gradient comes out scaled as after
            `grad_scaler.scale(loss).backward()`; the caller unscales and steps as usual.
    """

    joint_ends = False

    def __init__(self, grad_scaler: torch.amp.GradScaler | None = None) -> None:
        self.grad_scaler = grad_scaler

    def bare(self, module: nn.Module) -> nn.Module:
        """The module to embed with: no graph is built, so nothing needs to be exchanged."""
        return module

    def scale_loss(self, loss: Tensor) -> Tensor:
        return loss if self.grad_scaler is None else self.grad_scaler.scale(loss)

    def gradient_factor(self) -> float:
        """What a feature gradient is multiplied by so that parameter gradients come out right."""
        return 1.0

    def replaying(self, modules: Iterable[nn.Module], *, last: bool) -> AbstractContextManager:
        """A context around the forward and backward of one replay."""
        return nullcontext()


class DDPStrategy(LocalStrategy):
    """Encoders wrapped in DistributedDataParallel: gradients are reduced once a step.

    Every replay but the last runs inside `no_sync`; the last carries a chunk of every tower, so
    that each reducer sees all of its parameters in one backward. DDP averages over the ranks where
    the global loss asks for the sum, so feature gradients are multiplied by the world size.
    """

    joint_ends = True

    def bare(self, module: nn.Module) -> nn.Module:
        return module.module if isinstance(module, DistributedDataParallel) else module

    def gradient_factor(self) -> float:
        return float(world_size())

    def replaying(self, modules: Iterable[nn.Module], *, last: bool) -> AbstractContextManager:
        if last:
            return nullcontext()
        stack = ExitStack()
        for module in {id(module): module for module in modules}.values():
            if isinstance(module, DistributedDataParallel):
                stack.enter_context(module.no_sync())
        return stack
