"""Queries with their best answers, right ones framed: retrieval as a person sees it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gradcache_clip.train.evaluation.features import Features
from gradcache_clip.train.evaluation.ranking import ranks_of_best_right
from gradcache_clip.train.evaluation.recall import retrieve
from gradcache_clip.train.report.canvas import PALE, RIGHT, WRONG, Page, save_figure, settings

if TYPE_CHECKING:
    from jaxtyping import Int

    from gradcache_clip.train.report.canvas import Picture

_TOP, _ROW, _THUMB, _QUERY = 116, 118, 76, 190
_GAP, _CAPTIONS = 44, 330
_LINE = 20


@dataclass(frozen=True)
class Answers:
    """What one query found."""

    query: int
    found: list[int]
    scores: list[float]
    right: list[bool]
    rank: int


def draw_gallery(
    image_features: Features,
    text_features: Features,
    path: str | Path,
    *,
    images: Sequence[Picture],
    texts: Sequence[str],
    image_ids: Int[Tensor, " n"],
    text_ids: Int[Tensor, " m"],
    rows: int = 6,
    depth: int = 5,
    seed: int = 0,
) -> Path:
    """Text queries with their best images on the left, image queries with their best texts right.

    Queries are drawn at random, not chosen to look well. Right answers are framed in green; where
    none is shown, the rank of the first one is. Scores are dot products, so cosine similarities of
    normalised features.

    Args:
        image_features, text_features: normalised, on one device.
        path: where the PNG goes.
        images: N images as for `draw_similarity`; only those shown are looked at.
        texts: M texts.
        image_ids, text_ids: integers, equal where image and text belong together.
        rows: queries of each kind.
        depth: answers of each query, at most 5.
        seed: of the draw.

    Returns:
        `path`.

    Raises:
        ValueError: as for `recall_at_k`; inputs of other lengths; `rows` or `depth` out of range.
    """
    if rows < 1 or not 1 <= depth <= 5:
        raise ValueError(
            f"rows, depth: expected 1 or more and 1 to 5, got {rows} and {depth}; "
            "pass e.g. rows=6, depth=5"
        )
    check_lengths(len(image_features), images=images, image_ids=image_ids)
    check_lengths(len(text_features), texts=texts, text_ids=text_ids)
    generator = torch.Generator().manual_seed(seed)
    sides = (text_features, text_ids, image_features, image_ids)
    by_text = best_answers(*sides, rows=rows, depth=depth, generator=generator)
    by_image = best_answers(*sides[2:], *sides[:2], rows=rows, depth=depth, generator=generator)
    with settings():
        left = _QUERY + depth * (_THUMB + 14)
        height = _TOP + max(len(by_text), len(by_image)) * _ROW + 8
        page = Page(20 + left + _GAP + _THUMB + 22 + _CAPTIONS + 50, height)
        _draw_headings(page, left, by_text, by_image, depth)
        for row, answers in enumerate(by_text):
            _draw_text_query(page, _TOP + row * _ROW, answers, images, texts)
        for row, answers in enumerate(by_image):
            _draw_image_query(page, 20 + left + _GAP, _TOP + row * _ROW, answers, images, texts)
        return save_figure(page.figure, path)


def best_answers(
    queries: Features, query_ids: Tensor, candidates: Features, candidate_ids: Tensor,
    *, rows: int, depth: int, generator: torch.Generator,
) -> list[Answers]:  # fmt: skip
    chosen = torch.randperm(len(queries), generator=generator)[:rows].to(queries.device)
    query_ids, candidate_ids = query_ids.to(queries.device), candidate_ids.to(queries.device)
    asked, asked_ids = queries[chosen], query_ids[chosen]
    found = retrieve(asked, candidates, depth)
    right = candidate_ids[found.indices] == asked_ids[:, None]
    ranks = ranks_of_best_right(asked, asked_ids, candidates, candidate_ids, tile=1024)
    columns = (chosen, found.indices, found.scores, right, ranks)
    return [Answers(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]


def _draw_headings(
    page: Page, left: float, by_text: list[Answers], by_image: list[Answers], depth: int
) -> None:
    right = sum(answers.right[0] for answers in by_text + by_image)
    count = len(by_text) + len(by_image)
    title = f"First answer right for {right} of {count} random held-out queries"
    page.text(20, 28, title, size=14, weight="bold")
    legend = "green: right answer · grey: wrong answer · number: similarity"
    page.text(20, 54, legend, size=9.5, color=PALE)
    second = 20 + left + _GAP
    page.text(20, 94, f"caption → best {depth} images", size=11, weight="bold")
    page.text(second, 94, f"image → best {depth} captions", size=11, weight="bold")


def _draw_text_query(
    page: Page, y: float, answers: Answers, images: Sequence[Picture], texts: Sequence[str]
) -> None:
    middle = y + _THUMB / 2
    for line, part in enumerate(two_lines(texts[answers.query])):
        page.text(20, middle - 9 + 18 * line, part, size=10.5, width=_QUERY - 34)
    if not any(answers.right):
        page.text(20, middle + 32, elsewhere(answers), size=8.5, color=PALE)
    for place, (image, score, right) in enumerate(
        zip(answers.found, answers.scores, answers.right, strict=True)
    ):
        x = 20 + _QUERY + place * (_THUMB + 14)
        page.image(x + 4, y + 4, _THUMB - 8, images[image])
        page.frame(x, y, _THUMB, _THUMB, RIGHT if right else WRONG, line=4 if right else 1.5)
        page.text(x + _THUMB / 2, y + _THUMB + 13, f"{score:.2f}", size=9, align="center",
                  color=RIGHT if right else PALE)  # fmt: skip


def _draw_image_query(
    page: Page, x: float, y: float, answers: Answers, images: Sequence[Picture],
    texts: Sequence[str],
) -> None:  # fmt: skip
    page.image(x, y + 6, _THUMB, images[answers.query])
    if not any(answers.right):
        page.text(
            x + _THUMB / 2,
            y + _THUMB + 18,
            elsewhere(answers),
            size=8.5,
            color=PALE,
            align="center",
        )
    for place, (text, score, right) in enumerate(
        zip(answers.found, answers.scores, answers.right, strict=True)
    ):
        left, line = x + _THUMB + 22, y + 8 + place * _LINE
        if right:
            page.frame(left - 6, line - _LINE / 2, _CAPTIONS + 52, _LINE, RIGHT, line=2)
        page.text(left, line, f"{score:.2f}", size=9, color=RIGHT if right else PALE)
        page.text(left + 40, line, texts[text], size=10, width=_CAPTIONS,
                  color=RIGHT if right else PALE)  # fmt: skip


def elsewhere(answers: Answers) -> str:
    return f"right: rank {answers.rank:,}"


def two_lines(text: str) -> tuple[str, ...]:
    """Broken at the space nearest to the middle, where the text is long."""
    text = " ".join(text.split())
    spaces = [place for place, sign in enumerate(text) if sign == " "]
    if len(text) <= 20 or not spaces:
        return (text,)
    middle = min(spaces, key=lambda place: abs(place - min(len(text) / 2, 22)))
    return text[:middle], text[middle + 1 :]


def check_lengths(count: int, **named: Sequence[object] | Tensor) -> None:
    for name, values in named.items():
        if len(values) != count:
            raise ValueError(
                f"{name}: expected {count}, one a row of features, got {len(values)}; "
                "pass the data that the features were made from"
            )
