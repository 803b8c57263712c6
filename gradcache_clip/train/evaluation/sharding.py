"""Distributes batches over processes, and restores the order of their features."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from gradcache_clip.train.peers import Peers

Batch = TypeVar("Batch")


def shard_batches(batches: Iterable[Batch], peers: Peers) -> Iterator[Batch]:
    """Yield every n-th batch on each of n processes, the same number on all.

    If the last round has no batch for this process, repeat that round's first batch: an encoder
    with sharded parameters needs every process in each forward.

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
    """Restore the order of rows from the features that each process embedded.

    Args:
        features: of each process, in rank order.
        size: rows per batch; the last may have fewer.
        rows: total number of rows; rows that the last round repeated are dropped.

    Example:
        >>> interleave([torch.tensor([0, 1, 4]), torch.tensor([2, 3, 4])], size=2, rows=5)
        tensor([0, 1, 2, 3, 4])
    """
    rounds = zip(*(each.split(size) for each in features), strict=True)
    return torch.cat([batch for taken in rounds for batch in taken])[:rows]
