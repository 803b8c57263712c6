"""The engine's own work for a chunk, counted in function calls: times would depend on the day."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradcache_clip import GradCache

FEW, MANY = 32, 96
MOST_CALLS, MOST_BUILTINS = 40, 36
"""Embed and replay of a chunk, on top of what the loop written by hand calls."""
MOST_CALLS_OF_A_DICT = 76


def linear() -> nn.Module:
    return nn.Linear(8, 4)


def deep() -> nn.Module:
    """A module whose walk would cost far more than its forward adds."""
    encoder = linear()
    encoder.unused = nn.ModuleList(nn.Identity() for _ in range(100))
    return encoder


class Texts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = linear()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(input_ids * attention_mask)


def dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum()


def counted(step: Callable[[], Any]) -> Counter[str]:
    """Calls of Python functions ("call") and of builtins ("c_call")."""
    found: Counter[str] = Counter()

    def count(frame: FrameType, event: str, argument: Any) -> None:
        found[event] += 1

    sys.setprofile(count)
    try:
        step()
    finally:
        sys.setprofile(None)
    return found


def extra(
    chunks: int, encoder: nn.Module, given: Any, rows_of: Callable[[Any, slice], Any]
) -> Counter[str]:
    """Calls of a cached step beyond those of the loop written by hand."""
    rows = [slice(2 * index, 2 * index + 2) for index in range(chunks)]
    batch = rows_of(given, slice(0, 2 * chunks))
    cache = GradCache((encoder, encoder), dot, chunk_size=2)
    call = (lambda x: encoder(**x)) if isinstance(given, dict) else encoder

    def by_hand() -> None:
        with torch.no_grad():
            features = [torch.cat([call(rows_of(batch, r)) for r in rows]) for _ in range(2)]
        leaves = [each.requires_grad_() for each in features]
        dot(*leaves).backward()
        for leaf in leaves:
            for r in rows:
                torch.autograd.backward([call(rows_of(batch, r))], [leaf.grad[r]])

    def cached() -> None:
        cache(batch, batch)

    for step in (by_hand, cached):
        step()
    return counted(cached) - counted(by_hand)


def extra_a_chunk(
    encoder: nn.Module, given: Any, rows_of: Callable[[Any, slice], Any]
) -> dict[str, float]:
    few, many = (extra(chunks, encoder, given, rows_of) for chunks in (FEW, MANY))
    return {event: (many[event] - few[event]) / (2 * (MANY - FEW)) for event in ("call", "c_call")}


def of_tensor(given: Tensor, rows: slice) -> Tensor:
    return given[rows]


def of_dict(given: dict[str, Tensor], rows: slice) -> dict[str, Tensor]:
    return {name: each[rows] for name, each in given.items()}


@pytest.mark.parametrize("encoder", [linear, deep])
def test_a_chunk_of_a_tensor_costs_few_calls(encoder: Callable[[], nn.Module]):
    found = extra_a_chunk(encoder(), torch.randn(2 * MANY, 8), of_tensor)
    assert found["call"] <= MOST_CALLS
    assert found["c_call"] <= MOST_BUILTINS


def test_a_chunk_of_a_dict_costs_few_calls_more():
    ids = {"input_ids": torch.randn(2 * MANY, 8), "attention_mask": torch.ones(2 * MANY, 8)}
    found = extra_a_chunk(Texts(), ids, of_dict)
    assert found["call"] <= MOST_CALLS_OF_A_DICT
