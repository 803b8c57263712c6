"""Samples of shards, decoded: an image with its captions, and one of these drawn for an epoch."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradcache_clip.train.data.augment import Augmentation
from gradcache_clip.train.data.broken import BrokenReport
from gradcache_clip.train.data.decode import (
    BrokenSample,
    ImageTransform,
    captions_and_group,
    image_bytes,
    label_of,
)
from gradcache_clip.train.data.pieces import Columns
from gradcache_clip.train.data.shard_index import IndexedShards
from gradcache_clip.train.data.tar_samples import RawSample


@dataclass(frozen=True)
class DecodedSample:
    """One image with all its captions.

    Args:
        image: uint8 (3, image_size, image_size), or (2, 3, image_size, image_size) for two views.
        captions: all captions, the main one first.
        key: its name in the shard.
        group: samples of equal group match each other.
        label: its class, if the shard tells and captions are not required.
    """

    image: Tensor
    captions: tuple[str, ...]
    key: str
    group: str
    label: str = ""


DrawnSample = tuple[DecodedSample, str]
"""A sample and the caption that was drawn for an epoch."""


@dataclass(frozen=True)
class LoaderOptions:
    """How samples are drawn, decoded and checked.

    Args:
        image_size: height and width in pixels.
        crop_scale: area range of random crops such as (0.8, 1.0); None keeps the centre.
        augmentation: of two views of each image; None gives one view, which is only cropped.
        seed: of the order, caption choice, crops and views.
        workers: processes that decode; 0 decodes in this one.
        shuffle_buffer: raw samples that a worker holds to shuffle shards that are streamed; 0 keeps
            their order. Shards with an index are shuffled as a whole.
        max_broken_share: share of broken samples above which loading stops with an error.
        captions: whether an image without one is a broken sample.
        allow_url_schemes: URL schemes that may be opened beside local files, by name.

    Raises:
        ValueError: a value outside its range.
    """

    image_size: int = 64
    crop_scale: tuple[float, float] | None = None
    augmentation: Augmentation | None = None
    seed: int = 0
    workers: int = 0
    shuffle_buffer: int = 5000
    max_broken_share: float = 0.05
    captions: bool = True
    allow_url_schemes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("workers", "shuffle_buffer"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"{name}: expected an integer of 0 or more, got {getattr(self, name)}"
                )
        if not 0 <= self.max_broken_share <= 1:
            raise ValueError(
                f"max_broken_share: expected a number from 0 to 1, got {self.max_broken_share}; "
                "pass e.g. 0.05"
            )
        ImageTransform(self.image_size, self.crop_scale)


def decode_sample(
    raw: RawSample, transform: ImageTransform, draw: random.Random, *, captions: bool = True
) -> DecodedSample | BrokenReport:
    """The image and all captions of a raw sample, or why it cannot be used."""
    try:
        texts, group = captions_and_group(raw, required=captions)
        # Of captioned images nobody asks for it, and their metadata is read once.
        label = "" if captions else label_of(raw)
        image = transform(image_bytes(raw), draw)
    except BrokenSample as error:
        return BrokenReport(str(error), raw["__url__"], raw["__key__"])
    return DecodedSample(image, texts, raw["__key__"], group, label)


class Decoder:
    """Decodes samples for training, and puts them into columns."""

    def __init__(self, options: LoaderOptions) -> None:
        self._options = options
        self._transform = ImageTransform(
            options.image_size, options.crop_scale, options.augmentation
        )

    def __call__(self, raw: RawSample, name: str) -> DrawnSample | BrokenReport:
        """A sample, whose caption, crop and views are drawn by the seed and a name."""
        draw = random.Random(f"{self._options.seed}:{name}")
        sample = decode_sample(raw, self._transform, draw, captions=self._options.captions)
        if isinstance(sample, BrokenReport):
            return sample
        return sample, draw.choice(sample.captions)

    def columns(self, rows: Sequence[DrawnSample]) -> Columns:
        """The fields of a `Batch`."""
        images, shape = [sample.image for sample, _ in rows], self._transform.shape
        return {
            "images": torch.stack(images) if rows else torch.empty(0, *shape, dtype=torch.uint8),
            "captions": [caption for _, caption in rows],
            "keys": [sample.key for sample, _ in rows],
            "groups": [sample.group for sample, _ in rows],
        }


class ImageRows:
    """Training samples of indexed shards by number; see `Rows`."""

    def __init__(self, shards: IndexedShards, options: LoaderOptions) -> None:
        self._shards, self._decoder = shards, Decoder(options)
        self.columns = self._decoder.columns

    @property
    def lost(self) -> list[BrokenReport]:
        """Samples that cannot be numbered."""
        return self._shards.lost

    @property
    def identity(self) -> dict[str, object]:
        """What a saved state must agree with."""
        digest = hashlib.sha256(repr(self._shards.identity).encode()).hexdigest()
        return {"shards": digest[:16]}

    def __len__(self) -> int:
        return len(self._shards)

    def read(self, number: int, epoch: int) -> DrawnSample | BrokenReport:
        """A sample as an epoch shows it, or why it cannot be used."""
        raw = self._shards.read(number)
        return raw if isinstance(raw, BrokenReport) else self._decoder(raw, f"{epoch}:{number}")
