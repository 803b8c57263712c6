"""A batch of image-caption pairs, and filling one group by group."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gradcache_clip.train.data.resumable import Builder
from gradcache_clip.train.data.stream import Group


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


class BatchBuilder(Builder):
    """Fills a batch in place, so that none is ever held twice.

    Copying also frees each group's shared memory at once; thousands would exhaust file handles.
    """

    def __init__(self, batch_size: int) -> None:
        super().__init__(batch_size)
        self._images: Tensor | None = None
        self._captions: list[str] = []
        self._keys: list[str] = []
        self._groups: list[str] = []

    @property
    def filled(self) -> int:
        return len(self._keys)

    def take(self, group: Group, row: int) -> int:
        stop = self.end_of(group, row)
        if self._images is None:
            self._images = group.images.new_empty(self.batch_size, *group.images.shape[1:])
        self._images[self.filled : self.filled + stop - row] = group.images[row:stop]
        self._captions += group.captions[row:stop]
        self._groups += group.groups[row:stop]
        self._keys += group.keys[row:stop]
        return stop

    def batch(self) -> Batch:
        assert self._images is not None and self.is_full
        return Batch(self._images, self._captions, self._keys, self._groups)
