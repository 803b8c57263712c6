"""Packed tokens in pieces of one length, which the kernels take for samples.

S samples, n pieces of L tokens each, D feature width; s samples of a run, and m pieces of a sample.
Maxima over pieces are reduced to those over samples here: 1/L of the numbers of a tile.

Padding whole samples would waste more, unless they were sorted by length, and who competes follows
their order. Offsets that the kernels read would make further variants of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from gradcache_clip.ops.token_sides import PackedSide, Span

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


class Pieces(NamedTuple):
    """One side in pieces, none of which lies in two samples."""

    values: Float[Tensor, "n l d"]
    """Repeats of its last token fill a piece."""
    weight: Float[Tensor, "n l"]
    """Of a token in the mean or sum over its sample; 0 for repeats."""
    token: Int[Tensor, "n l"]
    """Where it was among all tokens; beyond the last for repeats."""
    tokens: int
    """How many there are."""
    spans: list[Span]
    """Pieces of each sample. Tokens that may not be found have pieces of their own."""
    bounds: Int[Tensor, "3 s"]
    """The same on the device, for which nothing then waits."""
    runs: dict[tuple[int, int], Run]
    """Those that were asked for, by their samples."""
    mask: None = None

    @staticmethod
    def of(side: PackedSide, length: int) -> Pieces:
        spans, device = _in_pieces(side.spans, length), side.values.device
        tokens, pieces = (torch.tensor(each, device=device).T for each in (side.spans, spans))
        # Each sample is two stretches of tokens, of which the second may be empty.
        start, stop, first = (x.T.flatten() for x in (tokens[:2], tokens[1:], pieces[:2]))
        number = torch.arange(spans[-1].stop, device=device)
        stretch = torch.searchsorted(first, number, right=True) - 1
        begin = start[stretch] + (number - first[stretch]) * length
        token = begin[:, None] + torch.arange(length, device=device)
        last = stop[stretch, None] - 1
        index, repeated = token.minimum(last), token > last
        weight = side.weight[index].masked_fill_(repeated, 0)
        token = token.masked_fill_(repeated, len(side.values))
        return Pieces(side.values[index], weight, token, len(side.values), spans, pieces, {})

    @property
    def samples(self) -> int:
        return len(self.spans)

    @property
    def most(self) -> int:
        """Return the pieces of the longest sample."""
        return max(span.stop - span.start for span in self.spans)

    def at(self, samples: slice) -> slice:
        """Return which of the pieces are theirs."""
        return slice(self.spans[samples.start].start, self.spans[samples.stop - 1].stop)

    def run(self, samples: slice) -> Run:
        """Return what reduces maxima over their pieces."""
        key = samples.start, samples.stop
        if key not in self.runs:
            self.runs[key] = Run.of(self, samples)
        return self.runs[key]

    def cut(self, samples: slice, pieces: int) -> Iterator[slice]:
        """Cut samples into runs of at most so many pieces, were all as long as the longest."""
        first, most = samples.start, 0
        for number in range(samples.start, samples.stop):
            span = self.spans[number]
            longest = max(most, span.stop - span.start)
            if number > first and longest * (number + 1 - first) > pieces:
                yield slice(first, number)
                first, longest = number, span.stop - span.start
            most = longest
        yield slice(first, samples.stop)

    def of_tokens(self, dvalues: Float[Tensor, "n l d"]) -> Float[Tensor, "t d"]:
        """Turn the gradient of the pieces into that of all tokens."""
        out = dvalues.new_zeros(self.tokens + 1, dvalues.shape[2])
        return out.index_copy_(0, self.token.flatten(), dvalues.flatten(0, 1))[:-1]


class Run(NamedTuple):
    """Consecutive samples, whose pieces are numbered from the first of all."""

    pieces: slice
    sample: Int[Tensor, " n"]
    """Of each piece."""
    place: Int[Tensor, " n"]
    """Of each piece in its sample."""
    last: Int[Tensor, " n"]
    """Token of each piece, which its repeats stand for."""
    found: Int[Tensor, "s m"]
    """Pieces of each sample that may be found; the last one again where there are fewer."""
    every: Int[Tensor, "s m"]
    """All its pieces, in the same way."""
    exists: Bool[Tensor, "s m"]
    """False for repeats among these."""

    @staticmethod
    def of(side: Pieces, samples: slice) -> Run:
        pieces, device = side.at(samples), side.values.device
        start, found, stop = (side.bounds[:, samples] - pieces.start)[..., None]
        most = max(span.stop - span.start for span in side.spans[samples])
        number = torch.arange(pieces.stop - pieces.start, device=device)
        sample = torch.searchsorted(start[:, 0].contiguous(), number, right=True) - 1
        last = (side.token[pieces] < side.tokens).sum(1, dtype=torch.int32) - 1
        place = start + torch.arange(most, device=device)
        tables = place.minimum(found - 1), place.minimum(stop - 1), place < stop
        return Run(pieces, sample, number - start[sample, 0], last, *tables)

    @property
    def whole(self) -> bool:
        """Say whether every sample is a single piece."""
        return self.found.shape[1] == 1

    def best(self, best: Tensor, winner: Tensor | None, dim: int) -> tuple[Tensor, Tensor | None]:
        """Take maxima over samples along `dim`; the winner is -1 in pieces that have lost."""
        ones = [1] * (best.ndim - 1 - dim)
        if winner is not None:
            winner = winner.minimum(self.last.view(-1, *ones))
        if self.whole:
            return best, winner
        spread = best.index_select(dim, self.found.flatten()).unflatten(dim, self.found.shape)
        if winner is None:
            return spread.amax(dim + 1), None
        value, place = spread.max(dim + 1)
        lost = place.index_select(dim, self.sample) != self.place.view(-1, *ones)
        return value, winner.masked_fill_(lost, -1)

    def total(self, values: Float[Tensor, "o n"]) -> Float[Tensor, "o s"]:
        """Add up over samples, in the order of their pieces."""
        if self.whole:
            return values
        spread = values.index_select(1, self.every.flatten()).unflatten(1, self.every.shape)
        return (spread * self.exists).sum(2)


def _in_pieces(spans: list[Span], length: int) -> list[Span]:
    pieces, stop = [], 0
    for span in spans:
        start, found = stop, stop - (span.start - span.found) // length
        stop = found - (span.found - span.stop) // length
        pieces.append(Span(start, found, stop))
    return pieces
