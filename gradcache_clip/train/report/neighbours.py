"""Images with those that a tower finds most similar: what it has learned without captions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gradcache_clip.train.evaluation.recall import retrieve
from gradcache_clip.train.report.canvas import PALE, RIGHT, WRONG, Page, save_figure, settings

if TYPE_CHECKING:
    from jaxtyping import Float

    from gradcache_clip.train.report.canvas import Picture

_TOP, _ROW, _THUMB, _STEP, _LABEL = 92, 112, 76, 90, 200


def draw_neighbours(
    features: Float[Tensor, "n d"],
    path: str | Path,
    *,
    images: Sequence[Picture],
    labels: Sequence[str],
    rows: int = 6,
    depth: int = 6,
    seed: int = 0,
) -> Path:
    """Random images, and beside each the others of the set whose features are most similar.

    Those of the same class are framed in green; below each stands the cosine similarity.

    Args:
        features: normalised.
        path: where the PNG goes.
        images: N images as for `draw_similarity`; only those shown are looked at.
        labels: N names of classes.
        rows: images to look for.
        depth: images found for each.
        seed: of the draw.

    Returns:
        `path`.

    Raises:
        ValueError: fewer than two images, or inputs of other lengths.
    """
    _check(features, images, labels)
    chosen = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))[:rows]
    found = retrieve(features[chosen], features, depth + 1)
    with settings():
        page = Page(40 + _LABEL + (depth + 1) * _STEP, _TOP + len(chosen) * _ROW)
        for row, image in enumerate(chosen.tolist()):
            # An image is always most similar to itself, or one of several equal ones is.
            pairs = zip(found.indices[row].tolist(), found.scores[row].tolist(), strict=True)
            others = [(other, score) for other, score in pairs if other != image][:depth]
            _draw_row(page, _TOP + row * _ROW, image, others, images, labels)
        _draw_headings(page, depth)
        return save_figure(page.figure, path)


def _draw_headings(page: Page, depth: int) -> None:
    title = "Held-out images and the most similar ones among them"
    page.text(20, 28, title, size=14, weight="bold")
    legend = "green: same class · grey: another class · number: cosine similarity"
    page.text(20, 54, legend, size=9.5, color=PALE)


def _draw_row(
    page: Page,
    y: float,
    image: int,
    others: Sequence[tuple[int, float]],
    images: Sequence[Picture],
    labels: Sequence[str],
) -> None:
    page.image(20, y, _THUMB, images[image])
    page.text(110, y + _THUMB / 2, labels[image], size=10.5, width=_LABEL - 16)
    for place, (other, score) in enumerate(others):
        x, right = 110 + _LABEL + place * _STEP, labels[other] == labels[image]
        page.image(x + 4, y + 4, _THUMB - 8, images[other])
        page.frame(x, y, _THUMB, _THUMB, RIGHT if right else WRONG, line=4 if right else 1.5)
        page.text(x + _THUMB / 2, y + _THUMB + 13, f"{score:.2f}", size=9, align="center",
                  color=RIGHT if right else PALE)  # fmt: skip


def _check(features: Tensor, images: Sequence[object], labels: Sequence[str]) -> None:
    if len(features) < 2:
        raise ValueError(f"features: expected 2 rows or more, got {len(features)}; pass a set")
    for name, values in (("images", images), ("labels", labels)):
        if len(values) != len(features):
            raise ValueError(
                f"{name}: expected {len(features)}, one a row of features, got {len(values)}; "
                "pass the data that the features were made from"
            )
