"""Rows of unequal length: sorted, cut into chunks, and each chunk trimmed to its longest row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from gradcache_clip.cache.chunks import Chunk
from gradcache_clip.cache.nested import count_rows


@dataclass(frozen=True)
class ByLength:
    """Chunks of rows of similar length, the longest first; features return in the caller's order.

    Of inputs with one `attention_mask` (B, L), padded on the right, every tensor of L columns is
    trimmed to the longest row of its chunk. That is exact for encoders that follow their mask, and
    for causal ones; one that averages over its padding gives other features than without sorting.
    Strings are sorted by characters; whatever tokenizes them pads each chunk by itself.
    """

    max_tokens: int | None = None
    """Rows of a chunk times its longest row, at most; takes the place of `chunk_size`."""
    length_of: Callable[[Any], Sequence[int] | Tensor] | None = None
    """Lengths of the rows of an input, where neither a mask nor lists tell them."""

    def __post_init__(self) -> None:
        count = self.max_tokens
        whole = isinstance(count, Integral) and not isinstance(count, bool)
        if count is not None and not (whole and int(count) > 0):
            raise ValueError(
                f"max_tokens: expected a positive integer or None, got {self.max_tokens!r}; "
                "such as max_tokens=16384"
            )

    def halved(self) -> ByLength:
        """Half of the tokens a chunk."""
        most = self.max_tokens
        return self if most is None else replace(self, max_tokens=max(1, most // 2))

    def chunks(self, inputs: Any, chunk_size: int, at_least: int, name: str) -> list[Chunk]:
        """Cut the rows of `inputs`, by tokens or by rows."""
        mask = _mask_of(inputs)
        ends = None if mask is None else _lengths_of_mask(mask, name)
        lengths, order = self._lengths(inputs, ends, name).sort(descending=True, stable=True)
        chunks, start = [], 0
        most = max(1, -(-len(lengths) // at_least))
        while start < len(lengths):
            longest = max(1, int(lengths[start]))
            rows = chunk_size if self.max_tokens is None else self.max_tokens // longest
            stop = min(start + max(1, min(rows, most)), len(lengths))
            taken, trim = order[start:stop], None
            if mask is not None and ends is not None:
                trim = mask.shape[1], max(1, int(ends[taken].max()))
            chunks.append(Chunk(taken, trim))
            start = stop
        return chunks

    def _lengths(self, inputs: Any, ends: Tensor | None, name: str) -> Tensor:
        if self.length_of is not None:
            lengths = torch.as_tensor(self.length_of(inputs)).cpu().long()
            rows = count_rows(inputs, name)
            if lengths.shape != (rows,):
                raise ValueError(
                    f"{name}: expected length_of to return the lengths of all {rows} rows, got "
                    f"shape {tuple(lengths.shape)}; return one number a row"
                )
            return lengths
        if isinstance(inputs, list) and all(hasattr(row, "__len__") for row in inputs):
            return torch.tensor([len(row) for row in inputs])
        if ends is not None:
            return ends
        raise ValueError(
            f"{name}: expected rows whose length is known, a mapping with attention_mask or a list "
            f"of strings, got {type(inputs).__name__}; pass ByLength(length_of=...)"
        )


def _lengths_of_mask(mask: Tensor, name: str) -> Tensor:
    # One wait for the device, at most: the host has to know the shapes of the chunks.
    mask = mask.cpu() != 0
    if mask.ndim != 2 or bool((mask[:, 1:] & ~mask[:, :-1]).any()):
        raise ValueError(
            f"{name}: expected an attention_mask (B, L) of rows padded on the right, got "
            f"{'gaps or padding on the left' if mask.ndim == 2 else f'shape {tuple(mask.shape)}'}; "
            'use padding_side="right", or leave sort_by_length out'
        )
    return mask.sum(1)


def _mask_of(inputs: Any) -> Tensor | None:
    """The one attention_mask in a nest of mappings and tuples."""
    masks = list(_masks_in(inputs))
    return masks[0] if len(masks) == 1 else None


def _masks_in(inputs: Any) -> Iterator[Tensor]:
    parts: Iterable[tuple[Any, Any]] = ()
    if isinstance(inputs, (Mapping, tuple)):
        parts = inputs.items() if isinstance(inputs, Mapping) else enumerate(inputs)
    for name, part in parts:
        if name == "attention_mask" and isinstance(part, Tensor):
            yield part
        else:
            yield from _masks_in(part)
