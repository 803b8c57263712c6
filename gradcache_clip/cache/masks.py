"""Find the masks of a batch, and the tensors that are trimmed with each. L columns of a mask."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from gradcache_clip.cache.batch_errors import Part
from gradcache_clip.cache.batch_tree import parts_with_rows

# Whoever follows these masks has no use for what lies beyond them in these tensors.
_TRIMMED_WITH = {
    "attention_mask": {"input_ids", "inputs_embeds", "position_ids", "token_type_ids"},
    "pixel_attention_mask": {"pixel_values"},
    "patch_valid": {"patches", "patch_coord"},
}


class Trim(NamedTuple):
    """A mask and what is trimmed with it."""

    mask: Part
    tokens: list[Part]
    unsure: list[Part]
    """Those of the tokens that neither their name nor the caller tells to be any."""


def trims_of(
    inputs: Any, masks: Collection[Any] | None, columns: Collection[Any] | None, name: str
) -> list[Trim]:
    """Find masks and tensors, by their shapes and names alone.

    Args:
        inputs: the batch of one encoder.
        masks: keys of the masks; None takes the one of a known name, if there is one.
        columns: keys of the tensors that are trimmed; None takes all that are as wide as a mask.
        name: of the input, for errors.

    Raises:
        ValueError: no such masks or tensors, or a tensor that could follow two masks.
    """
    parts = [part for part in parts_with_rows(inputs, name) if isinstance(part.value, Tensor)]
    chosen = _known_mask(parts, name) if masks is None else _masks_named(masks, parts, name)
    if parts and columns is not None and not chosen:
        raise ValueError(
            f"{name}: expected a mask to trim {list(columns)} by, got none; name it with "
            "ByLength(mask=...), or leave columns out"
        )
    _check_shapes(chosen)
    others = [part for part in parts if all(part.value is not mask.value for mask in chosen)]
    if columns is not None and chosen:
        others = _named(columns, others, chosen, name)
    return [_trim(mask, chosen, others, columns is not None) for mask in chosen]


def _known_mask(parts: Sequence[Part], name: str) -> list[Part]:
    known = _distinct(part for part in parts if part.key in _TRIMMED_WITH)
    # Some models take a mask of pixels (B, images, H, W) beside that of their tokens.
    known = [part for part in known if part.value.ndim == 2] or known
    if len(known) > 1:
        raise ValueError(
            f"{name}: expected one mask, got {_paths(known)}; say by which to trim, such as "
            f"ByLength(mask={list(dict.fromkeys(part.key for part in known))})"
        )
    return known


def _masks_named(keys: Collection[Any], parts: Sequence[Part], name: str) -> list[Part]:
    if missing := [key for key in keys if all(part.key != key for part in parts)]:
        raise ValueError(
            f"{name}: expected masks by the names {list(keys)}, got no {missing[0]!r} among "
            f"{[part.key for part in parts]}; name tensors (B, L) that are zero in the padding"
        )
    return _distinct(part for part in parts if part.key in keys)


def _distinct(parts: Iterable[Part]) -> list[Part]:
    """Drop parts that are another one's tensor."""
    return list({id(part.value): part for part in parts}.values())


def _paths(parts: Sequence[Part]) -> str:
    return " and ".join(part.path for part in parts)


def _check_shapes(masks: Sequence[Part]) -> None:
    for mask in masks:
        if mask.value.ndim != 2 or mask.value.shape[1] == 0:
            raise ValueError(
                f"{mask.path}: expected a mask (B, L), got shape {tuple(mask.value.shape)}; name "
                "another one with ByLength(mask=...), or trim nothing with ByLength(mask=[])"
            )


def _named(
    keys: Collection[Any], parts: Sequence[Part], masks: Sequence[Part], name: str
) -> list[Part]:
    """Return the parts with these keys; each must have the columns of a mask."""
    named = [part for part in parts if part.key in keys]
    if not named and all(mask.key not in keys for mask in masks):
        raise ValueError(
            f"{name}: expected tensors by the names in columns, {list(keys)}, got "
            f"{[part.key for part in parts]}; name those that hold tokens"
        )
    for part in named:
        if not any(_as_wide(part, mask) for mask in masks):
            wide = " or ".join(
                f"{mask.value.shape[1]} columns, as {mask.key} has" for mask in masks
            )
            raise ValueError(
                f"{part.path}: expected {wide}, got shape {tuple(part.value.shape)}; leave "
                f"{part.key!r} out of columns"
            )
    return named


def _as_wide(part: Part, mask: Part) -> bool:
    return bool(part.value.shape[1:2] == mask.value.shape[1:])


def _trim(mask: Part, masks: Sequence[Part], parts: Sequence[Part], by_name: bool) -> Trim:
    tokens = [part for part in parts if _mask_for(part, masks) is mask]
    known = _TRIMMED_WITH.get(mask.key, set())
    return Trim(mask, tokens, [p for p in tokens if not by_name and p.key not in known])


def _mask_for(part: Part, masks: Sequence[Part]) -> Part | None:
    """Return the mask that is as wide, the one beside the part if several are."""
    wide = [mask for mask in masks if _as_wide(part, mask)]
    nearest = [mask for mask in wide if _container(mask) == _container(part)] or wide
    if len(nearest) > 1:
        raise ValueError(
            f"{part.path}: expected one mask of {part.value.shape[1]} columns, got "
            f"{_paths(nearest)}; pad one of them further, or name one with ByLength(mask=...)"
        )
    return nearest[0] if nearest else None


def _container(part: Part) -> str:
    """The path of the mapping or tuple that holds a part."""
    return part.path.removesuffix(f"[{part.key!r}]")
