"""Draws samples with their matches: similarity matrix, galleries of queries, neighbours."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from gradcache_clip.train.evaluation.features import one_vector_each, scores_of, unit
from gradcache_clip.train.evaluation.ranking import ranks_of_best_right
from gradcache_clip.train.evaluation.recall import retrieve
from gradcache_clip.train.report.style import (
    INK,
    PALE,
    RIGHT,
    WRONG,
    new_figure,
    save_figure,
    settings,
    short,
    write_head,
)

if TYPE_CHECKING:
    import numpy
    from jaxtyping import Float, Int
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from gradcache_clip.train.evaluation.features import Features
    from gradcache_clip.train.evaluation.held_out import HeldOut
    from gradcache_clip.train.evaluation.held_out_texts import HeldOutTexts
    from gradcache_clip.train.evaluation.labelled import LabelledImages

SIMILARITY_PAIRS = 40
_WRONG_PICK = "#e8590c"
_ROW = 124
_LEGEND = "green: right answer · grey: wrong answer · number:"


def draw_similarity(pairs: HeldOut, path: str | Path, *, of: str = "Held-out pairs") -> Path:
    """Draw the cosine similarity of up to 40 images (rows) with their captions (columns).

    Takes a random image of each group, so only the diagonal is right. Similar pairs are adjacent:
    blocks around the diagonal are look-alikes. Marks the best caption of each row. For token
    features, scores are image to text.

    Args:
        pairs: images of at least two groups.
        path: of the PNG.
        of: describes the pairs in the legend.

    Returns:
        `path`.
    """
    images = _images_of_different_groups(pairs)
    texts = [int((pairs.text_ids == pairs.image_ids[image]).nonzero()[0]) for image in images]
    image_side, text_side = unit(pairs.image_features[images]), unit(pairs.text_features[texts])
    order = neighbours_together(one_vector_each(image_side) + one_vector_each(text_side))
    scores = scores_of(image_side[order], text_side[order])
    side = min(30, 900 // len(order)) * len(order)
    with settings():
        figure = new_figure(max(840, side + 240), side + 300)
        axes = figure.subplots()
        # The scale starts at a quantile: a few low outliers would wash out the colours.
        heat = axes.imshow(scores.numpy(), cmap="Blues", vmin=float(scores.quantile(0.02)))
        figure.colorbar(heat, label="cosine similarity", shrink=0.5, anchor=(0, 1))
        captions = [short(pairs.texts[texts[pair]], 30) for pair in order.tolist()]
        _label_pairs(axes, captions, pairs.thumbnails[images][order])
        right = _mark_best(axes, scores, size=side / len(order))
        title = f"{right} of {len(order)} images are closest to their own caption"
        legend = (
            f"{of}: each image (row) with each caption (column); right pairs lie on the diagonal, "
            "similar pairs side by side"
        )
        write_head(figure, f"{title} (chance: 1)", legend)
        return save_figure(figure, path)


def _images_of_different_groups(pairs: HeldOut) -> list[int]:
    order = torch.randperm(len(pairs.image_ids), generator=torch.Generator().manual_seed(0))
    first_of: dict[int, int] = {}
    for row in order.tolist():
        first_of.setdefault(int(pairs.image_ids[row]), row)
    return list(first_of.values())[:SIMILARITY_PAIRS]


def neighbours_together(features: Float[Tensor, "b d"]) -> Int[Tensor, " b"]:
    """Order rows so that similar ones are adjacent, by the Fiedler vector of their graph.

    Source:
        Atkins, Boman and Hendrickson 1998 (spectral seriation).
    """
    rows = normalize(features.double(), dim=1)
    weights = (rows @ rows.T).clamp_min(0)
    laplacian = weights.sum(1).diag() - weights
    return torch.linalg.eigh(laplacian).eigenvectors[:, 1].argsort()


def _label_pairs(axes: Axes, captions: list[str], thumbnails: Tensor) -> None:
    """Write captions above the columns, and show images left of the rows."""
    count = len(captions)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    slanted: dict[str, Any] = {"rotation": 60, "ha": "left", "rotation_mode": "anchor"}
    axes.set_xticks(range(count), captions, fontsize=8.5, **slanted)
    axes.set_yticks([])
    strip = axes.inset_axes((-1.2 / count, 0, 1 / count, 1))
    strip.imshow(_pixels(torch.cat([*thumbnails], dim=1)), aspect="auto")
    strip.axis("off")


def _mark_best(axes: Axes, scores: Tensor, *, size: float) -> int:
    """Mark right picks by a dot and wrong ones by a frame; returns the number of right ones."""
    best = scores.argmax(1).tolist()
    right = [row for row, column in enumerate(best) if row == column]
    wrong = [row for row, column in enumerate(best) if row != column]
    axes.scatter(right, right, s=1.5 * size, c="white", edgecolors=INK, linewidths=0.4,
                 label="closest caption is the right one")  # fmt: skip
    axes.scatter([best[row] for row in wrong], wrong, s=(0.6 * size) ** 2, marker="s", c="none",
                 edgecolors=_WRONG_PICK, linewidths=1.5,
                 label="closest caption is a wrong one")  # fmt: skip
    axes.legend(loc="upper left", bbox_to_anchor=(0, 0), frameon=False, fontsize=9, markerscale=0.8)
    return len(right)


class Answers(NamedTuple):
    """Best candidates of one query."""

    query: int
    found: list[int]
    scores: list[float]
    right: list[bool]
    rank: int
    """Rank of the first right candidate."""

    @property
    def columns(self) -> tuple[list[int], list[float], list[bool]]:
        return self.found, self.scores, self.right

    @property
    def elsewhere(self) -> str:
        """Text that gives the rank of the right candidate, if it is not shown."""
        return "" if any(self.right) else f"right: rank {self.rank:,}"


def draw_gallery(
    held_out: HeldOut, path: str | Path, *, rows: int = 6, depth: int = 5, seed: int = 0
) -> Path:
    """Draw captions with their best images (left), and images with their best captions (right).

    Queries are random, not hand-picked. Right answers have a green frame; if none is shown, the
    rank of the first one is given.

    Args:
        held_out: features, images and texts.
        path: of the PNG.
        rows: number of queries of each kind.
        depth: answers per query.
        seed: of the random choice.

    Returns:
        `path`.
    """
    images = held_out.image_features, held_out.image_ids
    texts = held_out.text_features, held_out.text_ids
    generator = torch.Generator().manual_seed(seed)
    by_text = best_answers(*texts, *images, rows=rows, depth=depth, generator=generator)
    by_image = best_answers(*images, *texts, rows=rows, depth=depth, generator=generator)
    with settings():
        widths = (2, *[1] * depth, 1.4, 4.2)
        figure, grid = _grid(max(len(by_text), len(by_image)), widths)
        write_head(figure, _finding(by_text + by_image), f"{_LEGEND} similarity")
        _head_column(grid[0][0], f"caption → best {depth} images")
        _head_column(grid[0][-2], f"image → best {depth} captions")
        for row, answers in zip(grid, by_text, strict=False):
            _write_query(row[0], held_out.texts[answers.query], answers, width=20)
            for axes, image, score, right in zip(row[1:], *answers.columns, strict=False):
                _show_answer(axes, held_out.thumbnails[image], score, right)
        for row, answers in zip(grid, by_image, strict=False):
            row[-2].imshow(_pixels(held_out.thumbnails[answers.query]))
            style: dict[str, Any] = {"ha": "center", "va": "top", "color": PALE, "fontsize": 9}
            row[-2].text(0.5, -0.05, answers.elsewhere, transform=row[-2].transAxes, **style)
            _write_answers(row[-1], held_out.texts, answers, length=46)
        return save_figure(figure, path)


def draw_text_gallery(
    held_out: HeldOutTexts, path: str | Path, *, rows: int = 6, depth: int = 5, seed: int = 0
) -> Path:
    """Draw queries on the left, their best documents by cosine similarity on the right.

    Arguments and frames as for `draw_gallery`.
    """
    queries = unit(held_out.query_features), held_out.query_ids
    documents = unit(held_out.document_features), held_out.document_ids
    generator = torch.Generator().manual_seed(seed)
    found = best_answers(*queries, *documents, rows=rows, depth=depth, generator=generator)
    with settings():
        figure, grid = _grid(len(found), (4.5, 6.2))
        write_head(figure, _finding(found), f"{_LEGEND} cosine similarity")
        _head_column(grid[0][0], "query")
        _head_column(grid[0][1], f"best {depth} documents")
        for (left, right), answers in zip(grid, found, strict=True):
            _write_query(left, held_out.queries[answers.query], answers, width=50)
            _write_answers(right, held_out.documents, answers, length=66)
        return save_figure(figure, path)


def draw_neighbours(
    held_out: LabelledImages, path: str | Path, *, rows: int = 6, depth: int = 6, seed: int = 0
) -> Path:
    """Draw random images, each with the other images whose features are most similar.

    Images of the same class have a green frame. Arguments as for `draw_gallery`.
    """
    features, labels = held_out.features, held_out.labels
    chosen = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))[:rows]
    found = retrieve(features[chosen], features, depth + 1)
    with settings():
        figure, grid = _grid(len(chosen), (1, 1.6, *[1] * depth))
        legend = "green: same class · grey: another class · number: cosine similarity"
        write_head(figure, "Held-out images and the most similar ones among them", legend)
        for row, image, scores, indices in zip(grid, chosen.tolist(), *found, strict=True):
            row[0].imshow(_pixels(held_out.thumbnails[image]))
            row[1].text(0, 0.5, short(labels[image], 18), va="center", clip_on=True)
            # Leave out the image itself, which is always most similar.
            others = indices != image
            answers = zip(indices[others].tolist(), scores[others].tolist(), strict=True)
            for axes, (other, score) in zip(row[2:], answers, strict=False):
                right = labels[other] == labels[image]
                _show_answer(axes, held_out.thumbnails[other], score, right)
        return save_figure(figure, path)


def best_answers(
    queries: Features, query_ids: Tensor, candidates: Features, candidate_ids: Tensor,
    *, rows: int, depth: int, generator: torch.Generator,
) -> list[Answers]:  # fmt: skip
    """Retrieve the best candidates of random queries."""
    chosen = torch.randperm(len(queries), generator=generator)[:rows]
    asked, asked_ids = queries[chosen], query_ids[chosen]
    found = retrieve(asked, candidates, depth)
    right = candidate_ids[found.indices] == asked_ids[:, None]
    ranks = ranks_of_best_right(asked, asked_ids, candidates, candidate_ids, tile=1024)
    columns = (chosen, found.indices, found.scores, right, ranks)
    return [Answers(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]


def _grid(rows: int, widths: Sequence[float]) -> tuple[Figure, list[list[Axes]]]:
    """Create a figure with rows of empty axes."""
    figure = new_figure(round(100 * sum(widths)), 110 + _ROW * rows)
    grid = figure.subplots(rows, len(widths), squeeze=False, width_ratios=widths)
    for axes in grid.flat:
        axes.axis("off")
    return figure, [list(row) for row in grid]


def _head_column(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontweight="bold", pad=10)


def _finding(found: list[Answers]) -> str:
    right = sum(answers.right[0] for answers in found)
    return f"First answer right for {right} of {len(found)} random held-out queries"


def _write_query(axes: Axes, text: str, answers: Answers, *, width: int) -> None:
    lines = textwrap.wrap(short(text, 4 * width), width, max_lines=4, placeholder=" …")
    style: dict[str, Any] = {"va": "top", "linespacing": 1.4, "clip_on": True}
    axes.text(0, 1, "\n".join(lines), **style)
    axes.text(0, 1, "\n" * len(lines) + answers.elsewhere, color=PALE, **style)


def _write_answers(axes: Axes, texts: Sequence[str], answers: Answers, *, length: int) -> None:
    from matplotlib.patches import Rectangle

    height = 1 / len(answers.found)
    for number, (text, score, right) in enumerate(zip(*answers.columns, strict=True)):
        middle = 1 - (number + 0.5) * height
        style: dict[str, Any] = {"color": RIGHT if right else PALE, "va": "center_baseline"}
        axes.text(0.02, middle, f"{score:.2f}", fontsize=9, **style)
        axes.text(0.12, middle, short(texts[text], length), clip_on=True, **style)
        if right:
            frame = Rectangle((0, middle - height / 2), 1, height, fill=False, ec=RIGHT, lw=1.5)
            axes.add_patch(frame).set_clip_on(False)


def _show_answer(axes: Axes, image: Tensor, score: float, right: bool) -> None:
    axes.axis("on")
    axes.imshow(_pixels(image))
    axes.set(xticks=[], yticks=[])
    axes.set_xlabel(f"{score:.2f}", fontsize=9, color=RIGHT if right else PALE)
    axes.spines[:].set(color=RIGHT if right else WRONG, linewidth=3 if right else 1)


def _pixels(image: Tensor) -> numpy.ndarray:
    return image.permute(1, 2, 0).numpy()
