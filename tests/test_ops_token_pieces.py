"""Packed tokens cut into pieces, and what is put together from them again."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradcache_clip.ops.token_pieces import Pieces
from gradcache_clip.ops.token_sides import PackedSide

# Tokens of a sample that may be found, those that only count, and unused ones behind them.
SAMPLE = st.tuples(st.integers(1, 20), st.integers(0, 9), st.integers(0, 3))


def cut(samples: list[tuple[int, int, int]], length: int) -> tuple[PackedSide, Pieces]:
    """Tokens hold their number."""
    sizes = torch.tensor(samples)
    start = sizes.sum(1).cumsum(0) - sizes.sum(1)
    spans = torch.stack((start, start + sizes[:, 0], start + sizes[:, :2].sum(1)))
    tokens = torch.arange(1.0, 1 + int(sizes.sum()))[None, :, None]
    side = PackedSide.spanned(tokens, None, spans, "mean", torch.float32)
    return side, Pieces.of(side, length)


@settings(max_examples=40, deadline=None)
@given(st.lists(SAMPLE, min_size=1, max_size=6), st.integers(1, 8), st.integers(1, 12))
def test_each_token_is_in_a_piece_of_its_sample(
    samples: list[tuple[int, int, int]], length: int, most: int
) -> None:
    side, pieces = cut(samples, length)
    used = torch.cat([torch.arange(span.start, span.stop) for span in side.spans])
    expected = torch.zeros_like(side.values).index_copy(0, used, side.values[used])
    assert torch.equal(pieces.of_tokens(pieces.values), expected)
    runs = [pieces.run(part) for part in pieces.cut(slice(0, len(samples)), most)]
    assert sum(len(run.found) for run in runs) == len(samples)
    for run in runs:
        assert run.found.numel() <= most or len(run.found) == 1
        values, index = pieces.values[run.pieces, :, 0], run.sample[:, None]
        own = torch.zeros(len(run.found), len(side.values) + 2)
        own.index_put_((index.expand_as(values), values.long()), torch.ones(()))
        # No two samples share a token, and a maximum is over those that may be found.
        assert own.sum(0).max() == 1
        best, winner = run.best(values, torch.zeros_like(values, dtype=torch.int32), 0)
        assert winner is not None and (winner == 0).sum() == best.numel()
    found = [run.best(pieces.values[run.pieces, :, 0].amax(1), None, 0)[0] for run in runs]
    assert torch.equal(torch.cat(found), torch.tensor([float(s.found) for s in side.spans]))
    weights = [run.total(pieces.weight[run.pieces].sum(1)[None])[0] for run in runs]
    torch.testing.assert_close(torch.cat(weights), torch.ones(len(samples)))
