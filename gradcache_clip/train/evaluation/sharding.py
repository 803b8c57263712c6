"""Batches shared by several processes, and their features put back in order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from gradcache_clip.train.peers import Peers

Batch = TypeVar("Batch")


def shard_batches(batches: Iterable[Batch], peers: Peers) -> Iterator[Batch]:
    """Every n-th batch for each of n processes, the same number for all.

    Where the last round has no batch for this process, it repeats the round's first batch: encoders
    whose parameters are sharded need every process in each forward.

    Example:
        >>> [list(shard_batches("abcde", Peers(rank, 2))) for rank in (0, 1)]
        [['a', 'c', 'e'], ['b', 'd', 'e']]
    """
    own: list[Batch] = []
    for number, batch in enumerate(batches):
        turn = number % peers.world_size
        if turn in (0, peers.rank):
            own = [batch]
        if turn == peers.world_size - 1:
            yield own.pop()
    if own:
        yield own.pop()


def interleave(features: Sequence[Tensor], size: int, rows: int) -> Tensor:
    """Features of all batches in order, from those that each process embedded.

    Args:
        features: of each process, in the order of the ranks.
        size: rows per batch; the last may have fewer.
        rows: of all batches; rows that the last round repeated are dropped.

    Example:
        >>> interleave([torch.tensor([0, 1, 4]), torch.tensor([2, 3, 4])], size=2, rows=5)
        tensor([0, 1, 2, 3, 4])
    """
    rounds = zip(*(each.split(size) for each in features), strict=True)
    return torch.cat([batch for taken in rounds for batch in taken])[:rows]
