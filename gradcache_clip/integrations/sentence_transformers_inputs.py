"""Columns of a batch of sentence-transformers as inputs of the engine: merged, divided, sorted.

b rows of a column, L tokens of its longest row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gradcache_clip.cache import ByLength, PackedPatches, PackedTokens, Ragged, Shared

Features = dict[str, Any]
"""A column of inputs: token ids, and anything else that the model's `preprocess` returns."""

# Nothing that they hold in the padding reaches a model that follows its mask.
_TOKENS = {
    *("attention_mask", "input_ids", "inputs_embeds", "mm_token_type_ids", "offset_mapping"),
    *("position_ids", "special_tokens_mask", "token_type_ids"),
}
# Unpadded texts, and those of a StaticEmbedding.
_BOUNDS = "cu_seq_lens_q", "offsets"
_PATCHES = {"image_grid_thw": "pixel_values", "video_grid_thw": "pixel_values_videos"}
_IMAGES, _VIDEOS = "num_images_per_sample", "num_videos_per_sample"
# Models without grids, such as LLaVA and Gemma 3, take one entry per image of any row ...
_PER_IMAGE = "pixel_values", "image_position_ids", "image_sizes"
# ... unless their processor pads the images of each row.
_PADDED_IMAGES = "pixel_attention_mask", "aspect_ratio_ids"
# A modality may be a tuple of names; the length of a prompt may be a tensor that is read as one.
_WHOLE = "modality", "prompt_length"


def divided(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Divide a column into rows; `rows` of a `GradCache` whose inputs are {"input": features}."""
    features = inputs["input"].items()
    rows = _rows_of({k: Shared(x) if k in _WHOLE else x for k, x in features})
    return {**inputs, "input": rows}


def _rows_of(features: Features) -> Any:
    if _is_unpadded(features):
        return PackedTokens()(features)
    if not features.keys().isdisjoint(_PATCHES):
        return _patches(features)
    counts = features.get(_IMAGES)
    if counts is None or not _has_one_per_image(features, counts):
        return features
    return Ragged(features, {key: counts for key in _PER_IMAGE if key in features})


def _patches(features: Features) -> Any:
    # PackedPatches takes its counts out of the batch, but a model may ask for them.
    copies = {key: f"{key} of each row" for key in (_IMAGES, _VIDEOS) if key in features}
    counted = {copy: features[key] for key, copy in copies.items()}
    divide = PackedPatches(images_per_row=copies.get(_IMAGES), videos_per_row=copies.get(_VIDEOS))
    return divide({**features, **counted})


def _has_one_per_image(features: Features, counts: Tensor) -> bool:
    pixels, padded = features.get("pixel_values"), any(key in features for key in _PADDED_IMAGES)
    return isinstance(pixels, Tensor) and not padded and len(pixels) == int(counts.sum())


def merged(columns: Sequence[Features]) -> Features | None:
    """Concatenate columns that have the same tensors and are padded on the right; None if not."""
    trimmed = all(_mask_of(each) is not None and not keeps_columns(each) for each in columns)
    # Rows padded on the left would get padding on both sides, and chunks of any two be as wide.
    if not trimmed or is_padded_on_the_left(columns):
        return None
    if len(columns) == 1:
        return columns[0]
    from sentence_transformers.base.losses.merged_forward import merge_feature_batches

    together: Features | None = merge_feature_batches([*columns])
    return together


def is_padded_on_the_left(columns: Sequence[Features]) -> bool:
    """Whether a row of any column begins with padding; waits for the device once."""
    masks = [mask for each in columns if (mask := _mask_of(each)) is not None]
    return bool(masks) and bool(torch.stack([(mask[:, 0] == 0).any() for mask in masks]).any())


def width_of(features: Features) -> int:
    """Return L, as it is or would be if padded; 0 for a column without tokens."""
    mask, bounds = _mask_of(features), features.get("cu_seq_lens_q")
    if mask is None and bounds is not None:
        return int(bounds.diff().max())
    return 0 if mask is None else mask.shape[1]


def keeps_columns(features: Features) -> bool:
    """Whether a tensor beside the mask is as wide, and may be something else than tokens."""
    if (mask := _mask_of(features)) is None:
        return False
    packed = {pixels for grid, pixels in _PATCHES.items() if grid in features}
    others = (x for key, x in features.items() if key not in _TOKENS | packed)
    return any(isinstance(x, Tensor) and x.shape[1:2] == mask.shape[1:] for x in others)


def sorting(
    features: Features, max_tokens: int | None, pad_to_multiple_of: int, *, whole: bool
) -> ByLength | None:
    """Choose how rows of a column are sorted and trimmed; None cuts them in their order.

    Args:
        features: the column.
        max_tokens: budget of a chunk, if there is one.
        pad_to_multiple_of: number of tokens of which the width of a chunk is a multiple.
        whole: whether chunks keep the width of the batch.

    Raises:
        ValueError: a budget without tokens to count.
    """
    unpadded = _is_unpadded(features)
    if _mask_of(features) is None and not unpadded:
        _check_no_budget(max_tokens, features)
        return None
    if not whole and not unpadded:
        multiple = pad_to_multiple_of
        return ByLength(max_tokens, mask="attention_mask", pad_to_multiple_of=multiple)
    if max_tokens is None:
        return None
    return ByLength(max_tokens, None if unpadded else _widths, mask=())


def _widths(inputs: Mapping[str, Any]) -> Tensor:
    """Return L for every row: the lengths of rows that are not trimmed."""
    mask: Tensor = inputs["input"]["attention_mask"]
    return torch.full((len(mask),), mask.shape[1])


def _is_unpadded(features: Features) -> bool:
    return any(key in features for key in _BOUNDS)


def _mask_of(features: Features) -> Tensor | None:
    mask = features.get("attention_mask")
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None


def _check_no_budget(max_tokens: int | None, features: Features) -> None:
    if max_tokens is not None:
        raise ValueError(
            "mini_batch_num_tokens: expected columns with attention_mask or cu_seq_lens_q, by "
            f"which tokens are counted, got {[*features]} under {max_tokens}; cut by "
            "mini_batch_size instead"
        )
