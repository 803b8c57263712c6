"""Graphs that are kept from the embed, so that their chunks need no replay."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate

import torch
from torch import Tensor

from gradcache_clip.cache.chunks import Chunk

MemoryBudget = int | float | str | None

_AUTO_SHARE = 0.8


class GraphBudget:
    """Bytes for graphs that stay alive from embed to replay, shared by all towers of a step.

    `agree` turns a number into the smallest that any rank has: where a forward waits for the other
    ranks, all must keep as many graphs.
    """

    def __init__(
        self,
        budget: MemoryBudget,
        device: torch.device,
        agree: Callable[[int], int] | None = None,
    ) -> None:
        self._agree = _itself if agree is None or budget is None else agree
        self.left_bytes = self._agree(budget_bytes(budget, device))
        # What is free now must also hold the graph of a chunk that is replayed.
        self._keeps_one_free = budget == "auto"

    def take(self, graph_bytes: Sequence[int]) -> int:
        """Take as many of these graphs as fit, from the first one on; return their number."""
        totals = list(accumulate(graph_bytes))
        fitting = sum(total <= self.left_bytes for total in totals)
        if fitting < len(totals) and self._keeps_one_free:
            fitting = max(0, fitting - 1)
        fitting = self._agree(fitting)
        if fitting:
            self.left_bytes -= totals[fitting - 1]
        self.left_bytes = self._agree(self.left_bytes)
        return fitting


class Retention:
    """Which graphs of one tower are kept.

    The first candidate is measured, and the others are taken to need as much a token (or a row);
    as many as then fit in the budget are kept, from the first one on. One chunk may be kept in any
    case: the last of a step, for the replay would need the memory of a graph anyway.
    """

    def __init__(
        self,
        budget: GraphBudget,
        chunks: Sequence[Chunk],
        candidates: range,
        always: int | None = None,
    ) -> None:
        self._budget, self._chunks = budget, chunks
        self._candidates, self._always = candidates, always
        self._measured, self._kept = False, range(0)

    def measures(self, index: int) -> bool:
        """Whether the graph of this chunk decides how many fit."""
        return not self._measured and self._budget.left_bytes > 0 and index in self._candidates

    def wants_graph(self, index: int) -> bool:
        """Whether this chunk is embedded with its graph."""
        if index == self._always or index in self._kept:
            return True
        return self._budget.left_bytes > 0 and self.measures(index)

    def keeps_graph(self, index: int, graph_bytes: int) -> bool:
        """Whether its graph, now that it is there, is kept."""
        if self.measures(index):
            sizes = [chunk.size for chunk in self._chunks[index : self._candidates.stop]]
            expected = [-(-graph_bytes * size // sizes[0]) for size in sizes]
            self._kept = range(index, index + self._budget.take(expected))
            self._measured = True
        return index == self._always or index in self._kept


class SavedBytes:
    """Bytes of the distinct storages that a graph keeps for its backward."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        """`known` tensors, such as parameters and inputs, are there anyway and not counted."""
        # A sharded parameter has no storage of its own, a sparse tensor none at all.
        local = (tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in known)
        dense = (tensor for tensor in local if tensor.layout is torch.strided)
        self._seen = {tensor.untyped_storage().data_ptr() for tensor in dense}
        self.total = 0

    @contextmanager
    def counting(self, wanted: bool) -> Iterator[None]:
        if not wanted:
            yield
            return
        with torch.autograd.graph.saved_tensors_hooks(self._add, _unchanged):
            yield

    def _add(self, tensor: Tensor) -> tuple[Tensor, int]:
        if tensor.layout is not torch.strided:
            return tensor, tensor._version
        storage, origin = tensor.untyped_storage(), tensor if tensor._base is None else tensor._base
        # A parameter that was gathered for the forward is not a part of the graph either.
        gathered = isinstance(origin, torch.nn.Parameter)
        if not gathered and storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.total += storage.nbytes()
        # The tensor itself may hold the node that keeps it, a cycle that nothing ever frees.
        return tensor.detach(), tensor._version


def _itself(value: int) -> int:
    return value


def _unchanged(saved: tuple[Tensor, int]) -> Tensor:
    """Unpack; autograd leaves the check of the version to whoever packed the tensor."""
    tensor, version = saved
    if tensor._version != version:
        raise RuntimeError(
            "memory_budget: expected tensors that a retained graph needs to stay as they are, got "
            f"one of shape {tuple(tensor.shape)} that was modified by an inplace operation; let "
            "the encoder change a copy, or leave memory_budget out"
        )
    return tensor


def checked_budget(budget: MemoryBudget) -> MemoryBudget:
    """Refuse what is no budget."""
    if budget is None or budget == "auto":
        return budget
    if isinstance(budget, float) and 0 < budget <= 1:
        return budget
    if isinstance(budget, int) and not isinstance(budget, bool) and budget >= 0:
        return budget
    raise ValueError(
        "memory_budget: expected bytes (an integer), a share of the device's memory (a float up to "
        f'1.0), "auto" or None, got {budget!r}; such as memory_budget=4 * 2**30'
    )


def budget_bytes(budget: MemoryBudget, device: torch.device) -> int:
    """A budget in bytes: itself, a share of the device's memory, or most of what is free now."""
    if budget is None:
        return 0
    if budget == "auto":
        return int(_AUTO_SHARE * _free_bytes(device))
    if isinstance(budget, float):
        return int(budget * _total_bytes(device))
    return int(budget)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + reserved
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _total_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


NO_RETENTION = Retention(GraphBudget(None, torch.device("cpu")), (), range(0))
