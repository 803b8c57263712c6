"""Packed tokens cut into pieces, and what is put together from them again."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradcache_clip.ops.token_pieces import Pieces

# Tokens of a sample that may be found, those that only count, and unused ones behind them.
SAMPLE = st.tuples(st.integers(1, 40), st.integers(0, 19), st.integers(0, 3))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(SAMPLE, min_size=1, max_size=6),
    st.sampled_from([(16, 1), (128, 16), (64, 64)]),
    st.integers(1, 12),
)
def test_each_token_is_in_a_piece_of_its_sample(
    samples: list[tuple[int, int, int]], limits: tuple[int, int], most: int
) -> None:
    """Tokens hold their number."""
    sizes = torch.tensor(samples)
    start = sizes.sum(1).cumsum(0) - sizes.sum(1)
    spans = torch.stack((start, start + sizes[:, 0], start + sizes[:, :2].sum(1)))
    tokens = torch.arange(1.0, 1 + int(sizes.sum()))[None, :, None]
    pieces = Pieces.of(tokens, None, spans, "mean", limits, torch.float32)
    place = torch.arange(tokens.numel())
    used = ((place >= spans[0][:, None]) & (place < spans[2][:, None])).any(0)
    values = pieces.values(pieces.all)
    if pieces.last is not None:
        values[torch.arange(values.shape[1]) > pieces.last[:, None]] = 0
    assert torch.equal(pieces.of_given(values, values.dtype), tokens[0] * used[:, None])
    runs = [pieces.run(part) for part in pieces.cut(slice(0, len(samples)), most)]
    for run in runs:
        taken = torch.arange(run.pieces.start, run.pieces.stop)
        values, index = pieces.values(run.pieces)[:, :, 0], pieces.sample[taken, None]
        own = torch.zeros(len(samples), tokens.numel() + 2)
        own.index_put_((index.expand_as(values), values.long()), torch.ones(()))
        # No two samples share a token, and a maximum is over those that may be found.
        assert own.sum(0).max() == 1
        length = values.shape[1]
        best, winner = run.best(values, torch.zeros_like(values, dtype=torch.int32), 0)
        assert winner is not None
        won = run.in_run(winner, 0, length)
        assert torch.equal(values.gather(0, won.long() // length), best)
        assert (run.in_pieces(winner, 0, length) == 0).sum() == best.numel()
        assert len(taken) <= most or len(best) == 1
    found = [run.best(pieces.values(run.pieces)[:, :, 0].amax(1), None, 0)[0] for run in runs]
    assert torch.equal(torch.cat(found), spans[1].float())
    weights = [run.total(pieces.weight[run.pieces].sum(1)[None])[0] for run in runs]
    torch.testing.assert_close(torch.cat(weights), torch.ones(len(samples)))
