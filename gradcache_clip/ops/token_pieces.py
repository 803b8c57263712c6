"""Packed tokens cut into pieces of one length, which are samples to the kernels.

S samples, n pieces of L tokens, D feature width; s samples of a run with at most m pieces each.
Maxima over pieces are reduced to maxima over samples here: 1/L of the numbers of a tile.

Padding whole samples would waste more unless they were sorted by length, but their order says who
competes. Kernels that read offsets would need another variant of each.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from gradcache_clip.ops.token_sides import PackedSide

if TYPE_CHECKING:
    from jaxtyping import Float, Int


class Pieces(NamedTuple):
    """One side in pieces, none of which mixes samples, or tokens that may be found with others."""

    values: Float[Tensor, "n l d"]
    """Repeats of the last token fill a piece."""
    weight: Float[Tensor, "n l"]
    """Weight of a token in the mean or sum over its sample; 0 for repeats."""
    token: Int[Tensor, "n l"]
    """Number of a token on its side; that of all tokens for repeats."""
    last: Int[Tensor, " n"]
    """Place of the last token of a piece, before its repeats."""
    tokens: int
    """Number of all tokens."""
    starts: list[int]
    """First piece of each sample, then the number of all pieces."""
    bounds: Int[Tensor, "2 s"]
    """First piece of each sample, and the end of those that may be found."""
    runs: dict[tuple[int, int], Run]
    """Runs that were asked for, by their samples."""
    mask: None = None

    @staticmethod
    def of(side: PackedSide, length: int) -> Pieces:
        """Cut two stretches of each sample: tokens that may be found, then the others, if any."""
        start, stop = (each.T.flatten() for each in (side.bounds[:2], side.bounds[1:]))
        count = (stop - start + length - 1) // length
        end = count.cumsum(0)
        first, starts = end - count, [0, *end[1::2].tolist()]
        stretch = torch.repeat_interleave(count, output_size=starts[-1])
        number, place = (torch.arange(n, device=end.device) for n in (starts[-1], length))
        begin = start[stretch] + (number - first[stretch]) * length
        last = (stop[stretch] - begin).clamp_max(length) - 1
        token = begin[:, None] + place.minimum(last[:, None])
        values, weight, repeated = side.values[token], side.weight[token], place > last[:, None]
        weight.masked_fill_(repeated, 0)
        token.masked_fill_(repeated, tokens := len(side.values))
        bounds = first.view(-1, 2).T
        return Pieces(values, weight, token, last.int(), tokens, starts, bounds, {})

    @property
    def samples(self) -> int:
        return len(self.starts) - 1

    @property
    def most(self) -> int:
        """Return the number of pieces of the longest sample."""
        return _most(self.starts)

    def at(self, samples: slice) -> slice:
        """Return the pieces of these samples."""
        return slice(self.starts[samples.start], self.starts[samples.stop])

    def run(self, samples: slice) -> Run:
        """Return the run of these samples, made once."""
        key = samples.start, samples.stop
        if key not in self.runs:
            self.runs[key] = Run.of(self, samples)
        return self.runs[key]

    def cut(self, samples: slice, pieces: int) -> Iterator[slice]:
        """Cut samples into runs of one, or of at most so many pieces if all were the longest."""
        first, longest = samples.start, 0
        for number in range(samples.start, samples.stop):
            own = self.starts[number + 1] - self.starts[number]
            longest = max(longest, own)
            if number > first and longest * (number + 1 - first) > pieces:
                yield slice(first, number)
                first, longest = number, own
        yield slice(first, samples.stop)

    def of_tokens(self, dvalues: Float[Tensor, "n l d"]) -> Float[Tensor, "t d"]:
        """Turn the gradient of the pieces into that of all tokens."""
        out = dvalues.new_zeros(self.tokens + 1, dvalues.shape[2])
        return out.index_copy_(0, self.token.flatten(), dvalues.flatten(0, 1))[:-1]


class Run(NamedTuple):
    """Consecutive samples, which are compared in one launch; numbers count from its first piece."""

    pieces: slice
    sample: Int[Tensor, " n"]
    """Sample of each piece."""
    place: Int[Tensor, " n"]
    """Place of each piece in its sample."""
    last: Int[Tensor, " n"]
    """Place of the last token of each piece, for which its repeats stand."""
    found: Int[Tensor, "s m"]
    """Pieces of each sample that may be found; the last one again where there are fewer."""

    @staticmethod
    def of(side: Pieces, samples: slice) -> Run:
        pieces, device = side.at(samples), side.values.device
        start, found = side.bounds[:, samples] - pieces.start
        number = torch.arange(pieces.stop - pieces.start, device=device)
        sample = torch.searchsorted(start.contiguous(), number, right=True) - 1
        most = _most(side.starts[samples.start : samples.stop + 1])
        table = start[:, None] + torch.arange(most, device=device)
        table = table.minimum(found[:, None] - 1)
        return Run(pieces, sample, number - start[sample], side.last[pieces], table)

    @property
    def whole(self) -> bool:
        """Say whether every sample is a single piece."""
        return self.found.shape[1] == 1

    def best(self, best: Tensor, winner: Tensor | None, dim: int) -> tuple[Tensor, Tensor | None]:
        """Reduce maxima over pieces to samples along `dim`; the winner of a losing piece is -1."""
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
        """Add up the pieces of each sample, in their order."""
        if self.whole:
            return values
        spread = values.new_zeros(len(values), self.found.numel())
        spread.index_copy_(1, self.sample * self.found.shape[1] + self.place, values)
        return spread.unflatten(1, self.found.shape).sum(2)


def _most(starts: list[int]) -> int:
    return max(stop - start for start, stop in pairwise(starts))
