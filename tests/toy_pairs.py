"""Pairs that two linear heads can learn, for the tests of negatives.py."""

from __future__ import annotations

import torch
from negatives_data import (
    DataSet,
    HeldOut,
    Pairs,
)

WIDTH = 12


def toy_data(pairs: int = 96, held_out: int = 20) -> DataSet:
    """Both sides see one hidden vector through a matrix of their own."""
    draw = torch.Generator().manual_seed(7)
    hidden = torch.randn(pairs + held_out, WIDTH, generator=draw)
    first, second = (hidden @ torch.randn(WIDTH, WIDTH, generator=draw) for _ in range(2))
    ids = torch.arange(held_out)
    return DataSet(
        Pairs(first[:pairs], second[:pairs], torch.arange(pairs)),
        HeldOut(first[pairs:], second[pairs:], ids, ids.clone()),
    )
