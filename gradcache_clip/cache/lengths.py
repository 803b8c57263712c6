"""Rows of unequal length: sorted, cut into chunks, and each chunk trimmed to its longest row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradcache_clip.cache.chunks import Chunk


@dataclass(frozen=True)
class ByLength:
    """Chunks of rows of similar length, the longest first; features return in the caller's order.

    Of inputs with an `attention_mask` (B, L), padded on the right, every tensor of L columns is
    trimmed to the longest row of its chunk. That is exact for encoders that follow their mask, and
    for causal ones; one that averages over its padding gives other features than without sorting.
    Strings are sorted by characters; whatever tokenizes them pads each chunk by itself.
    """

    max_tokens: int | None = None
    """Rows of a chunk times its longest row, at most; takes the place of `chunk_size`."""
    length_of: Callable[[Any], Sequence[int] | Tensor] | None = None
    """Lengths of the rows of an input, where neither a mask nor lists tell them."""

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(
                f"max_tokens: expected a positive integer or None, got {self.max_tokens}"
            )

    def chunks(self, inputs: Any, chunk_size: int, at_least: int, name: str) -> list[Chunk]:
        """Cut the rows of `inputs`, by tokens or by rows."""
        lengths = self._lengths(inputs, name)
        lengths, order = lengths.sort(descending=True, stable=True)
        full = _padded_length(inputs)
        chunks, start = [], 0
        most = max(1, -(-len(lengths) // at_least))
        while start < len(lengths):
            longest = max(1, int(lengths[start]))
            rows = chunk_size if self.max_tokens is None else self.max_tokens // longest
            stop = min(start + max(1, min(rows, most)), len(lengths))
            trim = None if full is None else (full, longest)
            chunks.append(Chunk(order[start:stop], trim))
            start = stop
        return chunks

    def _lengths(self, inputs: Any, name: str) -> Tensor:
        if self.length_of is not None:
            return torch.as_tensor(self.length_of(inputs)).cpu().long()
        if isinstance(inputs, list) and all(hasattr(row, "__len__") for row in inputs):
            return torch.tensor([len(row) for row in inputs])
        if isinstance(inputs, Mapping) and isinstance(inputs.get("attention_mask"), Tensor):
            return _lengths_of_mask(inputs["attention_mask"], name)
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


def _padded_length(inputs: Any) -> int | None:
    if isinstance(inputs, Mapping) and isinstance(inputs.get("attention_mask"), Tensor):
        return int(inputs["attention_mask"].shape[1])
    return None
