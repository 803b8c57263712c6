"""Pairs that two linear heads can learn, for the tests of negatives.py."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

_ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(_ROOT / "benchmarks"))

from negatives_data import (  # noqa: E402
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
