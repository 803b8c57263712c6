"""Padded tokens of one rank, made as long as those of the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gradcache_clip.distributed.exchange import Ranks


class PaddedTokens(NamedTuple):
    """Tokens of this rank, and their mask."""

    tokens: Tensor
    mask: Tensor | None

    def padded(self, length: int, *, masked: bool) -> PaddedTokens:
        """Pad to `length` tokens, with a mask where any rank needs one."""
        (tokens, mask), missing = self, length - self.tokens.shape[1]
        if masked and mask is None:
            mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        if missing == 0:
            return PaddedTokens(tokens, mask)
        return PaddedTokens(
            F.pad(tokens, (0, 0, 0, missing)), None if mask is None else F.pad(mask, (0, missing))
        )


def as_long_everywhere(sides: Sequence[PaddedTokens], ranks: Ranks) -> list[PaddedTokens]:
    """Pad both sides to the length of the longest on any rank."""
    if ranks.size == 1:
        return list(sides)
    mine = [[side.tokens.shape[1], side.mask is not None] for side in sides]
    theirs = ranks.joined(torch.tensor(mine, device=sides[0].tokens.device)[..., None])
    padded = []
    for side, (lengths, masks) in zip(sides, theirs.tolist(), strict=True):
        masked = any(masks) or min(lengths) != max(lengths)
        padded.append(side.padded(max(lengths), masked=masked))
    return padded


def of_all_ranks(mask: Tensor | None, ranks: Ranks) -> Tensor | None:
    """Gather a (b, tokens) mask of all ranks."""
    return None if mask is None else ranks.joined(mask.T).T
