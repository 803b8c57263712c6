"""Formats the results of evaluations as tables."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table

from gradcache_clip.train.evaluation.held_out_texts import TextMetrics
from gradcache_clip.train.evaluation.labelled import LabelMetrics
from gradcache_clip.train.evaluation.recall import DirectionMetrics, RetrievalMetrics


def label_table(metrics: LabelMetrics, title: str) -> Table:
    """Return a table of classification accuracies."""
    table = Table(title=title)
    names = ("nearest images", "linear classifier", "most frequent class", "images", "classes")
    for name in names:
        table.add_column(name, justify="right")
    shares = (metrics.knn_accuracy, metrics.probe_accuracy, metrics.label_chance)
    counts = (metrics.images, metrics.classes)
    table.add_row(*(f"{share:.1%}" for share in shares), *(f"{count:,}" for count in counts))
    return table


def pair_table(metrics: RetrievalMetrics, title: str) -> Table:
    """Return a table of retrieval in both directions."""
    ways = {"image to text": metrics.image_to_text, "text to image": metrics.text_to_image}
    return _recall_table("direction", ways, title)


def text_table(metrics: TextMetrics, title: str) -> Table:
    """Return a table of retrieval for each feature width."""
    ways = {f"first {width:,}": found for width, found in metrics.by_width.items()}
    return _recall_table("numbers", ways, f"query to document: {title}")


def _recall_table(heading: str, ways: Mapping[str, DirectionMetrics], title: str) -> Table:
    one = next(iter(ways.values()))
    table = Table(heading, title=title)
    for k in one.recall:
        table.add_column(f"R@{k}", justify="right")
    first = min(one.chance)
    for name in (f"chance R@{first}", "median rank", "candidates"):
        table.add_column(name, justify="right")
    for name, way in ways.items():
        recalls = (f"{share:.1%}" for share in way.recall.values())
        chance = f"{way.chance[first]:.2%}"
        table.add_row(name, *recalls, chance, f"{way.median_rank:.0f}", f"{way.candidates:,}")
    return table
