"""Encoders as each strategy wants them, and how often a collective is called."""

from __future__ import annotations

from pkgutil import resolve_name
from typing import Any
from unittest import mock

from strategy_steps import OneModule
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP

_FSDP = "torch.distributed.fsdp._fully_shard._fsdp_collectives"
REDUCE = "torch.distributed.all_reduce"
SCATTER = f"{_FSDP}.DefaultReduceScatter.__call__"
GATHER = f"{_FSDP}.DefaultAllGather.__call__"


class Counted:
    """Calls of a collective on flat buckets: features travel as matrices, flags as integers."""

    def __init__(self, target: str) -> None:
        self.calls, self.elements, original = 0, 0, resolve_name(target)

        def counted(*args: Any, **kwargs: Any) -> Any:
            tensors = [a for a in [*args, *kwargs.values()] if isinstance(a, Tensor)]
            flat = [t for t in tensors if t.is_floating_point() and t.dim() == 1]
            self.calls += bool(flat)
            self.elements += sum(t.numel() for t in flat)
            return original(*args, **kwargs)

        self.patch = mock.patch(target, counted)

    def __enter__(self) -> Counted:
        self.patch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.patch.stop()


def as_they_are(encoders: list[nn.Module]) -> list[nn.Module]:
    return encoders


def each_in_ddp(encoders: list[nn.Module], **options: Any) -> list[nn.Module]:
    wrapped = {id(encoder): encoder for encoder in encoders}
    wrapped = {
        key: DDP(encoder, **options) if _is_trained(encoder) else encoder
        for key, encoder in wrapped.items()
    }
    return [wrapped[id(encoder)] for encoder in encoders]


def _is_trained(encoder: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in encoder.parameters())


def sharded(encoder: nn.Module, **options: Any) -> nn.Module:
    """Its linear layers, and what is left, as groups of their own."""
    for layer in encoder.modules():
        if isinstance(layer, nn.Linear):
            fully_shard(layer, **options)
    return fully_shard(encoder, **options)


def each_sharded(encoders: list[nn.Module]) -> list[nn.Module]:
    for encoder in {id(encoder): encoder for encoder in encoders}.values():
        if any(p.requires_grad for p in encoder.parameters()):
            sharded(encoder)
    return encoders


def one_plain(encoders: list[nn.Module]) -> nn.Module:
    return OneModule(encoders)


def one_in_ddp(encoders: list[nn.Module]) -> nn.Module:
    return DDP(OneModule(encoders))


def one_root(encoders: list[nn.Module]) -> nn.Module:
    for encoder in encoders:
        for layer in encoder.modules():
            if isinstance(layer, nn.Linear):
                fully_shard(layer)
    return fully_shard(OneModule(encoders))
