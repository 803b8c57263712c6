"""Decoding the members of a webdataset sample: images by PIL, captions as text and JSON.

Nothing here unpickles, imports or runs anything that a shard brings along.
"""

from __future__ import annotations

import io
import json
import math
import random
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor

from gradcache_clip.train.data.augment import Augmentation

IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp")
TEXT_EXTENSIONS = ("txt", "json", "cls")
MAX_PIXELS = 64 * 2**20
MAX_MEMBER_BYTES = 128 * 2**20
MAX_TEXT_BYTES = 16 * 2**20
"""Of a text or JSON file, which takes many times its size when it is parsed."""
MAX_CAPTION_CHARACTERS = 2**16
MAX_SCANS = 100
"""Of a progressive JPEG, each of which passes over the whole image."""

_JPEG_SCAN = b"\xff\xda"
_STRIP_ROWS = 1024
_FORMATS = ("PNG", "JPEG", "WEBP")
_ASPECT_RANGE = (3 / 4, 4 / 3)


class BrokenSample(Exception):
    """A sample that cannot be used; the message is the reason that is counted."""


@dataclass(frozen=True)
class ImageTransform:
    """From the bytes of an image file to a square uint8 image.

    Without `crop_scale` the shortest side becomes `image_size` (bicubic) and the centre is kept.

    Args:
        image_size: height and width of the result in pixels.
        crop_scale: smallest and largest share of the image's area that a random crop keeps, such
            as (0.8, 1.0); the crop's aspect ratio lies between 3:4 and 4:3.
        augmentation: makes two views of an image, each cropped and then changed by it; None makes
            one, which is only cropped.

    Raises:
        ValueError: for an image size below one, or a range outside 0 < low <= high <= 1.
    """

    image_size: int = 64
    crop_scale: tuple[float, float] | None = None
    augmentation: Augmentation | None = None

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise ValueError(
                f"image_size: expected a positive integer, got {self.image_size}; pass e.g. 64"
            )
        if self.crop_scale and not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(
                f"crop_scale: expected 0 < low <= high <= 1, got {self.crop_scale}; "
                "pass e.g. (0.8, 1.0)"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the result."""
        pixels = (3, self.image_size, self.image_size)
        return pixels if self.augmentation is None else (2, *pixels)

    def __call__(self, data: bytes, draw: random.Random) -> Tensor:
        """Decode, crop and resize; `draw` decides the crop and what the views differ in.

        Returns:
            uint8 (3, image_size, image_size), or (2, 3, image_size, image_size) for two views.

        Raises:
            BrokenSample: the bytes are no PNG, JPEG or WebP image that PIL can decode.
        """
        image = decode_image(data, smallest_side=self._smallest_side)
        if self.augmentation is None:
            return _pixels(self._square(image, draw))
        views = (self.augmentation(self._square(image, draw), draw) for _ in range(2))
        return torch.stack([_pixels(view) for view in views])

    def _square(self, image: Image.Image, draw: random.Random) -> Image.Image:
        return image.resize(
            (self.image_size, self.image_size),
            Image.Resampling.BICUBIC,
            box=self._box(image.width, image.height, draw),
            reducing_gap=2.0,
        )

    @property
    def _smallest_side(self) -> int:
        """Side below which decoding at a reduced size would cost sharpness, in pixels."""
        low = self.crop_scale[0] if self.crop_scale else 1.0
        return math.ceil(2 * self.image_size / math.sqrt(low))

    def _box(
        self, width: int, height: int, draw: random.Random
    ) -> tuple[float, float, float, float]:
        crop_width = crop_height = float(min(width, height))
        x = y = 0.5
        if self.crop_scale:
            area = width * height * draw.uniform(*self.crop_scale)
            ratio = math.exp(draw.uniform(*map(math.log, _ASPECT_RANGE)))
            crop_width = min(width, math.sqrt(area * ratio))
            crop_height = min(height, math.sqrt(area / ratio))
            x, y = draw.random(), draw.random()
        left, top = x * (width - crop_width), y * (height - crop_height)
        return left, top, left + crop_width, top + crop_height


def _pixels(image: Image.Image) -> Tensor:
    """uint8 (3, height, width)."""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3).permute(2, 0, 1).contiguous()


def decode_image(data: bytes, *, smallest_side: int | None = None) -> Image.Image:
    """Decode a PNG, JPEG or WebP image to RGB, upright, transparency over white.

    Args:
        data: the bytes of the file.
        smallest_side: a large JPEG may be decoded at a reduced size, no side below this.

    Raises:
        BrokenSample: another format, damaged data, or more than `MAX_PIXELS` pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
            image = Image.open(io.BytesIO(data), formats=_FORMATS)
            if image.width * image.height > MAX_PIXELS:
                raise BrokenSample("image too large")
            if image.format in ("JPEG", "MPO") and data.count(_JPEG_SCAN) > MAX_SCANS:
                raise BrokenSample("too many scans")
            if smallest_side:
                image.draft("RGB", (smallest_side, smallest_side))
            ImageOps.exif_transpose(image, in_place=True)
            return _over_white(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BrokenSample("image too large") from error
    except BrokenSample:
        raise
    # Damaged files make PIL raise OSError, SyntaxError, struct.error, IndexError and others.
    except Exception as error:
        raise BrokenSample("undecodable image") from error


def _over_white(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # PIL clips 16-bit grey at 255 instead of scaling it.
        image = image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        return _composed_over_white(image)
    return image.convert("RGB")


def _composed_over_white(image: Image.Image) -> Image.Image:
    """In strips, because several copies of a large image would take more than a gigabyte."""
    width, height = image.size
    result = Image.new("RGB", image.size)
    for top in range(0, height, _STRIP_ROWS):
        box = (0, top, width, min(top + _STRIP_ROWS, height))
        strip = image.crop(box).convert("RGBA")
        white = Image.new("RGBA", strip.size, "white")
        result.paste(Image.alpha_composite(white, strip).convert("RGB"), box)
    return result


def image_bytes(members: Mapping[str, Any]) -> bytes:
    """The image of a sample, under the first of `IMAGE_EXTENSIONS` that it has.

    Raises:
        BrokenSample: it has none.
    """
    for extension in IMAGE_EXTENSIONS:
        if extension in members:
            data: bytes = members[extension]
            return data
    raise BrokenSample("missing image")


def captions_and_group(
    members: Mapping[str, Any], *, required: bool = True
) -> tuple[tuple[str, ...], str]:
    """The captions of a sample and its group.

    The captions are "captions" of KEY.json, else the text of KEY.txt, else "caption" of KEY.json.
    The group is "group" of KEY.json, else the key: such an image matches its own captions alone.
    An image whose caption is not required has an empty one where it has none.

    Raises:
        BrokenSample: no caption, an empty one, text that is not UTF-8, or JSON of another shape.
    """
    notes = _notes(members.get("json"))
    listed = notes.get("captions")
    if isinstance(listed, list) and listed:
        captions = listed
    elif "txt" in members:
        captions = [_text(members["txt"])]
    elif "caption" in notes:
        captions = [notes["caption"]]
    elif required:
        raise BrokenSample("missing caption")
    else:
        captions = [""]
    if not all(isinstance(caption, str) for caption in captions):
        raise BrokenSample("bad json")
    if max(map(len, captions)) > MAX_CAPTION_CHARACTERS:
        raise BrokenSample("caption too long")
    stripped = tuple(caption.strip() for caption in captions)
    if required and not all(stripped):
        raise BrokenSample("empty caption")
    group = str(notes.get("group", members["__key__"]))
    _check_encodes(*stripped, group)
    return stripped, group


def label_of(members: Mapping[str, Any]) -> str:
    """The class of an image: `label` of KEY.json, else the text of KEY.cls; empty without both."""
    label = _notes(members.get("json")).get("label", "")
    found = str(label) if label != "" else _text(members.get("cls", b"")).strip()
    _check_encodes(found)
    return found


def _notes(data: bytes | None) -> dict[str, Any]:
    if data is None:
        return {}
    try:
        notes = json.loads(data)
    except UnicodeDecodeError as error:
        raise BrokenSample("bad utf-8") from error
    except (ValueError, RecursionError) as error:
        raise BrokenSample("bad json") from error
    if not isinstance(notes, dict):
        raise BrokenSample("bad json")
    return notes


def _check_encodes(*texts: str) -> None:
    """JSON can spell half of a surrogate pair, which no tokenizer and no log takes."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        raise BrokenSample("bad utf-8") from error


def _text(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BrokenSample("bad utf-8") from error
