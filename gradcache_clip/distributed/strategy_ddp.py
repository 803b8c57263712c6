"""Encoders in DistributedDataParallel."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager, ExitStack

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gradcache_clip.distributed.collectives import world_size
from gradcache_clip.distributed.strategy import ManyRanks
from gradcache_clip.distributed.wrappers import DDP, refuse_heads, refuse_wrappers, uncompiled


class DDPStrategy(ManyRanks):
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

    def check(self, modules: Sequence[nn.Module], heads: Sequence[nn.Module] = ()) -> None:
        """Refuse wrappers, or their absence, that would give wrong gradients or fail midway.

        Raises:
            ValueError: a trainable encoder is not wrapped, its wrapper has settings that need one
                forward a step, another wrapper is in use, or `get_features` has parameters.
        """
        refuse_wrappers(modules, self, allowed=[DDP])
        refuse_heads(heads, self)
        uses = Counter(id(module) for module in modules)
        for index, module in enumerate(modules):
            if isinstance(module, DistributedDataParallel):
                _check_wrapper(module, index, shared=uses[id(module)] > 1)
            elif isinstance(uncompiled(module), DistributedDataParallel):
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

    def replaying(
        self, modules: Sequence[nn.Module], finished: AbstractSet[nn.Module]
    ) -> AbstractContextManager:
        stack = ExitStack()
        for module in {*modules} - finished:
            if isinstance(module, DistributedDataParallel):
                stack.enter_context(module.no_sync())
        return stack


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
