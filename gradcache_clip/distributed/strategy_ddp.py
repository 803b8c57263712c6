"""Encoders in DistributedDataParallel."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import ExitStack, contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gradcache_clip.distributed.collectives import world_size
from gradcache_clip.distributed.many_ranks import ManyRanks
from gradcache_clip.distributed.unreached import reach, unused_stay_none
from gradcache_clip.distributed.wrappers import DDP, refuse_heads, refuse_wrappers, uncompiled


class DDPStrategy(ManyRanks):
    """Encoders wrapped in DistributedDataParallel: gradients are reduced once a step.

    Every replay but the last runs inside `no_sync`; the last carries a chunk of every tower, and
    its backward arrives at every parameter, also at those that these chunks, or this rank, do not
    use. Any pattern of use is therefore exact, without `find_unused_parameters`; a parameter that
    no rank uses keeps `.grad` None. DDP averages over the ranks where the global loss asks for the
    sum, so feature gradients are multiplied by the world size.

    The loss must be that of the global batch, the same on every rank, and must give each rank the
    gradient of its own rows without summing over ranks, as `ClipLoss` and `gather_rows` do. With
    a loss over the local rows alone, or one gathered by `torch.distributed.nn.all_gather`, whose
    backward sums over ranks already, gradients come out larger by the world size.
    """

    joint_first_and_last = True

    def __init__(self, grad_scaler: torch.amp.GradScaler | None = None) -> None:
        super().__init__(grad_scaler)
        self._finishing: list[tuple[DistributedDataParallel, list[nn.Parameter]]] = []
        self._zeros: list[Tensor] = []

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

    def unwrap(self, module: nn.Module) -> nn.Module:
        return module.module if isinstance(module, DistributedDataParallel) else module

    @contextmanager
    def step_context(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        try:
            yield
        except BaseException:
            # Otherwise the next step would be refused, for a reduction that has not ended.
            for module in modules:
                if isinstance(module, DistributedDataParallel):
                    getattr(module.reducer, "_reset_state", lambda: None)()
            raise

    @contextmanager
    def replay_context(
        self, modules: Sequence[nn.Module], finished: AbstractSet[nn.Module]
    ) -> Iterator[None]:
        wrapped = [
            module
            for module in dict.fromkeys(modules)
            if isinstance(module, DistributedDataParallel)
        ]
        last = [(module, _reduced(module)) for module in wrapped if module in finished]
        self._finishing = [(module, parameters) for module, parameters in last if parameters]
        # Autograd runs last what was made first. These zeros, made before the forwards, come after
        # all of them, so that wrappers reduce one after another in one order on every rank.
        self._zeros = [reach(parameters) for _, parameters in self._finishing[:-1]]
        with ExitStack() as stack:
            for module in wrapped:
                if module not in finished:
                    stack.enter_context(module.no_sync())
            yield

    def backward(self, features: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """The last one reaches what these features do not depend on, for DDP waits for it."""
        if not self._finishing:
            super().backward(features, gradients)
            return
        zeros, self._zeros = [*self._zeros, reach(self._finishing[-1][1])], []
        for (ddp, _), zero in zip(self._finishing, zeros, strict=True):
            if ddp.find_unused_parameters:
                # It has looked behind the last forward alone; every parameter will be reached.
                ddp.reducer.prepare_for_backward([zero])
        with unused_stay_none([p for _, parameters in self._finishing for p in parameters]):
            super().backward(
                [*features, *zeros], [*gradients, *(torch.zeros_like(zero) for zero in zeros)]
            )


def _reduced(ddp: DistributedDataParallel) -> list[nn.Parameter]:
    """Parameters that the wrapper's reducer waits for."""
    ignored = ddp.parameters_to_ignore
    named = ddp.module.named_parameters()
    return [p for name, p in named if p.requires_grad and name not in ignored]


def _check_wrapper(ddp: DistributedDataParallel, index: int, *, shared: bool) -> None:
    known, now = ddp._get_ddp_logging_data().get("num_parameter_tensors"), len(_reduced(ddp))
    if known is not None and known != now:
        raise ValueError(
            f"encoder {index}: expected the {known} trainable parameters that "
            f"DistributedDataParallel was given, got {now}, frozen or unfrozen since, which its "
            "reducer does not know; freeze first and wrap afterwards"
        )
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
