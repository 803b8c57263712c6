"""Find encoders whose features of a row change when its padding is trimmed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from gradcache_clip.cache.batch_tree import tensors_in
from gradcache_clip.cache.chunks import Chunk
from gradcache_clip.cache.first_step import operations, part_of, passes
from gradcache_clip.cache.recovery import is_out_of_memory
from gradcache_clip.cache.rounding import largest_change, tolerance_between_sizes
from gradcache_clip.cache.tower import Tower
from gradcache_clip.distributed.strategies import LocalStrategy

# Positions are computed in float32 by most models, whatever the features' precision is.
_LEAST_TOLERANCE = 1e-4


class PaddingCountsError(ValueError):
    """Features of a row depend on its padding; raised on every rank."""


def check_trims(
    towers: Sequence[Tower], strategy: LocalStrategy, found: Callable[[Exception], None]
) -> frozenset[str]:
    """Embed the row of each tower that loses most columns, with and without them, in eval mode.

    Returns:
        Names of the towers that need not be asked again in a later step. Of others with a mask no
        row was trimmed.
    """
    checked = (t for t in towers if t.chunks[0].columns is None or _check_trims(t, strategy, found))
    return frozenset(tower.name for tower in checked)


class _Trimmed(NamedTuple):
    row: Chunk
    columns: slice
    width: int


def _check_trims(tower: Tower, strategy: LocalStrategy, found: Callable[[Exception], None]) -> bool:
    device, most = tower.features[0].device, _most_trimmed(tower)
    if not strategy.anywhere(most.width > 0, device):
        return False
    # Ranks without such a row take the same passes.
    padded = replace(most.row, columns=None)
    change, tolerance = _change_of_row(tower, most.row, padded), _trim_tolerance(tower)
    if not strategy.anywhere(not change <= tolerance, device):
        return True
    tolerance = _trim_tolerance(tower, operations(tower, padded, True).dtypes)
    moves = not change <= tolerance
    repeats = _change_of_row(tower, most.row, most.row) <= tolerance
    if strategy.anywhere(moves and repeats, device):
        message = _trim_message(tower, most, change) if moves else _trims_elsewhere(tower)
        found(PaddingCountsError(message))
    return True


def _most_trimmed(tower: Tower) -> _Trimmed:
    """Find the chunk that cuts most columns off a tensor; width 0 if none cuts any."""
    widths = {id(tensor): tensor.shape[1] for tensor in tensors_in(tower.passed) if tensor.ndim > 1}
    cuts = [
        (widths[part] - (kept.stop - kept.start), index, part)
        for index, chunk in enumerate(tower.chunks)
        for part, kept in (chunk.columns or {}).items()
    ]
    most, index, part = max(cuts)
    chunk = tower.chunks[index]
    columns = (chunk.columns or {})[part]
    return _Trimmed(part_of(chunk, 0, 1), columns, widths[part] if most else 0)


def _trim_tolerance(tower: Tower, dtypes: Iterable[torch.dtype] = ()) -> float:
    return max(_LEAST_TOLERANCE, tolerance_between_sizes(tower.features, dtypes))


def _change_of_row(tower: Tower, one: Chunk, other: Chunk) -> float:
    try:
        before, after = passes(tower, [one, other], everything=True).without_losses()
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise ValueError(_needs_one_row(tower, error)) from error
    return largest_change(_unpadded(before), _unpadded(after))


def _unpadded(features: Sequence[Tensor]) -> list[Tensor]:
    """Take vectors of rows, and those of tokens that a mask beside them keeps.

    Vectors of tokens without a mask may be those of padding, which only the loss may know.
    """
    masks = [each for each in features if each.dtype is torch.bool and each.ndim == 2]
    found = []
    for feature in filter(torch.is_floating_point, features):
        kept = next((mask for mask in masks if mask.shape == feature.shape[:2]), None)
        if feature.ndim < 3:
            found.append(feature)
        elif kept is not None:
            found.append(feature[kept])
    return found


def _trim_message(tower: Tower, found: _Trimmed, change: float) -> str:
    numbers = found.row.numbers
    row = found.row.span.start if numbers is None else int(numbers[0])
    first, last = found.columns.start, found.width - found.columns.stop
    sides = [f"its first {first}"] * bool(first) + [f"its last {last}"] * bool(last)
    remedy = (
        "to a model that numbers columns pass position_ids counted from the mask, "
        "(mask.cumsum(1) - 1).clamp_min(0); let any other follow its mask"
        if first
        else "let the encoder follow its mask"
    )
    return (
        f"{tower.name}: expected features that do not depend on padding, got features of row "
        f"{row} that change by {change:.1e} (relative) without "
        f"{' and '.join(sides)} of {found.width} columns; {remedy}, or leave sort_by_length out. "
        'check_rows="off" does not look'
    )


def _needs_one_row(tower: Tower, error: Exception) -> str:
    return (
        f"{tower.name}: expected an encoder that takes one row, by which the first step finds out "
        f'whether padding counts, got {type(error).__name__} ({error}); pass check_rows="off"'
    )


def _trims_elsewhere(tower: Tower) -> str:
    return (
        f"{tower.name}: expected features that do not depend on padding, got another rank where "
        "they do, whose error says where"
    )
