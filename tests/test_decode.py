"""Decoding images: formats, transparency, orientation, size, crops, and decompression bombs."""

from __future__ import annotations

import io
import random
import struct
import zlib

import pytest
import torch
from PIL import Image
from tiny_shards import picture

from gradcache_clip.train.data.decode import BrokenSample, ImageTransform, decode_image


def png_header(width: int, height: int) -> bytes:
    """A tiny file that claims a huge image."""
    ihdr = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    idat = b"IDAT" + zlib.compress(b"")
    chunks = b"".join(
        struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (ihdr, idat)
    )
    return b"\x89PNG\r\n\x1a\n" + chunks


@pytest.mark.parametrize("side", [8193, 12_000, 60_000])
def test_decompression_bombs_are_broken_samples(side: int) -> None:
    with pytest.raises(BrokenSample, match="image too large"):
        decode_image(png_header(side, side))


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "PPM", "ICO"])
def test_other_formats_are_refused(kind: str) -> None:
    with pytest.raises(BrokenSample, match="undecodable image"):
        decode_image(picture(kind=kind, size=(16, 16)))


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_transparency_shows_white(kind: str) -> None:
    image = decode_image(picture((255, 0, 0, 0), kind=kind, mode="RGBA"))
    assert image.mode == "RGB" and image.getpixel((3, 3)) == (255, 255, 255)


def test_palettes_grey_and_deep_grey_become_rgb() -> None:
    file = io.BytesIO()
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.save(file, "PNG", transparency=0)
    assert decode_image(file.getvalue()).getpixel((0, 0)) == (10, 20, 30)
    assert decode_image(picture(90, mode="L")).getpixel((0, 0)) == (90, 90, 90)
    assert decode_image(picture((90, 0), mode="LA")).getpixel((0, 0)) == (255, 255, 255)
    deep = decode_image(picture(40_000, mode="I;16")).getpixel((0, 0))
    assert deep == (round(40_000 / 257),) * 3 or deep == (40_000 // 257,) * 3
    cmyk = decode_image(picture((0, 0, 0, 0), mode="CMYK", kind="JPEG")).getpixel((0, 0))
    assert min(cmyk) > 250  # type: ignore[type-var, arg-type]


def test_photographs_are_turned_upright() -> None:
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 10)).save(file, "JPEG", exif=exif)
    assert decode_image(file.getvalue()).size == (10, 20)


def test_the_shortest_side_is_scaled_and_the_centre_kept() -> None:
    image = Image.new("RGB", (60, 20), "red")
    image.paste("blue", (20, 0, 40, 20))
    file = io.BytesIO()
    image.save(file, "PNG")
    square = ImageTransform(10)(file.getvalue(), random.Random(0))
    assert square.shape == (3, 10, 10)
    assert square[:, 5, 1:9].T.tolist() == [[0, 0, 255]] * 8
    large = picture((7, 99, 200), kind="JPEG", size=(640, 480))
    assert (
        ImageTransform(10)(large, random.Random(0)).float().mean((1, 2))
        - torch.tensor([7.0, 99.0, 200.0])
    ).abs().max() < 3


def test_crops_stay_inside_and_follow_their_draw() -> None:
    file = io.BytesIO()
    Image.linear_gradient("L").resize((90, 60)).save(file, "PNG")
    crop = ImageTransform(16, (0.2, 0.9))
    first, again, other = (crop(file.getvalue(), random.Random(s)) for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    for seed in range(50):
        box = crop._box(90, 60, random.Random(seed))
        assert 0 <= box[0] < box[2] <= 90.001 and 0 <= box[1] < box[3] <= 60.001
