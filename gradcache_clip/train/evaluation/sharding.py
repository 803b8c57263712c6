"""Batches dealt out to several processes, and their rows put together again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from gradcache_clip.train.peers import Peers

Batch = TypeVar("Batch")


def shard_batches(batches: Iterable[Batch], peers: Peers) -> Iterator[Batch]:
    """Every n-th batch, so that n processes take all of them, and all as many.

    Where the last round has none for this process it gives the round's first batch again, since
    encoders whose parameters are spread over the processes need all of these to take part.

    Example:
        >>> [list(shard_batches("abcde", Peers(rank, 2))) for rank in (0, 1)]
        [['a', 'c', 'e'], ['b', 'd', 'e']]
    """
    taken: list[Batch] = []
    for number, batch in enumerate(batches):
        place = number % peers.world_size
        if place in (0, peers.rank):
            taken = [batch]
        if place == peers.world_size - 1:
            yield taken.pop()
    if taken:
        yield taken.pop()


def interleave(features: Sequence[Tensor], size: int, rows: int) -> Tensor:
    """The features of all batches in order, from those that each process has embedded.

    Args:
        features: of each process, in the order of the ranks.
        size: rows of a batch; the last may have fewer.
        rows: of all batches; what the last round repeated is left out.

    Example:
        >>> interleave([torch.tensor([0, 1, 4]), torch.tensor([2, 3, 4])], size=2, rows=5)
        tensor([0, 1, 2, 3, 4])
    """
    rounds = zip(*(each.split(size) for each in features), strict=True)
    return torch.cat([batch for taken in rounds for batch in taken])[:rows]
