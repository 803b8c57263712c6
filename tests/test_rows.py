"""However an input divides into rows: gradients of the one-shot step, or an error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from one_shot import gradient_errors, twins, worst
from row_kinds import KINDS, Kind
from torch import Tensor, nn

from gradcache_clip import ByLength, GradCache
from gradcache_clip.cache.batch_tree import tensors_in
from gradcache_clip.cache.trunk import call_encoder


def dot_product(x: Tensor, y: Tensor) -> Tensor:
    return ((x @ y.T) ** 2).mean()


def assert_exact(kind: Kind, encoder: nn.Module, rows: int, **options: Any) -> None:
    """Compare gradients of parameters and of inputs with those of the one-shot step."""
    ours, truth = twins(encoder.double(), nn.Linear(3, 5).double())
    beside = torch.randn(rows, 3).double()
    leaves = [tensor for tensor in tensors_in(kind.whole) if tensor.requires_grad]
    dot_product(call_encoder(truth[0], kind.whole), truth[1](beside)).backward()
    expected = [_taken_gradient(leaf) for leaf in leaves]
    cache = GradCache(tuple(ours), dot_product, rows=[kind.rows, None], **options)
    cache(kind.inputs, beside)
    assert worst(gradient_errors(ours, truth))[1] < 1e-10
    for leaf, gradient in zip(leaves, expected, strict=True):
        torch.testing.assert_close(_taken_gradient(leaf), gradient, rtol=1e-10, atol=1e-12)


def _taken_gradient(leaf: Tensor) -> Tensor:
    gradient, leaf.grad = leaf.grad, None
    assert gradient is not None
    return gradient.values() if gradient.is_nested else gradient


@pytest.mark.parametrize("name", KINDS)
def test_any_counts_in_any_chunks(name: str):
    build, encoder, fewest = KINDS[name]

    @settings(
        max_examples=25, derandomize=True, database=None, deadline=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(
        counts=st.lists(st.integers(fewest, 3), min_size=1, max_size=9).filter(any),
        chunk_size=st.integers(1, 10),
        order=st.none() | st.randoms(use_true_random=False),
        more=st.sampled_from([{}, {"memory_budget": 2**20}, {"embed_chunk_size": 2}]),
    )
    def check(counts: list[int], chunk_size: int, order: Any, more: dict[str, int]) -> None:
        options = {"chunk_size": chunk_size, **more}
        if "embed_chunk_size" in more:
            options["embed_chunk_size"] = 2 * chunk_size
        if order is not None:
            lengths = order.sample(range(20), len(counts))
            options["sort_by_length"] = [ByLength(length_of=lambda _: lengths), None]
        torch.manual_seed(0)
        assert_exact(build(counts), encoder(), len(counts), **options)

    check()
