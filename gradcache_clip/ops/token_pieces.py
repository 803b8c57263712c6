"""The tokens of one side of late interaction in pieces of one length, and what becomes of them.

S samples, n pieces of L tokens, D feature width; T tokens of a sample or of all; s samples of a run
with at most m pieces each. Maxima are taken over pieces, then over the pieces of a sample: 1/L of
the numbers of a tile.

Padding whole samples would waste more unless they were sorted by length, but their order says who
competes. Kernels that read offsets would need another variant of each.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from gradcache_clip.kernels.pieces import piece_length

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

TokenReduction = Literal["mean", "sum"]


class Pieces(NamedTuple):
    """One side in pieces, none of which mixes samples, or tokens that may be found with others."""

    given: Float[Tensor, "t d"]
    """All tokens."""
    weight: Float[Tensor, "n l"]
    """Of a token in the mean or sum over its sample; 0 for repeats."""
    sample: Int[Tensor, " n"]
    bounds: Int[Tensor, "2 s"]
    """First piece of each sample, and the end of those that may be found."""
    starts: list[int]
    """First piece of each sample, then the number of all pieces."""
    runs: dict[tuple[int, int], Run]
    """Runs that were asked for, by their samples."""
    token: Int[Tensor, "n l"] | None = None
    """Which token each is; repeats of the last one fill a piece, so that maxima need no mask. None
    if all stand in their order."""
    last: Int[Tensor, " n"] | None = None
    """Place of the last token of a piece, before its repeats; None if there are none."""
    empty: Bool[Tensor, " n"] | None = None
    """Pieces without a token that counts, which hold zeros; None if there are none."""

    @staticmethod
    def of(
        tokens: Float[Tensor, "s t d"],
        mask: Bool[Tensor, "s t"] | None,
        spans: Int[Tensor, "3 s"] | None,
        token_reduction: str,
        limits: tuple[int, int],
        dtype: torch.dtype,
    ) -> Pieces:
        """Take padded tokens or, with spans, packed ones, in pieces between the limits."""
        if spans is None:
            pieces = Pieces.padded(tokens, mask, dtype)
        else:
            counts = None if mask is None else mask.flatten()
            pieces = Pieces.packed(tokens.flatten(0, 1), counts, spans, limits, dtype)
        return pieces.averaged() if token_reduction == "mean" else pieces

    @staticmethod
    def padded(
        tokens: Float[Tensor, "s t d"], mask: Bool[Tensor, "s t"] | None, dtype: torch.dtype
    ) -> Pieces:
        """Take samples of one length, each a piece."""
        samples = len(tokens)
        number = torch.arange(samples, device=tokens.device)
        starts, bounds = list(range(samples + 1)), torch.stack((number, number + 1))
        ones = torch.ones(tokens.shape[:2], dtype=dtype, device=tokens.device)
        whole = Pieces(tokens.contiguous().flatten(0, 1), ones, number, bounds, starts, {})
        return whole if mask is None else whole._masked(mask)

    def _masked(self, mask: Bool[Tensor, "s t"]) -> Pieces:
        """Put valid tokens first, then repeats of the last one."""
        place = torch.arange(mask.shape[1], device=mask.device)
        last, order = mask.sum(1, keepdim=True) - 1, (~mask).byte().argsort(dim=1, stable=True)
        index = order.gather(1, place.minimum(last.clamp_min(0)))
        return self._replace(
            weight=(place <= last).to(self.weight.dtype),
            token=index + self.sample[:, None] * mask.shape[1],
            last=last[:, 0].clamp_min(0).int(),
            empty=last[:, 0] < 0,
        )

    @staticmethod
    def packed(
        tokens: Float[Tensor, "t d"],
        counts: Bool[Tensor, " t"] | None,
        spans: Int[Tensor, "3 s"],
        limits: tuple[int, int],
        dtype: torch.dtype,
    ) -> Pieces:
        """Cut two stretches of each sample: tokens that may be found, then the others, if any."""
        start, stop = (each.T.flatten() for each in (spans[:2], spans[1:]))
        lengths = (stop - start).tolist()
        if len(set(lengths[::2])) == 1 and not any(lengths[1::2]) and sum(lengths) == len(tokens):
            whole = Pieces.padded(tokens.unflatten(0, (-1, lengths[0])), None, dtype)
            weight = whole.weight if counts is None else counts.view_as(whole.weight).to(dtype)
            return whole._replace(weight=weight)
        length = piece_length(lengths, *limits)
        count = (stop - start + length - 1) // length
        end = count.cumsum(0)
        first, starts = end - count, [0, *end[1::2].tolist()]
        stretch = torch.repeat_interleave(count, output_size=starts[-1])
        number, place = (torch.arange(n, device=end.device) for n in (starts[-1], length))
        begin = start[stretch] + (number - first[stretch]) * length
        last = (stop[stretch] - begin).clamp_max(length) - 1
        token = begin[:, None] + place.minimum(last[:, None])
        weight = (place <= last[:, None]).to(dtype)
        if counts is not None:
            weight *= counts[token]
        sample, bounds = stretch // 2, first.view(-1, 2).T
        return Pieces(tokens, weight, sample, bounds, starts, {}, token, last.int())

    @property
    def samples(self) -> int:
        return len(self.starts) - 1

    @property
    def most(self) -> int:
        """Return the number of pieces of the longest sample."""
        return _most(self.starts)

    def averaged(self) -> Pieces:
        """Divide the weights by their sum over each sample."""
        total = self._sums(self.weight).clamp_min(1)
        return self._replace(weight=self.weight / total[self.sample, None])

    def guard(self) -> Float[Tensor, " s"]:
        """Return 0 for each sample, NaN where one of its tokens is not finite."""
        return self._sums(self.values(self.all).sum(2, dtype=self.weight.dtype).mul_(0))

    def _sums(self, each: Float[Tensor, "n l"]) -> Float[Tensor, " s"]:
        return each.new_zeros(self.samples).index_add_(0, self.sample, each.sum(1))

    def run(self, samples: slice) -> Run:
        """Return the run of these samples, made once."""
        key = samples.start, samples.stop
        if key not in self.runs:
            self.runs[key] = Run.of(self, samples)
        return self.runs[key]

    def cut(self, samples: slice, pieces: int) -> Iterator[slice]:
        """Cut samples into runs of one, or of at most so many pieces.

        If all were the longest of a run they would be twice as many at most.
        """
        first, longest = samples.start, 0
        for number in range(samples.start, samples.stop):
            own = self.starts[number + 1] - self.starts[number]
            longest = max(longest, own)
            many = self.starts[number + 1] - self.starts[first]
            if number > first and max(2 * many, longest * (number + 1 - first)) > 2 * pieces:
                yield slice(first, number)
                first, longest = number, own
        yield slice(first, samples.stop)

    @property
    def all(self) -> slice:
        return slice(0, len(self.weight))

    def values(self, pieces: slice) -> Float[Tensor, "n l d"]:
        """Return the tokens of these pieces."""
        if self.token is None:
            return self.given.view(*self.weight.shape, -1)[pieces]
        token = self.token[pieces]
        values = self.given.index_select(0, token.flatten()).unflatten(0, token.shape)
        return self._emptied(values, pieces)

    def zeros(self, pieces: slice) -> Float[Tensor, "n l d"]:
        """Return room for the gradients of `values`."""
        return self.weight.new_zeros(*self.weight[pieces].shape, self.given.shape[1])

    def put(self, dvalues: Float[Tensor, "n l d"], pieces: slice, dgiven: Tensor) -> None:
        """Write the gradients of `values`, 0 for repeats, to those of all tokens."""
        if self.token is None:
            dgiven.view(*self.weight.shape, -1)[pieces] = dvalues
            return
        flat = self._emptied(dvalues, pieces).flatten(0, 1).to(dgiven.dtype)
        # Of the numbers that are added up all but one are zeros, so their order does not matter.
        dgiven.index_add_(0, self.token[pieces].flatten(), flat)

    def of_given(self, dvalues: Float[Tensor, "n l d"], dtype: torch.dtype) -> Float[Tensor, "t d"]:
        """Turn the gradients of all `values` into those of the tokens."""
        dgiven = torch.zeros_like(self.given, dtype=dtype)
        self.put(dvalues, self.all, dgiven)
        return dgiven

    def _emptied(self, values: Float[Tensor, "n l d"], pieces: slice) -> Float[Tensor, "n l d"]:
        if self.empty is None:
            return values
        return values.masked_fill_(self.empty[pieces, None, None], 0)

    def at(self, samples: slice) -> slice:
        """Return the pieces of these samples."""
        return slice(self.starts[samples.start], self.starts[samples.stop])


class Run(NamedTuple):
    """Consecutive samples, which are compared in one tile."""

    pieces: slice
    last: Int[Tensor, " n"] | None
    """Place of the last token of each piece, for which its repeats stand."""
    split: Split | None
    """None if every sample is a single piece."""

    @staticmethod
    def of(side: Pieces, samples: slice) -> Run:
        pieces = side.at(samples)
        most = _most(side.starts[samples.start : samples.stop + 1])
        split = Split.of(side, samples, most) if most > 1 else None
        return Run(pieces, None if side.last is None else side.last[pieces], split)

    def best(self, best: Tensor, winner: Tensor | None, dim: int) -> tuple[Tensor, Tensor | None]:
        """Reduce maxima over pieces, and who won them, to samples along `dim`."""
        if winner is not None and self.last is not None:
            winner = winner.minimum(self.last.view(_along(dim, best)))
        return (best, winner) if self.split is None else self.split.best(best, winner, dim)

    def in_run(self, winner: Tensor, dim: int, length: int) -> Tensor:
        """Number the tokens that won for each sample, from the first of the run."""
        return winner if self.split else winner + self._first(winner, dim, length)

    def in_pieces(self, winner: Tensor, dim: int, length: int) -> Tensor:
        """Number the tokens that won for each piece, from its own first."""
        if self.split is None:
            return winner
        return winner.index_select(dim, self.split.sample) - self._first(winner, dim, length)

    def _first(self, winner: Tensor, dim: int, length: int) -> Tensor:
        stop = (self.pieces.stop - self.pieces.start) * length
        first = torch.arange(0, stop, length, dtype=winner.dtype, device=winner.device)
        return first.view(_along(dim, winner))

    def spread(self, scores: Tensor, dim: int) -> Tensor:
        """Repeat what a sample has for each of its pieces."""
        return scores if self.split is None else scores.index_select(dim, self.split.sample)

    def total(self, values: Float[Tensor, "o n"]) -> Float[Tensor, "o s"]:
        """Add up the pieces of each sample, in their order."""
        return values if self.split is None else self.split.total(values)


class Split(NamedTuple):
    """Which pieces the samples of a run are in; numbers count from its first."""

    sample: Int[Tensor, " n"]
    """Sample of each piece."""
    place: Int[Tensor, " n"]
    """Place of each piece in its sample."""
    found: Int[Tensor, "s m"]
    """Pieces of each sample that may be found; the last one again where there are fewer."""

    start: Int[Tensor, " s"]
    """First piece of each sample."""
    length: int
    """Of a piece."""

    @staticmethod
    def of(side: Pieces, samples: slice, most: int) -> Split:
        pieces, device = side.at(samples), side.weight.device
        start, found = side.bounds[:, samples, None] - pieces.start
        sample = side.sample[pieces] - samples.start
        place = torch.arange(len(sample), device=device) - start[sample, 0]
        table = (start + torch.arange(most, device=device)).minimum(found - 1)
        return Split(sample, place, table, start[:, 0], side.weight.shape[1])

    def best(self, best: Tensor, winner: Tensor | None, dim: int) -> tuple[Tensor, Tensor | None]:
        spread = best.index_select(dim, self.found.flatten()).unflatten(dim, self.found.shape)
        if winner is None:
            return spread.amax(dim + 1), None
        value, piece = spread.max(dim + 1)
        piece += self.start.view(_along(dim, piece))
        return value, winner.gather(dim, piece).add_(piece, alpha=self.length)

    def total(self, values: Float[Tensor, "o n"]) -> Float[Tensor, "o s"]:
        spread = values.new_zeros(len(values), self.found.numel())
        spread.index_copy_(1, self.sample * self.found.shape[1] + self.place, values)
        return spread.unflatten(1, self.found.shape).sum(2)


def _along(dim: int, like: Tensor) -> list[int]:
    """Return the shape of a vector along this dimension."""
    return [-1 if place == dim else 1 for place in range(like.ndim)]


def _most(starts: list[int]) -> int:
    return max(stop - start for start, stop in pairwise(starts))
