"""How a backward is taken on one process, and what all strategies for several have in common.

A strategy tells the engine

- `check`: which modules it would give wrong gradients for, before any gradient is touched;
- `leaves`: parameters that it takes care of;
- `unwrap`: which module embeds;
- `step_context`: a context around all of a step, whose normal end reduces what is left to reduce;
- `backward_of_loss`: how the loss gives the features their gradients, and `gradient_factor`, what
  these are multiplied by so that parameter gradients come out right;
- `replay_context`: a context around one replay, which knows who has its last one;
- `backward`: how the cached gradients of features go into the parameters;
- `joint_first_and_last`: whether the first and the last replay must carry a chunk of every tower;
- `kept_graphs_first`: whether graphs kept from the embed may come before the first of them;
- `collective_forward`: whether a forward waits for other ranks, so that all ranks must take the
  same number of them, and `plain_backward`, whether a rank may take a backward by itself, as
  measuring a chunk size does;
- `fills_grad`: whether gradients end in `.grad`, and `reduces`, whether only the end of a step
  makes them those of all ranks;
- `recovers`: whether a step that ran out of memory may start again, not where others would wait;
- `embedded` and `meet`: called between embed and loss, and before ranks tell each other
  something, where ranks that went different ways are told;
- `talks`: whether other ranks take the step together with this one;
- `on_any_rank`, `anywhere`, `gathered`, `smallest`: what happened, or was found, elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gradcache_clip.distributed.collectives import world_size
from gradcache_clip.distributed.wrappers import refuse_wrappers

# Entered once per chunk.
_NOTHING = nullcontext()


class LocalStrategy:
    """One process: gradients go straight into `.grad`.

    Args:
        grad_scaler: scales the loss, so that every gradient comes out scaled as after
            `grad_scaler.scale(loss).backward()`; the caller unscales and steps as usual.
        reduce_myself: allow several processes, and leave the reduction to the caller. `.grad` then
            holds what this rank's rows contribute: sum it over the ranks (do not average), for the
            encoders alone. A loss of this library gives its own parameters their whole gradient
            on every rank.
    """

    joint_first_and_last = False
    kept_graphs_first = True
    collective_forward = False
    plain_backward = True
    fills_grad = True
    reduces = False

    def __init__(
        self, grad_scaler: torch.amp.GradScaler | None = None, *, reduce_myself: bool = False
    ) -> None:
        self.grad_scaler = grad_scaler
        self.reduce_myself = reduce_myself

    @property
    def recovers(self) -> bool:
        return not self.talks

    def check(self, modules: Sequence[nn.Module], heads: Sequence[nn.Module] = ()) -> None:
        """Refuse modules that exchange gradients by themselves, and gradients nobody reduces.

        Args:
            modules: the encoder of each input.
            heads: modules in `get_features`.

        Raises:
            ValueError: a module is in DistributedDataParallel, sharded, or a DeepSpeed engine; or
                torch.distributed runs several processes and `reduce_myself` is not set.
        """
        refuse_wrappers([*modules, *heads], self)
        if world_size() > 1 and not self.reduce_myself:
            raise ValueError(
                "strategy: expected one that reduces gradients over the "
                f"{world_size()} processes of torch.distributed, got LocalStrategy, under which "
                "every process keeps its own and the weights drift apart; pass "
                "strategy=AllReduceStrategy(), or LocalStrategy(reduce_myself=True) if your own "
                "code sums .grad over the processes"
            )

    def leaves(self, module: nn.Module) -> Iterable[Tensor]:
        """Tensors that a graph of the module ends in, and whose gradients this takes care of."""
        return module.parameters()

    def unwrap(self, module: nn.Module) -> nn.Module:
        """The module to embed with: no graph is built, so nothing needs to be exchanged."""
        return module

    def step_context(self, modules: Sequence[nn.Module]) -> AbstractContextManager:
        """A context around a step over these encoders and heads."""
        return nullcontext()

    def embedded(self) -> None:
        """Raise where other ranks ran something else that all must run together."""

    def scale_loss(self, loss: Tensor) -> Tensor:
        return loss if self.grad_scaler is None else self.grad_scaler.scale(loss)

    def backward_of_loss(self, loss: Tensor, features: Sequence[Tensor]) -> None:
        """Fill `.grad` of the features, which are leaves here, and of the loss's own parameters."""
        self.scale_loss(loss).backward()

    def gradient_factor(self) -> float:
        """Factor on feature gradients that makes parameter gradients come out right."""
        return 1.0

    def replay_context(
        self, modules: Sequence[nn.Module], finished: AbstractSet[nn.Module]
    ) -> AbstractContextManager:
        """A context around one replay.

        Args:
            modules: the encoders that take part.
            finished: those of them that no later replay of the step runs.
        """
        return _NOTHING

    def backward(self, features: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """Add to the parameters what features, with their graphs, and cached gradients give."""
        torch.autograd.backward(features, gradients)

    @property
    def talks(self) -> bool:
        """Whether there are other ranks, which take this step together with this one."""
        return self.reduce_myself and world_size() > 1

    def meet(self) -> None:
        """Called before ranks tell each other something; raises where they went different ways."""

    def on_any_rank(self, flag: Tensor) -> bool:
        """Whether a 0-dim boolean is true on this or another rank; waits for the device."""
        if not self.talks:
            return bool(flag)
        self.meet()
        anywhere = flag.to(torch.int32)
        dist.all_reduce(anywhere, dist.ReduceOp.MAX)
        return bool(anywhere)

    def anywhere(self, found: bool, device: torch.device) -> bool:
        """The same of what this rank knows already; ranks tell each other through `device`."""
        return self.on_any_rank(torch.tensor(found, device=device)) if self.talks else found

    def gathered(self, value: Any) -> list[Any]:
        """A small object of every rank, in rank order."""
        if not self.talks:
            return [value]
        self.meet()
        values: list[Any] = [None] * world_size()
        dist.all_gather_object(values, value)
        return values

    def smallest(self, value: int) -> int:
        """The smallest of a number that each rank has found."""
        return min(self.gathered(value))


class ManyRanks(LocalStrategy):
    """Base of the strategies for several processes: ranks average, and wait for each other.

    The loss must be that of the global batch, the same on every rank, and must give each rank the
    gradient of its own rows without summing over ranks, as `ClipLoss` and `gather_rows` do. With
    a loss over the local rows alone, or one gathered by `torch.distributed.nn.all_gather`, whose
    backward sums over ranks already, gradients come out larger by the world size.

    The global loss asks for the sum over ranks where gradients are averaged, so feature gradients
    are multiplied by the world size. Gradients of the loss's own parameters are complete on every
    rank and are not reduced.
    """

    reduces = True

    def __init__(self, grad_scaler: torch.amp.GradScaler | None = None) -> None:
        super().__init__(grad_scaler)

    @property
    def talks(self) -> bool:
        return world_size() > 1

    @property
    def recovers(self) -> bool:
        return False

    def gradient_factor(self) -> float:
        return float(world_size())
