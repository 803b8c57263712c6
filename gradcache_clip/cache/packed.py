"""`rows=`: batches as processors and collators pack them, turned into rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from gradcache_clip.cache.nests import with_children
from gradcache_clip.cache.rows import Ragged, spans_of

Division = Callable[[Any], Any]
"""Turns an input, as it is passed to a step, into one that says what its rows are."""

# Its kind of patches: pixels, grids, further values per item, and its number in mm_token_type_ids.
_IMAGES = "pixel_values", "image_grid_thw", (), 1
_VIDEOS = "pixel_values_videos", "video_grid_thw", ("second_per_grid_ts",), 2


@dataclass(frozen=True)
class PackedPatches:
    """Rows of a vision-language batch whose images lie patch by patch in one tensor.

    For batches of the processors of Qwen2-VL, Qwen2.5-VL, Qwen3-VL and models like them:
    `pixel_values` (patches, D) with `image_grid_thw` (images, 3), `pixel_values_videos` with
    `video_grid_thw`. A row has no, one or several images and videos, which follow each other in the
    order of the rows. A chunk without any is given neither pixels nor grids. Position ids are the
    model's work, from the tokens and grids of a chunk.

    How many images a row has is read from a column of counts, from the places of its image tokens
    in `mm_token_type_ids`, which processors return, or from image tokens in `input_ids`.

    Args:
        image_token_id: of the token that stands for patches; needed without `mm_token_type_ids`.
        video_token_id: the same for videos.
        images_per_row: key of a (B,) tensor or list of counts, which the encoder is not given.
        videos_per_row: the same for videos.

    Example:
        >>> import torch
        >>> from gradcache_clip import PackedPatches
        >>> batch = {
        ...     "input_ids": torch.tensor([[5, 9, 9, 6], [7, 8, 5, 5], [9, 7, 9, 4]]),
        ...     "pixel_values": torch.randn(16, 12),
        ...     "image_grid_thw": torch.tensor([[1, 2, 4], [1, 2, 2], [1, 2, 2]]),
        ... }
        >>> rows = PackedPatches(image_token_id=9)(batch)
        >>> rows.nest["image_grid_thw"].lengths
        [1, 0, 2]
    """

    image_token_id: int | None = None
    video_token_id: int | None = None
    images_per_row: str | None = None
    videos_per_row: str | None = None

    def __call__(self, inputs: Any) -> Any:
        check_mapping(inputs, "PackedPatches")
        rows_of: dict[str, list[int]] = {}
        columns = self.images_per_row, self.videos_per_row
        tokens = self.image_token_id, self.video_token_id
        for kind, column, token in zip((_IMAGES, _VIDEOS), columns, tokens, strict=True):
            rows_of |= _rows_of_kind(inputs, kind, column, token)
        kept = _without(inputs, [column for column in columns if column is not None])
        return Ragged(kept, rows_of) if rows_of else kept


def _rows_of_kind(
    inputs: Mapping[str, Any],
    kind: tuple[str, str, tuple[str, ...], int],
    column: str | None,
    token: int | None,
) -> dict[str, list[int]]:
    """Count patches and items per row, by the keys of what is cut so."""
    pixels, grids, others, number = kind
    if (grid := inputs.get(grids)) is None:
        return {}
    if inputs.get(pixels) is None:
        raise ValueError(
            f"{pixels}: expected the patches of {grids}, got none in {list(inputs)}; pass what the "
            "processor returned"
        )
    patches = _patches_of(grid, grids)
    if column is not None:
        items = _from_column(inputs, column, len(patches), grids)
    else:
        tokens = _tokens_per_row(inputs, token, number, grids)
        items = _items_per_row(tokens, patches, grids)
    bounds = [0, *accumulate(items)]
    ends = [0, *accumulate(patches)]
    per_row = [ends[b] - ends[a] for a, b in pairwise(bounds)]
    more = {key: items for key in others if _has_one_each(inputs.get(key), len(patches))}
    return {pixels: per_row, grids: items, **more}


def _has_one_each(value: Any, count: int) -> bool:
    return isinstance(value, (list, Tensor)) and len(value) == count


def _patches_of(grid: Any, name: str) -> list[int]:
    given = torch.as_tensor(grid)
    if given.ndim != 2 or given.shape[1] != 3 or given.is_floating_point():
        raise ValueError(
            f"{name}: expected integers (items, 3), time, height and width in patches, got shape "
            f"{tuple(given.shape)} and {given.dtype}; pass what the processor returned"
        )
    return given.prod(1).tolist()


def _from_column(inputs: Mapping[str, Any], column: str, items: int, grids: str) -> list[int]:
    if column not in inputs:
        raise ValueError(
            f"{column}: expected a column of counts beside {grids}, got {list(inputs)}; add it to "
            "the batch, or leave the name of the column out"
        )
    counts = spans_of(inputs[column], column).lengths
    if sum(counts) != items:
        raise ValueError(
            f"{column}: expected counts that add up to the {items} items of {grids}, got "
            f"{sum(counts)} over {len(counts)} rows; count the items of every row"
        )
    return counts


def _tokens_per_row(
    inputs: Mapping[str, Any], token: int | None, number: int, grids: str
) -> list[int]:
    """Count the tokens that stand for patches."""
    key = "mm_token_type_ids" if token is None else "input_ids"
    ids = inputs.get(key)
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        name = grids.split("_")[0]
        raise ValueError(
            f"{key}: expected a tensor (B, L) that tells which row the items of {grids} belong to, "
            f"got {type(ids).__name__}; keep mm_token_type_ids of the processor, or pass "
            f"PackedPatches({name}_token_id=...) for input_ids, or "
            f"PackedPatches({name}s_per_row=...) with a column of counts"
        )
    return (ids == (number if token is None else token)).sum(1).tolist()


def _items_per_row(tokens: Sequence[int], patches: Sequence[int], grids: str) -> list[int]:
    """Deal items out to rows in turn, so that each row gets the patches of its tokens."""
    if not patches and not sum(tokens):
        return [0] * len(tokens)
    merged, rest = divmod(sum(patches), sum(tokens) or 1)
    if not sum(tokens) or rest or math.isqrt(merged) ** 2 != merged:
        raise ValueError(
            f"{grids}: expected merge_size squared patches for each token that stands for them, "
            f"got {sum(patches)} patches of {len(patches)} items and {sum(tokens)} tokens; look at "
            "the token id and at truncated rows, or pass a column of counts"
        )
    index_of = {end: index for index, end in enumerate([0, *accumulate(patches)])}
    ends = [merged * count for count in accumulate(tokens)]
    for row, end in enumerate(ends):
        if end not in index_of:
            raise ValueError(
                f"{grids}: expected items that end where rows end, got row {row} with "
                f"{tokens[row]} tokens of {merged} patches each, which end inside an item of "
                f"{list(patches)}; look at the order of items and at truncated rows, or pass a "
                "column of counts"
            )
    indices = [0, *(index_of[end] for end in ends)]
    return [b - a for a, b in pairwise(indices)]


def _without(inputs: Mapping[str, Any], keys: Sequence[str]) -> Any:
    """Leave keys out of a copy of a mapping."""
    if not any(key in inputs for key in keys):
        return inputs
    copied = with_children(inputs, list(inputs.values()))
    for key in keys:
        copied.pop(key, None)
    return copied


def check_mapping(inputs: Any, name: str) -> None:
    if not isinstance(inputs, Mapping):
        raise TypeError(
            f"rows={name}(): expected an input that is a mapping, as a processor or collator "
            f"returns it, got {type(inputs).__name__}; pass a dict with the encoder's arguments, "
            "and rows=[...] with None for inputs of one row a sample"
        )
