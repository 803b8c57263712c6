"""A set in the format of COCO with Karpathy's splits: two coloured shapes on a coloured ground.

    python examples/drawn_coco.py data/drawn
    gradcache-clip data coco data/drawn/dataset_coco.json data/drawn/images data/drawn/shards

No two images show the same, so what is held out has not been seen.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

SIZES = {"small": 14, "large": 26}
COLOURS = ("red", "green", "blue", "yellow", "purple", "black")
SHAPES = ("circle", "square", "triangle", "bar")
GROUNDS = ("white", "pink", "orange", "lightblue")
SAYINGS = (
    "a {0} and a {1} on {2}",
    "on the left a {0}, on the right a {1}, the ground is {2}",
    "{2} with a {0} left of a {1}",
    "a {1} to the right of a {0}, on {2}",
    "{0}, {1}, {2}",
)
TENTHS = {"train": 6, "restval": 2, "val": 1, "test": 1}


def write_drawn_coco(folder: Path, *, images: int = 6000, seed: int = 0) -> Path:
    """Write `images/` and dataset_coco.json.

    Args:
        folder: created where missing.
        images: a multiple of ten, at most 9,020.
        seed: of what is shown, and where.

    Returns:
        The JSON file.
    """
    draw = random.Random(seed)
    things = [" ".join(words) for words in itertools.product(SIZES, COLOURS, SHAPES)]
    shown = [*itertools.product(itertools.permutations(things, 2), GROUNDS)]
    if images % 10 or not 0 < images <= len(shown):
        raise ValueError(f"images: expected a multiple of 10 up to {len(shown)}, got {images}")
    splits = [name for name, share in TENTHS.items() for _ in range(share * images // 10)]
    entries: list[dict[str, Any]] = []
    for ((left, right), ground), split in zip(draw.sample(shown, images), splits, strict=True):
        entries.append(_entry(len(entries), (left, right, ground), split))
        path = folder / "images" / entries[-1]["filepath"] / entries[-1]["filename"]
        path.parent.mkdir(parents=True, exist_ok=True)
        _picture((left, right), ground, draw).save(path, quality=90)
    file = folder / "dataset_coco.json"
    file.write_text(json.dumps({"images": entries, "dataset": "coco"}))
    return file


def _entry(number: int, words: tuple[str, str, str], split: str) -> dict[str, Any]:
    place = "train2014" if split == "train" else "val2014"
    sentences = [
        {"tokens": text.split(), "raw": text, "imgid": number, "sentid": 5 * number + n}
        for n, text in enumerate(saying.format(*words) for saying in SAYINGS)
    ]
    return {
        "filepath": place,
        "filename": f"COCO_{place}_{number:012d}.jpg",
        "imgid": number,
        "cocoid": number,
        "split": split,
        "sentids": [sentence["sentid"] for sentence in sentences],
        "sentences": sentences,
    }


def _picture(things: tuple[str, str], ground: str, draw: random.Random) -> Image.Image:
    """Both things, each somewhere in its half."""
    image = Image.new("RGB", (64, 64), ground)
    for half, thing in zip((1, 33), things, strict=True):
        size, colour, shape = thing.split()
        side = SIZES[size] + draw.randint(-2, 2)
        x, y = half + draw.randint(0, 30 - side), draw.randint(1, 62 - side)
        _draw_shape(ImageDraw.Draw(image), shape, colour, (x, y, x + side, y + side))
    return image


def _draw_shape(
    canvas: ImageDraw.ImageDraw, shape: str, colour: str, box: tuple[int, int, int, int]
) -> None:
    left, top, right, bottom = box
    if shape == "circle":
        canvas.ellipse(box, fill=colour)
    elif shape == "square":
        canvas.rectangle(box, fill=colour)
    elif shape == "triangle":
        canvas.polygon([(left, bottom), (right, bottom), ((left + right) // 2, top)], fill=colour)
    else:
        third = (bottom - top) // 3
        canvas.rectangle((left, top + third, right, bottom - third), fill=colour)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    print(write_drawn_coco(parser.parse_args().folder))
