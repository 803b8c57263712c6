"""Read from masks which columns each row needs. B rows, L columns of a mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradcache_clip.cache.batch_errors import Part
from gradcache_clip.cache.masks import Trim


@dataclass(frozen=True, eq=False)
class Columns:
    """The columns that each row needs, from `first` up to `stop`; both (B,), on the host.

    A row of zeros needs all: what an encoder makes of it may depend on their number.
    """

    first: Tensor
    stop: Tensor
    width: int
    trimmed: tuple[int, ...]
    """By id, the mask and the tensors that are trimmed with it."""

    def in_order(self, order: Tensor) -> Columns:
        return replace(self, first=self.first[order], stop=self.stop[order])

    def widths(self, rows: slice, multiple: int) -> Tensor:
        """Count the columns that the first row needs, the first two, the first three, ..."""
        needed = self.stop[rows].cummax(0).values - self.first[rows].cummin(0).values
        return (-(-needed // multiple) * multiple).clamp_max(self.width)

    def kept(self, rows: slice, multiple: int) -> slice:
        """Return the columns that a chunk of these rows keeps; padding fills up a multiple."""
        first, stop = int(self.first[rows].min()), int(self.stop[rows].max())
        columns = min(-(-(stop - first) // multiple) * multiple, self.width)
        first = min(first, self.width - columns)
        return slice(first, first + columns)


def read_columns(trims: Sequence[Trim]) -> list[Columns]:
    """Read all masks, and check that what is trimmed with them is padding, in one transfer.

    Raises:
        ValueError: a mask of other values than zero and one, or a tensor whose name tells nothing
            and which holds several values in the padding.
    """
    if not trims:
        return []
    numbers = [_numbers_of(trim) for trim in trims]
    # The host has to know the shapes of the chunks: it waits for the device here, once.
    host = torch.cat([each.to(numbers[0].device) for each in numbers]).cpu()
    parts = host.split([len(each) for each in numbers])
    return [_checked(trim, part) for trim, part in zip(trims, parts, strict=True)]


def _numbers_of(trim: Trim) -> Tensor:
    """Compute `first` and `stop` of all rows, and the answers to what `_checked` asks."""
    mask = trim.mask.value.detach()
    kept = mask != 0
    first, behind = kept.byte().argmax(1), kept.flip(1).byte().argmax(1)
    answers = [(~kept | (mask == 1)).all(), *_are_padding(kept, trim.unsure)]
    flags = torch.stack([answer.to(mask.device) for answer in answers])
    return torch.cat([first, mask.shape[1] - behind, flags.long()])


def _checked(trim: Trim, numbers: Tensor) -> Columns:
    mask, rows = trim.mask.value, len(trim.mask.value)
    if not numbers[2 * rows]:
        raise ValueError(_no_mask(trim.mask))
    for part, is_padding in zip(trim.unsure, numbers[2 * rows + 1 :].tolist(), strict=True):
        if not is_padding:
            raise ValueError(_not_padding(part, trim))
    trimmed = (id(mask), *(id(part.value) for part in trim.tokens))
    return Columns(numbers[:rows], numbers[rows : 2 * rows], mask.shape[1], trimmed)


def _are_padding(kept: Tensor, parts: Sequence[Part]) -> list[Tensor]:
    """Find out of every part whether it holds one value wherever nothing is kept."""
    if not parts:
        return []
    # The shortest row has padding, if any row has.
    row = kept.sum(1).argmin().view(1)
    column = kept.index_select(0, row).byte().argmin(1)
    return [_is_constant_outside(kept, row, column, part.value.detach()) for part in parts]


def _is_constant_outside(kept: Tensor, row: Tensor, column: Tensor, wide: Tensor) -> Tensor:
    kept, row, column = (each.to(wide.device) for each in (kept, row, column))
    padding = wide.index_select(0, row).index_select(1, column)
    return ((wide == padding) | kept.view(*kept.shape, *[1] * (wide.ndim - 2))).all()


def _no_mask(mask: Part) -> str:
    others = mask.value[(mask.value != 0) & (mask.value != 1)]
    return (
        f"{mask.path}: expected a mask of ones, and zeros in the padding, got {others[0].item()}; "
        "pass (x != 0) if that is what is meant, or name another one with ByLength(mask=...)"
    )


def _not_padding(part: Part, trim: Trim) -> str:
    mask = trim.mask.key
    unsure = {id(each) for each in trim.unsure}
    others = [mask, *(token.key for token in trim.tokens if id(token) not in unsure)]
    return (
        f"{part.path}: expected one value wherever {mask} is zero, as in a tensor of tokens that "
        f"ByLength trims, got several in {trim.mask.value.shape[1]} columns; pass ByLength(columns="
        f"{[*others, part.key]}) if it holds tokens, and ByLength(columns={others}) if not"
    )
