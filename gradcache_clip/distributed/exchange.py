"""Exchange of features and gradients for one loss over the rows of all ranks.

W processes, n rows on each; a row of all is number rank * n + i.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from gradcache_clip.distributed.collectives import all_gather, start_all_gather, world_size

Exchange = Literal["gather", "ring"]
"""How features of other ranks arrive: all at once, or one rank's after another's."""

# Rows of all ranks that a block holds, and the block.
Block = tuple[slice, Tensor]


@dataclass(frozen=True)
class Ranks:
    """The processes that share a batch.

    Args:
        group: process group; the default group when None.
        exchange: "gather" holds the features of all ranks, W n x D numbers a side; "ring" passes
            them from rank to rank and holds those of two, while the tiles of the last one are at
            work.
    """

    group: dist.ProcessGroup | None = None
    exchange: Exchange = "gather"

    @property
    def size(self) -> int:
        return world_size(self.group)

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group) if self.size > 1 else 0

    def own(self, rows: int) -> slice:
        """Where this rank's rows are among those of all."""
        return _rows_of(self.rank, rows)

    def others(self, features: Tensor) -> Iterator[Block]:
        """Features of the other ranks, block by block; the first are under way on return.

        A block is overwritten when the next but one arrives: use it before you ask for more.
        """
        if self.size == 1:
            return iter(())
        features = features.contiguous()
        return self._ring(features) if self.exchange == "ring" else self._gathered(features)

    def _gathered(self, features: Tensor) -> Iterator[Block]:
        rows = len(features)
        everyone = features.new_empty((self.size * rows, *features.shape[1:]))
        arrival = start_all_gather(everyone, features, self.group)
        parts = slice(0, self.rank * rows), slice((self.rank + 1) * rows, self.size * rows)

        def blocks() -> Iterator[Block]:
            arrival.wait()
            yield from ((part, everyone[part]) for part in parts if part.start < part.stop)

        return blocks()

    def _ring(self, features: Tensor) -> Iterator[Block]:
        buffers = torch.empty_like(features), torch.empty_like(features)
        arrivals = self._pass_on(features, buffers[0])

        def blocks() -> Iterator[Block]:
            nonlocal arrivals
            for step in range(1, self.size):
                for arrival in arrivals:
                    arrival.wait()
                block, spare = buffers[(step - 1) % 2], buffers[step % 2]
                arrivals = self._pass_on(block, spare) if step < self.size - 1 else []
                yield _rows_of((self.rank + step) % self.size, len(features)), block

        return blocks()

    def _pass_on(self, block: Tensor, into: Tensor) -> list[dist.Work]:
        """Send a block to the rank before, and receive the one of the rank after."""
        before, after = ((self.rank + step) % self.size for step in (-1, 1))
        send = dist.P2POp(dist.isend, block, group=self.group, group_peer=before)
        receive = dist.P2POp(dist.irecv, into, group=self.group, group_peer=after)
        return dist.batch_isend_irecv([send, receive])

    def joined(self, vectors: Tensor) -> Tensor:
        """Vectors of all ranks, (..., n) on each -> (..., W n), in rank order."""
        if self.size == 1:
            return vectors
        everyone = vectors.new_empty((self.size, *vectors.shape))
        all_gather(everyone.flatten(0, 1), vectors.contiguous(), self.group)
        return everyone.movedim(0, -2).flatten(-2)

    def maximum(self, values: Tensor) -> Tensor:
        """The largest of all ranks, elementwise and in place."""
        return self._reduced(values, dist.ReduceOp.MAX)

    def total(self, values: Tensor) -> Tensor:
        """The sum over all ranks, elementwise and in place; the same bits on every rank."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def _reduced(self, values: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        if self.size > 1:
            dist.all_reduce(values, operation, self.group)
        return values


def _rows_of(rank: int, rows: int) -> slice:
    return slice(rank * rows, (rank + 1) * rows)
