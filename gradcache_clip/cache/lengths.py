"""Sort rows of unequal length, cut them into chunks, and trim each to its longest row."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from gradcache_clip.cache.batch_tree import (
    Part,
    count_rows,
    is_tensor_collection,
    parts_with_rows,
)
from gradcache_clip.cache.chunks import Chunk

# By their names in transformers: whoever follows the mask has no use for what lies beyond it.
_TOKENS = ("attention_mask", "input_ids", "inputs_embeds", "position_ids", "token_type_ids")


@dataclass(frozen=True)
class ByLength:
    """Chunks of rows of similar length, the longest first; features return in the caller's order.

    With one `attention_mask` (B, L) among the inputs, padded on the right, token columns are
    trimmed to the longest row of each chunk. These are `input_ids`, `token_type_ids`,
    `position_ids`, `inputs_embeds`, and tensors (B, L, ...) that hold one value wherever the mask
    is zero. Any other tensor of L columns is refused until `columns` says which ones hold tokens.
    Trimming is exact for encoders that follow their mask, and for causal ones; one that averages
    over its padding gives other features than without sorting. Strings are sorted by characters;
    whatever tokenizes them pads each chunk by itself.
    """

    max_tokens: int | None = None
    """Rows of a chunk times its longest row, at most; takes the place of `chunk_size`."""
    length_of: Callable[[Any], Sequence[int] | Tensor] | None = None
    """Lengths of the rows of an input, where neither a mask nor lists tell them."""
    columns: Collection[str | int] | None = None
    """Keys of the tensors that are trimmed with the mask, and no others; None decides as above."""

    def __post_init__(self) -> None:
        if self.columns is not None and not _are_keys(self.columns):
            raise TypeError(
                f"columns: expected keys of token tensors, or None, got {self.columns!r}; such as "
                'columns=["input_ids", "position_ids"]'
            )
        count = self.max_tokens
        whole = isinstance(count, Integral) and not isinstance(count, bool)
        if count is not None and not (whole and int(count) > 0):
            raise ValueError(
                f"max_tokens: expected a positive integer or None, got {self.max_tokens!r}; "
                "such as max_tokens=16384"
            )

    def halved(self) -> ByLength:
        """Halve the tokens per chunk."""
        most = self.max_tokens
        return self if most is None else replace(self, max_tokens=max(1, most // 2))

    def chunks(self, inputs: Any, chunk_size: int, at_least: int, name: str) -> list[Chunk]:
        """Cut the rows of `inputs`, by tokens or by rows."""
        mask, ends, trimmed = _mask_of(inputs), None, frozenset[int]()
        if mask is not None:
            ends, trimmed = self._read(mask, inputs, name)
        lengths, order = self._lengths(inputs, ends, name).sort(descending=True, stable=True)
        chunks, start = [], 0
        most = max(1, -(-len(lengths) // at_least))
        while start < len(lengths):
            longest = max(1, int(lengths[start]))
            rows = chunk_size if self.max_tokens is None else self.max_tokens // longest
            stop = min(start + max(1, min(rows, most)), len(lengths))
            taken, columns, cost = order[start:stop], None, None
            if ends is not None:
                end = max(1, int(ends[taken].max()))
                columns, cost = dict.fromkeys(trimmed, slice(0, end)), len(taken) * end
            chunks.append(Chunk(taken, columns, cost))
            start = stop
        return chunks

    def _read(self, mask: Tensor, inputs: Any, name: str) -> tuple[Tensor, frozenset[int]]:
        """Read the lengths of the rows from the mask, and the ids of the tensors to trim."""
        if mask.ndim != 2:
            return _lengths_of_mask(mask, name), frozenset()
        parts = [
            part
            for part in parts_with_rows(inputs, name)
            if isinstance(part.value, Tensor) and part.value is not mask
        ]
        if self.columns is not None:
            tokens, unsure = _named(self.columns, parts, mask, name), []
        else:
            wide = [part for part in parts if part.value.shape[1:2] == mask.shape[1:]]
            tokens = [part for part in wide if part.key in _TOKENS]
            unsure = [part for part in wide if part.key not in _TOKENS]
        host, padded = _on_host(mask != 0, [part.value.detach() for part in unsure])
        ends = _lengths_of_mask(host, name)
        for part, is_padded in zip(unsure, padded, strict=True):
            if not is_padded:
                raise ValueError(_not_padding(part, tokens, mask.shape[1]))
        return ends, frozenset(id(each) for each in (mask, *(p.value for p in tokens + unsure)))

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


def _are_keys(columns: Any) -> bool:
    is_collection = isinstance(columns, Collection) and not isinstance(columns, str)
    return is_collection and all(isinstance(key, (str, int)) for key in columns)


def _named(columns: Collection[Any], parts: list[Part], mask: Tensor, name: str) -> list[Part]:
    """Return the parts with these keys; each must have the columns of the mask."""
    named = [part for part in parts if part.key in columns]
    if not named and "attention_mask" not in columns:
        raise ValueError(
            f"{name}: expected tensors by the names in columns, {list(columns)}, got "
            f"{[part.key for part in parts]}; name those that hold tokens"
        )
    for part in named:
        if part.value.shape[1:2] != mask.shape[1:]:
            raise ValueError(
                f"{part.path}: expected {mask.shape[1]} columns, as attention_mask has, got shape "
                f"{tuple(part.value.shape)}; leave {part.key!r} out of columns"
            )
    return named


def _on_host(kept: Tensor, wide: Sequence[Tensor]) -> tuple[Tensor, list[bool]]:
    """Copy the mask to the host, and tell which tensors hold one value beyond it, in one copy."""
    if not wide:
        return kept.cpu(), []
    # The last column of the shortest row is padding, if anything is.
    shortest = kept.sum(1).argmin().view(1)
    flags = [_is_constant_outside(kept, shortest, each).to(kept.device) for each in wide]
    both = torch.cat([kept.flatten(), torch.stack(flags)]).cpu()
    return both[: kept.numel()].view(kept.shape), both[kept.numel() :].tolist()


def _is_constant_outside(kept: Tensor, shortest: Tensor, wide: Tensor) -> Tensor:
    kept, shortest = kept.to(wide.device), shortest.to(wide.device)
    padding = wide.index_select(0, shortest)[:, -1:]
    return ((wide == padding) | kept.view(*kept.shape, *[1] * (wide.ndim - 2))).all()


def _not_padding(part: Part, tokens: Sequence[Part], columns: int) -> str:
    others = ["attention_mask", *(token.key for token in tokens)]
    return (
        f"{part.path}: expected one value wherever attention_mask is zero, as in a tensor of "
        f"tokens that ByLength trims, got several in {columns} columns; pass ByLength(columns="
        f"{[*others, part.key]}) if it holds tokens, and ByLength(columns={others}) if not"
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
    """Find the one attention_mask in nested mappings and tuples."""
    masks = list(_masks_in(inputs))
    return masks[0] if len(masks) == 1 else None


def _masks_in(inputs: Any) -> Iterator[Tensor]:
    parts: Iterable[tuple[Any, Any]] = ()
    if isinstance(inputs, (Mapping, tuple)) and not is_tensor_collection(inputs):
        parts = inputs.items() if isinstance(inputs, Mapping) else enumerate(inputs)
    for name, part in parts:
        if name == "attention_mask" and isinstance(part, Tensor):
            yield part
        else:
            yield from _masks_in(part)
