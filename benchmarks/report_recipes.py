"""What the pages of recipes quote: how long a run took, and what came out."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from memory_rows import bytes_text
from report_tables import read_json, table

FILE = "recipes.json"
TITLES = {
    "clip": "CLIP",
    "siglip": "SigLIP",
    "filip": "FILIP",
    "beit3": "BEiT-3",
    "lit": "LiT",
    "coco_drawn": "COCO, drawn",
    "moco": "MoCo, image and text",
    "moco_image": "MoCo, images",
    "simclr": "SimCLR",
}
# Without a partner to find: how often an image is named rightly.
_LABELS = {
    "knn_accuracy": "nearest training images",
    "probe_accuracy": "linear classifier",
    "label_chance": "most frequent class",
}


def recipes(results: Path) -> str:
    """A line for each recipe."""
    records = read_json(results, FILE)
    head = ("", "batch", "steps", "minutes on two cores", "memory", "held out", "chance")
    lines = [_line(name, records[name]) for name in TITLES if name in records]
    return table(head, lines, "lrrrrll")


def _line(name: str, record: dict[str, Any]) -> list[str]:
    return [
        TITLES[name],
        f"{record['batch_size']:,}",
        str(record["steps"]),
        str(_minutes(record)),
        bytes_text(record["peak_memory_bytes"]),
        *_shortly(record["metrics"]),
    ]


def _shortly(metrics: dict[str, float]) -> tuple[str, str]:
    if "knn_accuracy" in metrics:
        named, most_frequent = (_percent(metrics[key]) for key in ("knn_accuracy", "label_chance"))
        return f"{named} named rightly", most_frequent
    ways = [metrics[f"{way}_recall_at_1"] for way in ("image_to_text", "text_to_image")]
    chance = metrics["image_to_text_recall_at_1_chance"]
    return f"R@1 {_percent(ways[0])} and {_percent(ways[1])}", _percent(chance)


def recipe(name: str, results: Path) -> str:
    """Minutes, memory and held-out figures of one recipe."""
    record = read_json(results, FILE)[name]
    about = (
        f"About {_minutes(record)} minutes on two CPU cores, {record['steps']} steps of "
        f"{record['batch_size']:,} in chunks of {record['chunk_size']}; the process held "
        f"{bytes_text(record['peak_memory_bytes'])} at most. Held out:"
    )
    return f"{about}\n\n{_figures(record['metrics'])}"


def _figures(metrics: dict[str, float]) -> str:
    if "knn_accuracy" in metrics:
        head, cells = [*_LABELS.values()], [_percent(metrics[key]) for key in _LABELS]
        return table(head, [cells], "rrr")
    found = (re.fullmatch(r"image_to_text_recall_at_(\d+)", key) for key in metrics)
    ks = sorted(int(match[1]) for match in found if match)
    head = ["", *(f"R@{k}" for k in ks), "chance of R@1", "median rank"]
    return table(head, [_way(way, ks, metrics) for way in ("image_to_text", "text_to_image")])


def _way(way: str, ks: list[int], metrics: dict[str, float]) -> list[str]:
    recalls = [_percent(metrics[f"{way}_recall_at_{k}"]) for k in ks]
    chance = _percent(metrics[f"{way}_recall_at_1_chance"])
    median = f"{metrics[f'{way}_median_rank']:.0f}"
    return [way.replace("_", " "), *recalls, chance, median]


def _minutes(record: dict[str, Any]) -> int:
    """On two cores, from what all processes took together."""
    return max(1, math.ceil(record["cpu_minutes"] / 2))


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


BLOCKS: dict[str, Callable[[Path], str]] = {
    "recipes": recipes,
    **{f"recipe-{name}": partial(recipe, name) for name in TITLES},
}
