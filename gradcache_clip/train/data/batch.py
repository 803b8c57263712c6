"""A batch of image-caption pairs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Image-caption pairs, row by row.

    Args:
        images: uint8 (B, 3, H, W), or (B, 2, 3, H, W) for two views of each; scaled to floats
            later, so that a batch stays small.
        captions: B captions; of several an image, one is drawn anew each epoch.
        keys: B names of samples.
        groups: B match groups; rows of equal group match each other.
    """

    images: Tensor
    captions: list[str]
    keys: list[str]
    groups: list[str]

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def texts(self) -> list[list[str]]:
        """B each: captions alone."""
        return [self.captions]
