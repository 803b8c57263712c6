"""Small sets in the two formats of COCO captions, with images that are drawn."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tiny_shards import picture

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (40, 60, 220), "grey": (128,) * 3}
_SAYINGS = ("a {} square", "one {} picture", "{} all over", "the colour {}", "something {}")


def captions_of(number: int) -> list[str]:
    """Five of an image."""
    return [f"{saying.format([*COLOURS][number % 4])} {number}" for saying in _SAYINGS]


def draw(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    colour = COLOURS[[*COLOURS][number % 4]]
    path.write_bytes(picture(colour, kind="JPEG", size=(20 + number % 5, 16)))


def coco_file(folder: Path, count: int = 10, **changes: Any) -> Path:
    """As captions_train2017.json: `images` and `annotations`, in another order."""
    names = [f"{number:012d}.jpg" for number in range(count)]
    for number, name in enumerate(names):
        draw(folder / "images" / name, number)
    data = {
        "info": {"year": 2017},
        "licenses": [],
        "images": [
            {"license": 3, "file_name": name, "height": 16, "width": 20, "id": 100 + number}
            for number, name in enumerate(names)
        ],
        "annotations": [
            {"image_id": 100 + number, "id": 5 * number + place, "caption": caption}
            for place in range(5)
            for number in reversed(range(count))
            for caption in [captions_of(number)[place]]
        ],
    }
    return _written(folder / "captions_train2017.json", {**data, **changes})


def split_file(
    folder: Path, splits: Sequence[str], name: str = "dataset_coco.json", **changes: Any
) -> Path:
    """As dataset_coco.json: one image for each split that is given, with its sentences."""
    images: list[dict[str, Any]] = []
    for number, split in enumerate(splits):
        place = "train2014" if split == "train" else "val2014"
        file = f"COCO_{place}_{number:012d}.jpg"
        draw(folder / "images" / place / file, number)
        images.append(
            {
                "filepath": place,
                "sentids": list(range(5 * number, 5 * number + 5)),
                "filename": file,
                "imgid": number,
                "split": split,
                "sentences": [
                    {"tokens": text.split(), "raw": text, "imgid": number, "sentid": sentence}
                    for sentence, text in enumerate(captions_of(number), start=5 * number)
                ],
                "cocoid": 1000 + number,
            }
        )
    return _written(folder / name, {"images": images, "dataset": "coco", **changes})


def changed(path: Path, change: Any) -> Path:
    """The file after `change` has worked on what it holds."""
    data = json.loads(path.read_text())
    change(data)
    return _written(path, data)


def _written(path: Path, data: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))
    return path
