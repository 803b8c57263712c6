"""Tokens as a caller passes them, checked, and made one tensor without padding.

b queries on this rank, K hard negatives of each, T tokens of a sample or of all, D width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from gradcache_clip.ops.arguments import check_floating, check_same_device

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

_INTEGERS = torch.int32, torch.int64


class GivenTokens(NamedTuple):
    """Tokens of queries, documents or hard negatives, as they are passed."""

    name: str
    """"query", "document" or "hard_negative"."""
    tokens: Tensor
    """(b, T, D), of hard negatives (b, K, T, D); with lengths (T, D), sample after sample."""
    mask: Tensor | None = None
    """True for tokens that may be found, and count; the shape of the tokens without D."""
    counts: Tensor | None = None
    """True for tokens that count, if these are others than may be found."""
    lengths: Tensor | None = None
    """(b,), of hard negatives (b, K)."""

    @property
    def samples(self) -> tuple[int, ...]:
        """Return (b,), of hard negatives (b, K)."""
        return tuple(self.tokens.shape[:-2] if self.lengths is None else self.lengths.shape)

    def batch(self, *, both_ways: bool) -> TokenBatch:
        """Drop the padding; one way all tokens that count may be found, as nobody looks."""
        counts = self.mask if self.counts is None else self.counts
        found = self.mask if both_ways else counts
        return _packed(self, found, counts)


class TokenBatch(NamedTuple):
    """Samples of any number of tokens, which lie one after the other."""

    values: Float[Tensor, "t d"]
    lengths: Int[Tensor, " s"]
    found: Int[Tensor, " s"]
    """How many of them, the first ones, may be found."""
    counts: Bool[Tensor, " t"] | None
    """Which tokens count; all if None."""

    @property
    def spans(self) -> Int[Tensor, "3 s"]:
        """Return where the tokens of a sample start, where those end that may be found, and all."""
        stop = self.lengths.cumsum(0)
        start = stop - self.lengths
        return torch.stack((start, start + self.found, stop))

    def followed_by(self, others: TokenBatch) -> TokenBatch:
        """Append samples of which nobody asks what they find."""
        counts = self.counts
        if counts is not None:
            counts = torch.cat((counts, counts.new_ones(len(others.values))))
        pairs = zip(self[:3], others[:3], strict=True)
        values, lengths, found = (torch.cat(pair) for pair in pairs)
        return TokenBatch(values, lengths, found, counts)


def _packed(given: GivenTokens, found: Tensor | None, counts: Tensor | None) -> TokenBatch:
    values, lengths = given.tokens.flatten(0, -2), _lengths(given)
    if found is None and counts is None:
        return TokenBatch(values, lengths, lengths, None)
    everything = torch.ones(len(values), dtype=torch.bool, device=values.device)
    may_be_found, may_count = (everything if x is None else x.flatten() for x in (found, counts))
    number = torch.arange(len(lengths), device=values.device)
    sample = number.repeat_interleave(lengths, output_size=len(values))
    index = (may_be_found | may_count).nonzero()[:, 0]
    # Those that may be found come first in their sample.
    index = index[(2 * sample + ~may_be_found)[index].argsort(stable=True)]
    kept, first = (
        torch.zeros_like(lengths).index_add_(0, sample, each.long())
        for each in (may_be_found | may_count, may_be_found)
    )
    _check_some(given, first, found)
    result = TokenBatch(values.index_select(0, index), kept, first, None)
    if found is counts:
        return result
    counting = torch.zeros_like(lengths).index_add_(0, sample, may_count.long())
    _check_some(given, counting, counts)
    return result._replace(counts=may_count[index])


def _lengths(given: GivenTokens) -> Tensor:
    if given.lengths is not None:
        return given.lengths.flatten().long()
    samples = given.tokens.shape[:-2].numel()
    return torch.full((samples,), given.tokens.shape[-2], device=given.tokens.device)


def _check_some(given: GivenTokens, numbers: Tensor, mask: Tensor | None) -> None:
    """Raise unless each sample has a token."""
    if int(numbers.min()) == 0:
        sample = int((numbers == 0).nonzero()[0])
        word = "mask" if mask is given.mask else "counts"
        raise ValueError(
            f"{given.name}_{word}: expected a token that counts in each sample, got none in "
            f"sample {sample}; drop the pair, or let one token count"
        )


def check_token_inputs(
    queries: GivenTokens, documents: GivenTokens, negatives: GivenTokens | None
) -> None:
    """Raise unless all of it fits together."""
    for given in (queries, documents):
        _check_given(given, 1)
    _check_same_samples(queries, documents, queries.samples)
    if negatives is not None:
        _check_given(negatives, 2)
        _check_same_samples(queries, negatives, (*queries.samples, negatives.samples[1]))


def _check_same_samples(queries: GivenTokens, given: GivenTokens, samples: tuple[int, ...]) -> None:
    D = queries.tokens.shape[-1]
    if given.samples != samples or given.tokens.shape[-1] != D:
        raise ValueError(
            f"{_argument(given)}: expected {samples} samples of width {D} to go with query_tokens, "
            f"got {given.samples} of width {given.tokens.shape[-1]}; pass one document, and as "
            "many hard negatives, for each query"
        )
    check_same_device((_argument(queries), _argument(given)), queries.tokens, given.tokens)


def _check_given(given: GivenTokens, dims: int) -> None:
    name, shape = _argument(given), tuple(given.tokens.shape)
    check_floating(name, given.tokens)
    expected = "(b, T, D)" if dims == 1 else "(b, K, T, D)"
    if len(shape) != (dims + 2 if given.lengths is None else 2) or given.tokens.numel() == 0:
        raise ValueError(
            f"{name}: expected non-empty {expected}, or (T, D) with {given.name}_lengths, got "
            f"shape {shape} with{'out' if given.lengths is None else ''} lengths"
        )
    if given.lengths is not None:
        _check_lengths(given, given.lengths, dims)
    for word, mask in (("mask", given.mask), ("counts", given.counts)):
        if mask is not None:
            _check_mask(f"{given.name}_{word}", mask, given.tokens)


def _check_lengths(given: GivenTokens, lengths: Tensor, dims: int) -> None:
    name = f"{given.name}_lengths"
    if not isinstance(lengths, Tensor) or lengths.dtype not in _INTEGERS:
        got = lengths.dtype if isinstance(lengths, Tensor) else type(lengths).__name__
        raise TypeError(f"{name}: expected a tensor of integers, got {got}; convert with .long()")
    check_same_device((_argument(given), name), given.tokens, lengths)
    total = int(lengths.sum())
    if lengths.ndim != dims or total != len(given.tokens) or int(lengths.min()) < 1:
        expected = "(b,)" if dims == 1 else "(b, K)"
        raise ValueError(
            f"{name}: expected {expected} numbers of 1 or more that add up to the "
            f"{len(given.tokens)} tokens, got shape {tuple(lengths.shape)} and sum {total}; from "
            "offsets, pass offsets.diff()"
        )


def _check_mask(name: str, mask: Tensor, tokens: Tensor) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(
            f"{name}: expected a bool tensor, True for tokens that count, got {got}; "
            "convert with .bool()"
        )
    if mask.shape != tokens.shape[:-1]:
        raise ValueError(
            f"{name}: expected shape {tuple(tokens.shape[:-1])}, got {tuple(mask.shape)}; "
            "one entry for each token"
        )
    check_same_device(("tokens", name), tokens, mask)


def _argument(given: GivenTokens) -> str:
    return "hard_negatives" if given.name == "hard_negative" else f"{given.name}_tokens"
