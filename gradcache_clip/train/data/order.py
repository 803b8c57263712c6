"""Which sample stands where: a pure function of the seed and the number of the step."""

from __future__ import annotations

import hashlib
import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

MAX_SUBSTITUTES = 200
"""Samples that are tried in the place of a broken one."""


@dataclass(frozen=True)
class Order:
    """The samples of every step. An epoch is a permutation, without its last, incomplete batch.

    Args:
        samples: N, of the whole set.
        batch_size: B, of all ranks together.
        seed: of the permutations.

    Example:
        >>> order = Order(samples=7, batch_size=3, seed=0)
        >>> order.steps, [order.epoch(step) for step in range(4)]
        (2, [0, 0, 1, 1])
        >>> len({*order.batch(0), *order.batch(1)})
        6
    """

    samples: int
    batch_size: int
    seed: int

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return self.samples // self.batch_size

    def epoch(self, step: int) -> int:
        """Epoch that a step belongs to, from 0."""
        return step // self.steps

    def batch(self, step: int) -> np.ndarray:
        """int64 (B,), the samples of a step; rank r of W reads the r-th of W equal parts."""
        first = step % self.steps * self.batch_size
        return self._epoch_of(step)[first : first + self.batch_size]

    def substitutes(self, step: int, position: int) -> Iterator[int]:
        """Samples that may stand at a position of the batch whose own sample is broken, in turn.

        Position p tries every B-th of `others`, from p on, so ranks and workers need not talk to
        take different ones. For sets of a few batches these may not do; see `Spares`.
        """
        own = self.others(step, position, self.batch_size)
        return itertools.islice(own, MAX_SUBSTITUTES)

    def others(self, step: int, start: int = 0, stride: int = 1) -> Iterator[int]:
        """The samples outside the batch in an order of their own, or each `stride`-th of them."""
        others = self.samples - self.batch_size
        if others < 1:
            return
        order, first = self._epoch_of(step), step % self.steps * self.batch_size
        factor, shift = _affine_permutation(others, f"{self.seed}:{step}:substitutes")
        for number in range(start, others, stride):
            place = (factor * number + shift) % others
            yield int(order[place if place < first else place + self.batch_size])

    def _epoch_of(self, step: int) -> np.ndarray:
        return _permutation(self.samples, f"{self.seed}:{self.epoch(step)}:samples")


# Two, because workers and pictures look across the end of an epoch.
@lru_cache(maxsize=2)
def _permutation(samples: int, name: str) -> np.ndarray:
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))
    return torch.randperm(samples, generator=generator).numpy()


def _affine_permutation(size: int, name: str) -> tuple[int, int]:
    """a and b of x -> (a x + b) mod size, which takes every value once: no list is held."""
    draw = random.Random(name)
    factor = draw.randrange(size) + 1
    while math.gcd(factor, size) > 1:
        factor = draw.randrange(size) + 1
    return factor, draw.randrange(size)
