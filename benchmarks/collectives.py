"""Counting what a process exchanges: calls of torch.distributed, and the bytes that arrive."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class CountedCollectives(TorchDispatchMode):
    """Counts collectives by name while it is entered, those of a backward on the CPU included.

    `calls` and `bytes_received` are by name of the operation in `torch.ops.c10d`. An all-reduce of
    n bytes counts as 2 n (W - 1) / W received, which is what a ring over W processes needs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes_received: Counter[str] = Counter()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[Any],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func.namespace == "c10d":
            name = func._opname.strip("_")
            self.calls[name] += 1
            self.bytes_received[name] += _RECEIVED.get(name, _nothing)(args)
        return func(*args, **(kwargs or {}))

    @property
    def total_bytes_received(self) -> int:
        return sum(self.bytes_received.values())


def _bytes_of(nested: Any) -> int:
    tensors = (each for each in pytree.tree_leaves(nested) if isinstance(each, torch.Tensor))
    return sum(_size(each) for each in tensors)


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _nothing(args: tuple[Any, ...]) -> int:
    return 0


def _gathered(args: tuple[Any, ...]) -> int:
    """(output, input, ...): the own part does not travel."""
    return _bytes_of(args[0]) - _bytes_of(args[1])


def _reduced(args: tuple[Any, ...]) -> int:
    world = dist.get_world_size()
    return 2 * _bytes_of(args[0]) * (world - 1) // world


def _scattered(args: tuple[Any, ...]) -> int:
    """(output, input, ...): every other process sends its part of the output."""
    return _bytes_of(args[0]) * (dist.get_world_size() - 1)


def _arrived(args: tuple[Any, ...]) -> int:
    return _bytes_of(args[0])


_RECEIVED: dict[str, Callable[[tuple[Any, ...]], int]] = {
    "allgather_base": _gathered,
    "allgather": _gathered,
    "allgather_into_tensor_coalesced": _gathered,
    "allreduce": _reduced,
    "allreduce_coalesced": _reduced,
    "reduce_scatter_base": _scattered,
    "reduce_scatter": _scattered,
    "recv": _arrived,
    "recv_any_source": _arrived,
    "broadcast": _arrived,
}
