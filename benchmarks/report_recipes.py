"""What the pages of recipes quote of recipes.py: a block for each, and one for all."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from report_tables import UNMEASURED, paragraph, read_json, table
from results import bytes_text

FILE = "recipes.json"
_SETTINGS = Path(__file__).resolve().parents[1] / "recipes"
_RECALL = re.compile(r"([a-z]+)_to_([a-z]+)_recall_at_(\d+)(?:_of_(\d+)_numbers)?")
_LABELS = {
    "knn_accuracy": "named by the 20 nearest training images",
    "probe_accuracy": "named by a linear classifier",
}


def recipe(results: Path, name: str) -> str:
    """What a recipe's held-out data say, and what it took."""
    record = _records(results).get(name)
    if record is None:
        return UNMEASURED
    metrics = record["metrics"]
    shares = [key for key in metrics if _label(key)]
    lines = [[_label(key), *_figures(metrics, key)] for key in shares]
    head = ["held out", *(["before"] if _has_before(metrics) else []), "right", "chance"]
    rows, unit = record.get("rows", "pairs"), record.get("chunk_of", "")
    took = (
        f"{record['steps']:,} steps of {record['batch_size']:,} {rows} in chunks of "
        f"{record['chunk_size']:,}{unit and f' {unit}'}; {record['cpu_minutes']:.0f} CPU minutes, "
        f"peak memory of the process {bytes_text(record['peak_memory_bytes'])} "
        f"({record['machine']}; torch {record['torch']}, commit {record['commit']}, "
        f"{record['date']}; one seed)."
    )
    return f"{table(head, lines)}\n\n{paragraph(took)}"


def all_recipes(results: Path) -> str:
    """A line for each recipe that was trained."""
    records = _records(results)
    lines = [_line(name, record) for name, record in records.items()]
    head = ["recipe", "batch", "steps", "CPU minutes", "peak memory", "held out", "right", "chance"]
    return table(head, lines, "lrrrrlrr") if lines else UNMEASURED


def _line(name: str, record: Mapping[str, Any]) -> list[str]:
    """With the first of its shares at rank 1."""
    metrics = record["metrics"]
    first = next(key for key in metrics if _label(key))
    return [
        f"`{name}`",
        *(f"{record[key]:,}" for key in ("batch_size", "steps")),
        f"{record['cpu_minutes']:.0f}",
        bytes_text(record["peak_memory_bytes"]),
        *(_label(first), _percent(metrics[first]), _chance(metrics, first)),
    ]


def _label(key: str) -> str:
    """Of a share in words; empty for a figure that is none.

    Example:
        >>> _label("image_to_text_recall_at_5"), _label("image_to_text_recall_at_5_chance")
        ('R@5 image → text', '')
    """
    if found := _RECALL.fullmatch(key):
        first, second, k, width = found.groups()
        return f"R@{k} {first} → {second}" + (f", {width} numbers" if width else "")
    return _LABELS.get(key, "")


def _figures(metrics: Mapping[str, float], key: str) -> list[str]:
    """After training and by chance, and before training if any share has that."""
    before = metrics.get(f"{key}_before")
    first = ([_percent(before)] if before is not None else [""]) if _has_before(metrics) else []
    return [*first, _percent(metrics[key]), _chance(metrics, key)]


def _has_before(metrics: Mapping[str, float]) -> bool:
    return any(key.endswith("_before") for key in metrics)


def _chance(metrics: Mapping[str, float], key: str) -> str:
    # That of all widths is the same.
    whole = key.split("_of_")[0]
    own = metrics.get(f"{whole}_chance", metrics.get("label_chance"))
    return "" if own is None else _percent(own)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _records(results: Path) -> dict[str, Any]:
    return read_json(results, FILE) if (results / FILE).exists() else {}


BLOCKS: dict[str, Callable[[Path], str]] = {
    "recipes": all_recipes,
    **{
        f"recipe-{name}": partial(recipe, name=name)
        for name in sorted(path.stem for path in _SETTINGS.glob("*.yaml"))
    },
}
