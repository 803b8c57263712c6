"""The similarity matrix of a batch, with its images and captions along the edges."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import normalize

from gradcache_clip.train.evaluation.features import (
    Features,
    one_vector_each,
    scores_of,
    unit,
)
from gradcache_clip.train.evaluation.ranking import check_features, check_sizes
from gradcache_clip.train.report.canvas import INK, PALE, Page, save_figure, settings

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from gradcache_clip.train.report.canvas import Picture

_MOST_PAIRS = 48
_WRONG_PICK = "#e8590c"
# Margins around the matrix, and the length of a caption on its slope, in pixels.
_LEFT, _TOP, _RIGHT, _BOTTOM = 84, 250, 150, 78
_SLANTED = 195
# The headings need this much.
_NARROWEST = 840


def draw_similarity(
    image_features: Features,
    text_features: Features,
    captions: Sequence[str],
    images: Sequence[Picture],
    path: str | Path,
    *,
    of: str = "Pairs of a batch",
) -> Path:
    """Cosine similarity of every image (row) with every caption (column) of a batch.

    Pairs are ordered so that similar ones are neighbours: the diagonal holds the right pairs, and
    blocks beside it the look-alikes. Each row's best caption is marked.

    Args:
        image_features, text_features: row i of both belongs together; normalised here. Of tokens
            the scores are those of images that look for texts.
        captions: B texts; clipped where long.
        images: B images of any size: PIL images, uint8 arrays (height, width, 3), or tensors
            (1, 3 or 4, height, width), uint8 or float from 0 to 1.
        path: where the PNG goes.
        of: what the pairs are, for the line below the title.

    Returns:
        `path`.

    Raises:
        ValueError: fewer than 2 or more than 48 pairs, inputs of other lengths, NaN or infinite
            features.
    """
    _check(image_features, text_features, captions, images)
    images_unit, texts_unit = unit(image_features), unit(text_features)
    order = neighbours_together(one_vector_each(images_unit) + one_vector_each(texts_unit))
    scores = scores_of(images_unit[order], texts_unit[order])
    with settings():
        cell = min(30, 900 // len(order))
        page = _draw_page(scores, cell, of)
        for place, pair in enumerate(order.tolist()):
            middle = place * cell + cell / 2
            page.image(_LEFT - cell - 4, _TOP + place * cell + 1, cell - 2, images[pair])
            page.text(
                _LEFT + middle + 5, _TOP - 7, captions[pair],
                size=8.5, width=_SLANTED, rotation=60,
            )  # fmt: skip
        return save_figure(page.figure, path)


def _draw_page(scores: Tensor, cell: int, of: str) -> Page:
    """Heat map, marks, colour bar and headings; the edges are left to the caller."""
    count = len(scores)
    side = count * cell
    page = Page(max(_NARROWEST, _LEFT + side + _RIGHT), _TOP + side + _BOTTOM)
    low = float(scores.quantile(0.02))
    box = (_LEFT, _LEFT + side, _TOP + side, _TOP)
    limits = page.axes.get_xlim(), page.axes.get_ylim()
    heat = page.axes.imshow(
        scores.numpy(), extent=box, cmap="Blues", vmin=low, vmax=float(scores.max()),
        interpolation="nearest", aspect="auto",
    )  # fmt: skip
    page.axes.set(xlim=limits[0], ylim=limits[1])
    page.frame(_LEFT, _TOP, side, side, PALE)
    right = _mark_best(page, scores, cell)
    share = f"{right} of {count} images are closest to their own caption"
    page.text(20, 30, f"{share} (guessing: 1)", size=14, weight="bold")
    about = f"{of}: each image (row) with each caption (column); right pairs lie on the diagonal"
    page.text(20, 56, f"{about}, similar pairs side by side", size=9.5, color=PALE)
    _draw_legend(page, _TOP + side + 24)
    width, height = page.figure.get_size_inches() * page.figure.dpi
    place = ((_LEFT + side + 24) / width, 1 - (_TOP + min(side, 400)) / height)
    bar_axes = page.figure.add_axes((*place, 16 / width, min(side, 400) / height))
    page.figure.colorbar(heat, cax=bar_axes, label="cosine similarity")
    return page


def _mark_best(page: Page, scores: Tensor, cell: int) -> int:
    """A dot in right picks, a frame around wrong ones; counts the right ones."""
    best = scores.argmax(1).tolist()
    for row, column in enumerate(best):
        x, y = _LEFT + column * cell, _TOP + row * cell
        if row == column:
            page.axes.plot(x + cell / 2, y + cell / 2, "o", color="white", ms=cell / 6)
        else:
            page.frame(x + 1.5, y + 1.5, cell - 3, cell - 3, _WRONG_PICK, line=2)
    return sum(row == column for row, column in enumerate(best))


def _draw_legend(page: Page, y: float) -> None:
    page.bar(_LEFT, y - 8, 16, 16, "#2171b5")
    page.axes.plot(_LEFT + 8, y, "o", color="white", ms=4)
    page.text(_LEFT + 24, y, "closest caption is the right one", size=9.5, color=INK)
    page.frame(_LEFT + 1, y + 17, 14, 14, _WRONG_PICK, line=2)
    page.text(_LEFT + 24, y + 24, "closest caption is a wrong one", size=9.5, color=INK)


def neighbours_together(features: Float[Tensor, "b d"]) -> Int[Tensor, " b"]:
    """An order in which similar rows are close: sorted along the Fiedler vector of their graph.

    Source:
        Atkins, Boman and Hendrickson 1998 (spectral seriation).
    """
    unit = normalize(features.double(), dim=1)
    weights = (unit @ unit.T).clamp_min(0)
    laplacian = weights.sum(1).diag() - weights
    return torch.linalg.eigh(laplacian).eigenvectors[:, 1].argsort()


def _check(
    image_features: Features,
    text_features: Features,
    captions: Sequence[str],
    images: Sequence[Picture],
) -> None:
    check_features("image_features", image_features, _MOST_PAIRS)
    check_features("text_features", text_features, _MOST_PAIRS)
    check_sizes("image_features", image_features, "text_features", text_features)
    count = len(image_features)
    if not 2 <= count <= _MOST_PAIRS:
        raise ValueError(
            f"image_features: expected 2 to {_MOST_PAIRS} rows, got {count}; "
            f"draw a part of the batch, e.g. its first 32 pairs"
        )
    for name, values in (
        ("text_features", text_features),
        ("captions", captions),
        ("images", images),
    ):
        if len(values) != count:
            raise ValueError(
                f"{name}: expected {count}, one a row of image_features, got {len(values)}; "
                "pass the same pairs in the same order"
            )
