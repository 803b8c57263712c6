"""The tokens of one side of late interaction, prepared for tiles: padded or packed.

S samples, T tokens of a sample or of all, D feature width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

TokenReduction = Literal["mean", "sum"]


class Tokens(NamedTuple):
    """One side, prepared so that maxima need no mask."""

    values: Float[Tensor, "b t d"]
    """Invalid tokens hold a copy of the first valid one of their sample, or 0 if it has none."""
    weight: Float[Tensor, "b t"]
    """Of a token in the mean or sum over its sample; 0 for invalid ones."""
    mask: Bool[Tensor, "b t"] | None

    @property
    def samples(self) -> int:
        return len(self.values)

    def at(self, samples: slice) -> slice:
        """Return which of the values are theirs."""
        return samples

    def of_tokens(self, dvalues: Tensor) -> Tensor:
        """Turn the gradient of the values into that of all tokens."""
        return dvalues


def masked_tokens(
    tokens: Tensor, mask: Tensor | None, token_reduction: str, dtype: torch.dtype
) -> Tokens:
    """Prepare one side for tiles; copy it only where there is a mask."""
    weight = torch.ones(tokens.shape[:2], dtype=dtype, device=tokens.device)
    if mask is not None:
        # A kernel reads it row by row, however the mask lies in memory.
        weight = mask.to(dtype).contiguous()
        index = _first(mask)[:, None, None].expand(-1, 1, tokens.shape[2])
        first = tokens.gather(1, index).masked_fill_(~mask.any(1)[:, None, None], 0)
        tokens = tokens.where(mask[:, :, None], first)
    if token_reduction == "mean":
        weight = weight / weight.sum(1, keepdim=True).clamp_min(1)
    return Tokens(tokens.contiguous(), weight, mask)


def _first(mask: Tensor) -> Tensor:
    return mask.to(torch.uint8).argmax(1)


def unmasked(dtokens: Tensor, mask: Tensor | None) -> Tensor:
    """Turn the gradient of `Tokens.values` into that of the tokens, in place."""
    if mask is None:
        return dtokens
    # Invalid tokens are copies of the first valid one, which gets their gradients.
    copies = (~mask & mask.any(1, keepdim=True)).to(dtokens.dtype)
    sample, first = torch.arange(len(mask), device=mask.device), _first(mask)
    padded = dtokens.view(*mask.shape, -1)
    given = torch.bmm(copies[:, None], padded)[:, 0]
    padded.masked_fill_(~mask[:, :, None], 0)
    padded[sample, first] = padded[sample, first] + given
    return dtokens


class Span(NamedTuple):
    """Where the tokens of a sample are."""

    start: int
    found: int
    """End of those that may be found; all may count."""
    stop: int


class PackedSide(NamedTuple):
    """One side, prepared for tiles."""

    values: Float[Tensor, "t d"]
    weight: Float[Tensor, " t"]
    sample: Int[Tensor, " t"]
    spans: list[Span]
    bounds: Int[Tensor, "3 s"]
    """The spans on the device."""
    length: int
    """Of every sample; 0 if they differ."""
    mask: Bool[Tensor, "s p"] | None

    @staticmethod
    def padded(tokens: Tokens) -> PackedSide:
        """Take samples of one length."""
        (samples, length), device = tokens.weight.shape, tokens.weight.device
        number = torch.arange(samples, device=device).repeat_interleave(length)
        spans = [Span(i * length, (i + 1) * length, (i + 1) * length) for i in range(samples)]
        start = torch.arange(samples, device=device) * length
        bounds = torch.stack((start, start + length, start + length))
        flat = tokens.values.flatten(0, 1), tokens.weight.flatten()
        return PackedSide(*flat, number, spans, bounds, length, tokens.mask)

    @staticmethod
    def spanned(
        tokens: Float[Tensor, "s l d"],
        counts: Bool[Tensor, "s l"] | None,
        spans: Int[Tensor, "3 s"],
        token_reduction: str,
        dtype: torch.dtype,
    ) -> PackedSide:
        """Take samples of any length; all their tokens count without `counts`."""
        values, found = tokens.flatten(0, 1), list(map(Span, *spans.tolist()))
        number = torch.arange(len(values), device=values.device)
        sample = torch.searchsorted(spans[0].contiguous(), number, right=True) - 1
        weight = (number < spans[2][sample]).to(dtype)
        if counts is not None:
            weight = weight * counts.flatten()
        if token_reduction == "mean":
            total = weight.new_zeros(len(found)).index_add(0, sample, weight)
            weight = weight / total.clamp_min(1)[sample]
        length = found[0].stop
        same = all(each == (i * length, *[(i + 1) * length] * 2) for i, each in enumerate(found))
        return PackedSide(values, weight, sample, found, spans, length if same else 0, None)

    @property
    def samples(self) -> int:
        return len(self.spans)

    def at(self, samples: slice) -> slice:
        """Return which of the values are theirs."""
        return slice(self.spans[samples.start].start, self.spans[samples.stop - 1].stop)

    def of_tokens(self, dvalues: Tensor) -> Tensor:
        """Turn the gradient of the values into that of all tokens."""
        return dvalues

    def rows(self, samples: slice) -> Tensor:
        """Return their tokens in the dtype of the similarities."""
        return self.values[self.at(samples)].to(self.weight.dtype)

    def cut(self, samples: slice, tokens: int) -> Iterator[slice]:
        """Cut samples into runs of at most so many tokens, or of one sample."""
        first = samples.start
        for number in range(first + 1, samples.stop):
            span, start = self.spans[number], self.spans[first].start
            # Between the samples of two ranks there may be a gap.
            if span.stop - start > tokens or span.start > self.spans[number - 1].stop:
                yield slice(first, number)
                first = number
        yield slice(first, samples.stop)

    def blocks(self, samples: slice) -> Iterator[tuple[slice, slice]]:
        """Yield samples of one length, and their rows, counted from the first of all."""
        first, many = self.spans[samples.start].start, samples.stop - samples.start
        if self.length:
            yield slice(0, many), slice(0, many * self.length)
            return
        for number, span in enumerate(self.spans[samples]):
            yield slice(number, number + 1), slice(span.start - first, span.found - first)

    def total(self, best: Float[Tensor, "o t"], samples: slice) -> Float[Tensor, "o s"]:
        """Return the weighted sum, or mean, over the tokens of each sample."""
        tokens = self.at(samples)
        weighted = best * self.weight[tokens]
        if self.length:
            return weighted.unflatten(1, (-1, self.length)).sum(2)
        number = torch.arange(samples.start, samples.stop, device=best.device)
        return weighted @ (self.sample[tokens, None] == number).to(best.dtype)

    def spread(self, dscores: Float[Tensor, "o s"], samples: slice) -> Float[Tensor, "o t"]:
        """Return the gradient of what `total` adds up."""
        tokens = self.at(samples)
        if self.length:
            weight = self.weight[tokens].unflatten(0, (-1, self.length))
            return (dscores[:, :, None] * weight).flatten(1)
        return dscores[:, self.sample[tokens] - samples.start] * self.weight[tokens]
