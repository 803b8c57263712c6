"""What a strategy does, and the one for a single process.

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
- `embedded` and `meet`: called before the loss, and before ranks talk, to find ranks that differ;
- `talks`: whether other ranks take the step together with this one;
- `on_any_rank`, `anywhere`, `gathered`, `smallest`: what happened, or was found, elsewhere.

For the loop around the engine it also clips gradients and steps (`clip`, `step`,
`set_learning_rate`), and reads and writes the whole weights and optimizer state by name (`weights`,
`load_weights`, `state`, `load_state`), so that a checkpoint of one strategy and number of processes
serves every other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from gradcache_clip.distributed.collectives import world_size
from gradcache_clip.distributed.state import (
    check_max_norm,
    check_optimizer,
    checked_weights,
    load_state_by_name,
    plain_name,
    state_by_name,
    trained_by_name,
    trained_parameters,
)
from gradcache_clip.distributed.wrappers import innermost, refuse_wrappers

# Entered once per chunk.
_NOTHING = nullcontext()


class LocalStrategy:
    """One process: gradients go straight into `.grad`.

    All ranks call `step`, `weights`, `load_weights`, `state` and `load_state` together.

    Args:
        grad_scaler: scales the loss, so that every gradient comes out scaled as after
            `grad_scaler.scale(loss).backward()`; `step` unscales, or the caller does as usual.
        reduce_myself: allow several processes, and leave the reduction to the caller. `.grad` then
            holds what this rank's rows contribute: sum it over the ranks (do not average), for the
            encoders alone. A loss of this library gives its own parameters their whole gradient
            on every rank.

    Example:
        >>> from gradcache_clip import ClipLoss, GradCache
        >>> encoders, loss = [nn.Linear(8, 4), nn.Linear(6, 4)], ClipLoss()
        >>> modules = [nn.ModuleDict(zip(("image", "text"), encoders)), loss]
        >>> optimizer = torch.optim.AdamW([p for m in modules for p in m.parameters()])
        >>> strategy = LocalStrategy()
        >>> cache = GradCache(encoders, loss, strategy=strategy)
        >>> out = cache(torch.ones(4, 8), torch.ones(4, 6))
        >>> norm = strategy.step(optimizer, modules, max_norm=1.0)
        >>> state = strategy.state(optimizer, modules)
        >>> [*strategy.weights(modules[0])]
        ['image.weight', 'image.bias', 'text.weight', 'text.bias']
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
            ValueError: a module is in a wrapper (DataParallel, DDP, FSDP, a DeepSpeed engine), or
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

    def clip(self, modules: Sequence[nn.Module], max_norm: float) -> Tensor:
        """Scale all gradients down to a global norm of at most `max_norm`; 0 leaves them.

        Args:
            modules: all that is trained: encoders, heads and loss.
            max_norm: of all gradients together, over all ranks.

        Returns:
            The norm before, a 0-dim tensor on the device; nothing waits for it.
        """
        check_max_norm(max_norm)
        given = [p for p in trained_parameters(modules) if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in given if p.grad is not None])
        if max_norm > 0:
            nn.utils.clip_grads_with_norm_(given, max_norm, norm)
        return norm

    def step(
        self, optimizer: Optimizer, modules: Sequence[nn.Module], max_norm: float = 0.0
    ) -> Tensor:
        """Unscale the gradients, clip them as `clip` does, and step the optimizer.

        Where gradients overflowed, a `grad_scaler` leaves the weights as they are. Gradients stay:
        call `optimizer.zero_grad()` before the next cached step.

        Args:
            optimizer: over the trainable parameters of `modules`.
            modules: all that is trained: encoders, heads and loss.
            max_norm: largest global norm; 0 for no clipping.

        Returns:
            The global norm before clipping, a 0-dim tensor on the device.

        Raises:
            ValueError: the optimizer has other parameters than `modules` train.
        """
        check_max_norm(max_norm)
        self._check_optimizer(optimizer, modules)
        if self.grad_scaler is None:
            norm = self.clip(modules, max_norm)
            optimizer.step()
            return norm
        self.grad_scaler.unscale_(optimizer)
        norm = self.clip(modules, max_norm)
        self.grad_scaler.step(optimizer)
        self.grad_scaler.update()
        return norm

    def set_learning_rate(self, optimizer: Optimizer, rate: float) -> None:
        """Set the learning rate of every parameter group for the next step."""
        for group in optimizer.param_groups:
            group["lr"] = rate

    def weights(self, module: nn.Module) -> dict[str, Any]:
        """The state dict of a module with whole tensors, by the names that it has unwrapped.

        Tensors are complete on rank 0; on others some may be empty. Without a wrapper that shards
        they share memory with the module, as in `state_dict`.
        """
        module = innermost(module)
        state = module.state_dict(keep_vars=True)
        # Tied weights once.
        whole = {id(value): self._whole(value) for value in state.values()}
        return {plain_name(module, name): whole[id(value)] for name, value in state.items()}

    def load_weights(self, module: nn.Module, weights: Mapping[str, Any]) -> None:
        """Load what `weights` returned, of any strategy and number of ranks, on every rank.

        Raises:
            ValueError: other names, or other shapes, than the module has.
        """
        module = innermost(module)
        state = checked_weights(module, weights)
        module.load_state_dict({n: self._part(value, of) for n, (value, of) in state.items()})

    def state(self, optimizer: Optimizer, modules: Sequence[nn.Module]) -> dict[str, Any]:
        """What the next step depends on beside the weights, whole and by parameter name.

        Args:
            optimizer: over the trainable parameters of `modules`.
            modules: as for `step`; no two parameters of the same name.

        Returns:
            "optimizer": state by name; "scaler": state of the `grad_scaler`. Tensors are complete
            on rank 0; on others some may be empty.

        Raises:
            ValueError: two parameters of one name, or the optimizer has others than `modules`.
        """
        self._check_optimizer(optimizer, modules)
        moments = state_by_name(optimizer, trained_by_name(modules), self._whole)
        scaler = {} if self.grad_scaler is None else self.grad_scaler.state_dict()
        return {"optimizer": moments, "scaler": scaler}

    def load_state(
        self, optimizer: Optimizer, modules: Sequence[nn.Module], state: Mapping[str, Any]
    ) -> None:
        """Load what `state` returned, of any strategy and number of ranks, on every rank.

        Learning rates and other settings of the optimizer stay as they are.

        Raises:
            ValueError: as `state`; or a parameter has no saved state, while others have one.
        """
        self._check_optimizer(optimizer, modules)
        named = trained_by_name(modules)
        load_state_by_name(optimizer, named, state["optimizer"], self._part)
        # Empty where the strategy that wrote it did not scale.
        if self.grad_scaler is not None and state["scaler"]:
            self.grad_scaler.load_state_dict(state["scaler"])

    def _check_optimizer(self, optimizer: Optimizer, modules: Sequence[nn.Module]) -> None:
        check_optimizer(optimizer, trained_parameters(modules))

    def _whole(self, value: Any) -> Any:
        """The whole of a tensor of which this rank may hold a part."""
        return value.detach() if isinstance(value, Tensor) else value

    def _part(self, value: Any, of: Any) -> Any:
        """What this rank holds of a whole tensor, sharded as `of` is."""
        return value
