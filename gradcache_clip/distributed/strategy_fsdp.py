"""Encoders sharded with torch.distributed.fsdp.fully_shard (FSDP2)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradcache_clip.distributed.collectives import world_size
from gradcache_clip.distributed.fsdp_parts import (
    end_backward,
    forget_gradients,
    gather_all,
    give_zeros,
    groups_of,
    has_gradient,
    put_back,
    resharding_of,
    sharded_parts,
)
from gradcache_clip.distributed.many_ranks import ManyRanks
from gradcache_clip.distributed.same_backward import same_backward
from gradcache_clip.distributed.same_forward import ForwardLog
from gradcache_clip.distributed.state import check_max_norm, rank0_keeps, trained_parameters
from gradcache_clip.distributed.unreached import without_use
from gradcache_clip.distributed.wrappers import (
    FSDP2,
    is_kind,
    refuse_heads,
    refuse_wrappers,
    uncompiled,
)

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


class FSDPStrategy(ManyRanks):
    """Encoders sharded by `fully_shard`: gradients are reduced once a step.

    The gradients of an encoder are reduced and scattered after its last replay, in one order on
    every rank, and a parameter that some rank uses is reduced on all of them. Each encoder is a
    root of its own, one root serves two inputs, or one root with `forward(tower, inputs)` serves
    all; layers inside are sharded as usual. Embed and replay go through the same hooks, so a
    `MixedPrecisionPolicy` acts on both. With 16-bit `param_dtype` give it
    `reduce_dtype=torch.float32`: gradients of the chunks are then added up in 32 bits as well.

    Memory for each rank, during a step: the shards; gradients in full, in `reduce_dtype`, of every
    encoder from its first backward until its last, because they are reduced once a step; and the
    parameters of the layer that runs. Every chunk gathers all parameters of its encoder up to three
    times: in the embed, and in the forward and the backward of its replay. With `keep_gathered`
    that is once a step, and all parameters of an encoder stay gathered from its embed until its
    last replay, in `param_dtype`: add their bytes.

    The loss must be that of the global batch on every rank, as for `DDPStrategy`. All ranks must
    cut their rows into as many chunks, and `chunk_size="auto"` is refused. They must also run the
    same sharded modules in each chunk, because a forward gathers: where rows decide (a tower that
    runs only for chunks with images) take `keep_gathered`, which gathers beforehand.

    `weights` and `state` gather one tensor at a time, and only rank 0 keeps it. The optimizer holds
    shards, so parameters that are not sharded (of the loss) need a parameter group of their own.

    Args:
        grad_scaler: scales the loss; `step` takes none that is enabled.
        keep_gathered: gather parameters once a step instead of up to three times a chunk.
    """

    collective_forward = True
    plain_backward = False

    def __init__(
        self, grad_scaler: torch.amp.GradScaler | None = None, *, keep_gathered: bool = False
    ) -> None:
        super().__init__(grad_scaler)
        self.keep_gathered = keep_gathered
        self._log = ForwardLog(
            "run them on every rank, or pass FSDPStrategy(keep_gathered=True), which gathers "
            "beforehand, or take DDPStrategy or AllReduceStrategy",
            gathers=True,
        )

    def check(self, modules: Sequence[nn.Module], heads: Sequence[nn.Module] = ()) -> None:
        """Refuse encoders that are not sharded, or not as this takes them to be.

        Raises:
            ValueError: a trainable encoder is not sharded, keeps a trainable parameter out of the
                sharding, is sharded over a part of the ranks only, or divides by another number;
                it is in another wrapper; or `get_features` has parameters.
        """
        refuse_wrappers(modules, self, allowed=[FSDP2])
        refuse_heads(heads, self)
        for index, module in enumerate(modules):
            if any(parameter.requires_grad for parameter in module.parameters()):
                _check_sharded(uncompiled(module), index)
            _gather_for_trunk(uncompiled(module))

    def leaves(self, module: nn.Module) -> Iterable[Tensor]:
        """Also the gathered parameters, in which graphs end."""
        groups = chain.from_iterable(groups_of(part) for part in sharded_parts([module]))
        sharded = chain.from_iterable(group.fsdp_params for group in groups)
        gathered = (getattr(parameter, "_unsharded_param", None) for parameter in sharded)
        return chain(module.parameters(), (tensor for tensor in gathered if tensor is not None))

    @contextmanager
    def step_context(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        roots, parts = _roots(modules), sharded_parts(modules)
        before = [resharding_of(part) for part in parts] if self.keep_gathered else []
        try:
            if self.keep_gathered:
                gather_all(roots, parts)
            # Where all is gathered a forward or backward waits for nobody.
            waiting = [] if self.keep_gathered else parts
            with self._log.watching(_named(modules, waiting)), same_backward(roots, waiting):
                yield
        except BaseException:
            forget_gradients(parts)
            raise
        finally:
            for settings in before:
                put_back(settings)
            for part in parts:
                part.set_requires_gradient_sync(True, recurse=False)
                part.set_is_last_backward(True)
                part.reshard()

    def meet(self) -> None:
        self._log.meet()

    def embedded(self) -> None:
        if not self.keep_gathered:
            self._log.end()

    @contextmanager
    def replay_context(
        self, modules: Sequence[nn.Module], finished: AbstractSet[nn.Module]
    ) -> Iterator[None]:
        roots = _roots(modules)
        for root in roots:
            root.set_requires_gradient_sync(False)
            root.set_is_last_backward(False)
        yield
        last = {uncompiled(module) for module in finished}
        for root in roots:
            if root in last:
                _reduce(root, reshard=self.keep_gathered)

    def clip(self, modules: Sequence[nn.Module], max_norm: float) -> Tensor:
        check_max_norm(max_norm)
        for part in sharded_parts(modules):
            part.reshard()
        gradients = [p.grad for p in trained_parameters(modules) if p.grad is not None]
        norm = _norm_of(gradients)
        if max_norm > 0:
            factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
            for gradient in gradients:
                local = gradient.to_local() if _is_sharded(gradient) else gradient
                local.mul_(factor)
        return norm

    def _check_optimizer(self, optimizer: Optimizer, modules: Sequence[nn.Module]) -> None:
        for part in sharded_parts(modules):
            # An evaluation may have left it gathered, and then it shows other parameters.
            part.reshard()
        if self.grad_scaler is not None and self.grad_scaler.is_enabled():
            raise ValueError(
                "grad_scaler: expected none under FSDPStrategy, got an enabled one, which looks "
                "for overflows in the shards of this rank alone; use bf16"
            )
        super()._check_optimizer(optimizer, modules)

    def _whole(self, value: Any) -> Any:
        value = super()._whole(value)
        return rank0_keeps(value.full_tensor()) if _is_sharded(value) else value

    def _part(self, value: Any, of: Any) -> Any:
        from torch.distributed.tensor import distribute_tensor

        if not _is_sharded(of):
            return value
        return distribute_tensor(value.to(of.device), of.device_mesh, of.placements)


def _is_sharded(value: Any) -> TypeGuard[DTensor]:
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)


def _norm_of(gradients: Iterable[Tensor]) -> Tensor:
    """The global norm; ranks add up once for each mesh, not once for each gradient."""
    by_mesh: dict[Any, list[Tensor]] = {}
    for gradient in gradients:
        mesh = gradient.device_mesh if _is_sharded(gradient) else None
        by_mesh.setdefault(mesh, []).append(gradient)
    norms = [nn.utils.get_total_norm(each) for each in by_mesh.values()]
    return nn.utils.get_total_norm([n.full_tensor() if _is_sharded(n) else n for n in norms])


def _roots(modules: Iterable[nn.Module]) -> list[Any]:
    """Encoders that are sharded, each once."""
    roots = dict.fromkeys(uncompiled(module) for module in modules)
    return [root for root in roots if is_kind(root, FSDP2)]


def _named(modules: Sequence[nn.Module], parts: Sequence[nn.Module]) -> dict[str, nn.Module]:
    """Parts by the name that a person knows them by."""
    wanted = {id(part) for part in parts}
    return {
        f"{name or type(part).__name__} of encoder {index}": part
        for index, module in reversed([*enumerate(modules)])
        for name, part in uncompiled(module).named_modules()
        if id(part) in wanted
    }


def _reduce(root: Any, *, reshard: bool) -> None:
    """Reduce and scatter what all replays have added up, in one order on every rank.

    Inside of a backward the order would follow the graph, and parameters that a rank has not
    reached would be left out on that rank alone.
    """
    groups = [group for part in sharded_parts([root]) for group in groups_of(part)]
    trained = [p for group in groups for p in group.fsdp_params if p.sharded_param.requires_grad]
    missing = {id(p.sharded_param) for p in trained if not has_gradient(p)}
    sharded = [p.sharded_param for p in trained]
    nobody = {id(parameter) for parameter in without_use(sharded, missing)}
    root.set_requires_gradient_sync(True)
    root.set_is_last_backward(True)
    if reshard:
        root.set_reshard_after_backward(True)
    for group in reversed(groups):
        for parameter in group.fsdp_params:
            if id(parameter.sharded_param) in missing - nobody:
                give_zeros(parameter)
        group.post_backward()
    end_backward(root)


def _check_sharded(module: nn.Module, index: int) -> None:
    if not is_kind(module, FSDP2):
        raise ValueError(
            f"encoder {index}: expected an encoder sharded by fully_shard, got "
            f"{type(module).__name__}, whose gradients nobody would reduce; call "
            "torch.distributed.fsdp.fully_shard(encoder), also where its layers are sharded already"
        )
    for part in sharded_parts([module]):
        # An evaluation may have left it gathered.
        part.reshard()
        _check_division(part, index)
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        if not _is_sharded(parameter):
            raise ValueError(
                f"encoder {index}: expected every trainable parameter to be sharded, got {name} "
                "outside of it, whose gradient nobody would reduce; leave it out of ignored_params"
            )
        if parameter.device_mesh.size() != world_size():
            raise ValueError(
                f"encoder {index}: expected a mesh over all {world_size()} ranks, got one over "
                f"{parameter.device_mesh.size()} for {name}; leave mesh out of fully_shard"
            )


def _gather_for_trunk(module: Any) -> None:
    """A `FrozenTrunk` runs its trunk alone, for which its parameters are to be gathered as well."""
    from torch.distributed.fsdp import register_fsdp_forward_method

    if hasattr(module, "through_trunk") and "through_trunk" not in vars(module):
        register_fsdp_forward_method(module, "through_trunk")


def _check_division(part: Any, index: int) -> None:
    for group in groups_of(part):
        if (divisor := getattr(group, "gradient_divide_factor", None)) is not None:
            raise ValueError(
                f"encoder {index}: expected gradients averaged over the ranks, got "
                f"set_gradient_divide_factor({divisor}); leave it out"
            )
