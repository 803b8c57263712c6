"""How a backward is taken: on one process, or on many under DistributedDataParallel.

A strategy tells the engine which module embeds (`bare`), what multiplies the loss and the feature
gradients (`scale_loss`, `gradient_factor`), whether gradients are exchanged during a replay
(`replaying`), whether the first and the last replay must carry a chunk of every tower together
(`joint_ends`), whether a step that ran out of memory may start again (`recovers`: not where other
ranks would wait for this one), and what went wrong elsewhere (`on_any_rank`). It refuses modules
that it would give wrong gradients for (`check`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext

import torch
import torch.distributed as dist
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
    recovers = True

    def __init__(self, grad_scaler: torch.amp.GradScaler | None = None) -> None:
        self.grad_scaler = grad_scaler

    def check(self, modules: Sequence[nn.Module]) -> None:
        """Refuse modules that exchange gradients by themselves.

        Raises:
            ValueError: a module is wrapped in DistributedDataParallel.
        """
        for module in modules:
            if isinstance(_uncompiled(module), DistributedDataParallel):
                raise ValueError(
                    "strategy: expected DDPStrategy for an encoder in DistributedDataParallel, got "
                    f"{type(self).__name__}, which would leave its gradients divided by the world "
                    "size; pass strategy=DDPStrategy()"
                )

    def bare(self, module: nn.Module) -> nn.Module:
        """The module to embed with: no graph is built, so nothing needs to be exchanged."""
        return module

    def scale_loss(self, loss: Tensor) -> Tensor:
        return loss if self.grad_scaler is None else self.grad_scaler.scale(loss)

    def gradient_factor(self) -> float:
        """What a feature gradient is multiplied by so that parameter gradients come out right."""
        return 1.0

    def replaying(self, modules: Sequence[nn.Module], *, last: bool) -> AbstractContextManager:
        """A context around the forward and backward of one replay."""
        return nullcontext()

    def on_any_rank(self, flag: Tensor) -> bool:
        """Whether a 0-dim boolean is true on this or another rank; waits for the device."""
        return bool(flag)

    def smallest(self, value: int) -> int:
        """The smallest of a number that each rank has found."""
        return value


class DDPStrategy(LocalStrategy):
    """Encoders wrapped in DistributedDataParallel: gradients are reduced once a step.

    Every replay but the last runs inside `no_sync`; the last carries a chunk of every tower, so
    that each reducer sees all of its parameters in one backward. DDP averages over the ranks where
    the global loss asks for the sum, so feature gradients are multiplied by the world size.

    The loss must be that of the global batch, the same on every rank, and must give each rank the
    gradient of its own rows without summing over ranks, as `ClipLoss` and `gather_rows` do. With
    a loss over the local rows alone, or one gathered by `torch.distributed.nn.all_gather`, whose
    backward sums over ranks already, gradients come out larger by the world size.
    """

    joint_ends = True
    recovers = False

    def check(self, modules: Sequence[nn.Module]) -> None:
        """Refuse wrappers, or their absence, that would give wrong gradients or fail midway.

        Raises:
            ValueError: a trainable encoder is not wrapped, or its wrapper has settings that need
                one forward a step.
        """
        uses = Counter(id(module) for module in modules)
        for index, module in enumerate(modules):
            if isinstance(module, DistributedDataParallel):
                _check_wrapper(module, index, shared=uses[id(module)] > 1)
            elif isinstance(_uncompiled(module), DistributedDataParallel):
                raise ValueError(
                    f"encoder {index}: expected DistributedDataParallel outermost, got it inside "
                    "torch.compile; write DistributedDataParallel(torch.compile(encoder))"
                )
            elif any(parameter.requires_grad for parameter in module.parameters()):
                raise ValueError(
                    f"encoder {index}: expected an encoder in DistributedDataParallel, got "
                    f"{type(module).__name__}, whose gradients nobody would reduce; wrap it"
                )

    def bare(self, module: nn.Module) -> nn.Module:
        return module.module if isinstance(module, DistributedDataParallel) else module

    def gradient_factor(self) -> float:
        return float(world_size())

    def replaying(self, modules: Sequence[nn.Module], *, last: bool) -> AbstractContextManager:
        if last:
            return nullcontext()
        stack = ExitStack()
        for module in {id(module): module for module in modules}.values():
            if isinstance(module, DistributedDataParallel):
                stack.enter_context(module.no_sync())
        return stack

    def on_any_rank(self, flag: Tensor) -> bool:
        anywhere = flag.to(torch.int32)
        dist.all_reduce(anywhere, dist.ReduceOp.MAX)
        return bool(anywhere)

    def smallest(self, value: int) -> int:
        values: list[int | None] = [None] * world_size()
        dist.all_gather_object(values, value)
        return min(each for each in values if each is not None)


def innermost(module: nn.Module) -> nn.Module:
    """Below DistributedDataParallel and torch.compile."""
    inner = _uncompiled(module)
    if isinstance(inner, DistributedDataParallel):
        return innermost(inner.module)
    return inner


def _uncompiled(module: nn.Module) -> nn.Module:
    inner = getattr(module, "_orig_mod", module)
    assert isinstance(inner, nn.Module)
    return inner


def _check_wrapper(ddp: DistributedDataParallel, index: int, *, shared: bool) -> None:
    if ddp.static_graph or (shared and ddp.find_unused_parameters):
        setting = "static_graph" if ddp.static_graph else "find_unused_parameters"
        raise ValueError(
            f"encoder {index}: expected DistributedDataParallel without {setting}, got "
            f"{setting}=True, which allows one forward a step; leave it out"
        )
    if dist.get_world_size(ddp.process_group) != world_size():
        raise ValueError(
            f"encoder {index}: expected a wrapper over all {world_size()} ranks, got one over "
            f"{dist.get_world_size(ddp.process_group)}; use the default process group"
        )
