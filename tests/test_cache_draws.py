"""Single chunks that draw, or that change, among many that do not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gradcache_clip import ByLength, GradCache, ReplayMismatchError

ROWS, CHUNKS = 2, 40


class Drops(nn.Module):
    """Drops features of chunks whose first entry is positive."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.dropout(x, 0.5, True) if x[0, 0] > 0 else x)


class Drifts(nn.Module):
    """Computes something else for one chunk the second time that it comes."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.linear, self.index, self.seen = nn.Linear(6, 4), index, False

    def forward(self, x: Tensor) -> Tensor:
        drifts = bool((x[:, 0] == 2 * self.index).any())
        features = self.linear(x)
        if drifts and self.seen:
            features = features * 1.01
        self.seen |= drifts
        return features


def loss(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T).logsumexp(1).mean()


@pytest.mark.parametrize("drawing", [(0,), (15,), (16,), (37,), (3, 15, 16, 31)])
def test_a_replay_draws_what_its_embed_drew_whichever_chunks_draw(drawing: tuple[int, ...]):
    encoder, rows = Drops(), -torch.rand(ROWS * CHUNKS, 6, dtype=torch.float64)
    for index in drawing:
        rows[ROWS * index] *= -1
    torch.manual_seed(0)
    loss(*(torch.cat(list(map(encoder, rows.split(ROWS)))) for _ in range(2))).backward()
    expected = encoder.linear.weight.grad.clone()
    encoder.zero_grad()
    torch.manual_seed(0)
    # The first row of a chunk decides for the others.
    options = {"chunk_size": ROWS, "check_rows": "off"}
    GradCache((encoder, encoder), loss, **options)(rows, rows)
    torch.testing.assert_close(encoder.linear.weight.grad, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("sorting", [None, ByLength(length_of=lambda x: torch.arange(len(x)))])
@pytest.mark.parametrize("index", [0, 7, 16, 38])
def test_the_one_chunk_that_changes_is_named(index: int, sorting: ByLength | None):
    rows = torch.rand(ROWS * CHUNKS, 6)
    rows[:, 0] = torch.arange(ROWS * CHUNKS)
    encoders = Drifts(index), nn.Linear(6, 4)
    options = {"sort_by_length": sorting, "check_rows": "off"}
    cache = GradCache(encoders, loss, chunk_size=ROWS, **options)
    place = index if sorting is None else CHUNKS - 1 - index
    with pytest.raises(ReplayMismatchError, match=f"chunk {place} of {CHUNKS}: .*1 chunks in all"):
        cache(rows, rows)
