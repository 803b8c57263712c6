"""The memory that `plan` predicts beside what gpu_engine.py measured, on the same card.

    python benchmarks/gpu_plan.py

Reads gpu_engine.csv of the folder of results. Writes gpu_plan.csv into benchmarks/results (or
--results). Needs pydantic, as all of `gradcache-clip plan` does.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from gpu_card import MEASURED, Card, Point, section
from gpu_engine import FILE as STEPS
from gpu_engine import LARGE, SMALL, Models, Trained
from results import bytes_text, paragraph, read_rows, table

FILE = "gpu_plan.csv"
_NAMES = {
    "plain": "plain",
    "checkpointed": "plain, checkpointed",
    "cached": "gradient caching",
}
"""Of the methods of a plan."""


@dataclass(frozen=True)
class Compared:
    """Bytes of live tensors in a step."""

    method: str
    batch_size: int
    measured_bytes: int
    status: str = ""
    predicted_bytes: int = 0
    predicted_over_measured: float = 0.0


def points(card: Card, results: Path) -> Iterator[Point]:
    """The steps that fitted, of batches on a plan's curve."""
    models = SMALL if card.small else LARGE
    predicted = cache(partial(_predict, models, card))
    for row in read_rows(Trained, results / STEPS):
        on_curve = row.batch_size & (row.batch_size - 1) == 0
        if row.status == MEASURED and on_curve:
            head = Compared(row.method, row.batch_size, row.peak_bytes)
            yield Point(head, partial(_compare, head, predicted))


def _compare(
    head: Compared, predicted: Callable[[], dict[str, dict[int, int]]]
) -> dict[str, float]:
    found = predicted()[head.method][head.batch_size]
    return {
        "predicted_bytes": found,
        "predicted_over_measured": found / head.measured_bytes,
    }


def _predict(models: Models, card: Card) -> dict[str, dict[int, int]]:
    """Bytes by method and batch."""
    import gradcache_clip
    from gradcache_clip import PlanOptions

    options = PlanOptions(
        batch_size=models.batches[1],
        chunk_size=models.chunk_size,
        image_size=models.image_size,
        precision="bf16",
        context_bytes=0,
    )
    gib = card.memory_bytes / 2**30
    found = gradcache_clip.plan(models.image, models.text, f"{gib:.2f}GiB", options)
    curves = {method.name: dict(method.curve) for method in found.methods}
    return {name: curves[planned] for name, planned in _NAMES.items() if planned in curves}


def page(results: Path) -> str:
    """Time and memory of every step, and what was predicted for it."""
    compared = read_rows(Compared, results / FILE)
    predicted = {(row.method, row.batch_size): bytes_text(row.predicted_bytes) for row in compared}
    rows = read_rows(Trained, results / STEPS)
    lines = [
        [
            f"{row.method}, chunks of {row.chunk_size:,}" if row.method == "cached" else row.method,
            f"{row.batch_size:,}",
            f"{row.pairs_per_s:,.0f}" if row.status == MEASURED else row.status.split(":")[0],
            bytes_text(row.peak_bytes) if row.status == MEASURED else "",
            predicted.get((row.method, row.batch_size), ""),
        ]
        for row in rows
    ]
    about = f"{rows[0].image} and {rows[0].text}, AdamW, bf16: live tensors, model included."
    head = ["", "batch", "pairs a second", "memory", "predicted by `plan`"]
    return f"{paragraph(about)}\n\n{table(head, lines)}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare; 1 if a point failed, 2 if there is no GPU."""
    return section(__doc__, FILE, points, arguments)


if __name__ == "__main__":
    sys.exit(main())
