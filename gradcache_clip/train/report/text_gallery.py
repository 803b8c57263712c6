"""Queries with their best documents, the right one framed: text retrieval as a person sees it."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from gradcache_clip.train.evaluation.features import unit
from gradcache_clip.train.report.canvas import PALE, RIGHT, Page, save_figure, settings
from gradcache_clip.train.report.gallery import Answers, best_answers, elsewhere

if TYPE_CHECKING:
    from gradcache_clip.train.evaluation.held_out_texts import HeldOutTexts

_TOP, _ROW, _LINE = 116, 122, 20
_QUERY, _DOCUMENT, _GAP = 430, 520, 40
_QUERY_LINES, _QUERY_SIGNS = 4, 50


def draw_text_gallery(
    held_out: HeldOutTexts, path: str | Path, *, rows: int = 6, depth: int = 5, seed: int = 0
) -> Path:
    """Queries on the left, their best documents on the right, by cosine similarity.

    Queries are drawn at random, not chosen to look well. The right document is framed in green;
    where it is not shown, its rank is.

    Args:
        held_out: features and texts.
        path: where the PNG goes.
        rows: queries.
        depth: documents of each query, at most 5.
        seed: of the draw.

    Returns:
        `path`.

    Raises:
        ValueError: `rows` or `depth` out of range.
    """
    if rows < 1 or not 1 <= depth <= 5:
        raise ValueError(
            f"rows, depth: expected 1 or more and 1 to 5, got {rows} and {depth}; "
            "pass e.g. rows=6, depth=5"
        )
    answers = best_answers(
        unit(held_out.query_features), held_out.query_ids,
        unit(held_out.document_features), held_out.document_ids,
        rows=rows, depth=depth, generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    with settings():
        width = 20 + _QUERY + _GAP + _DOCUMENT + 70
        page = Page(width, _TOP + len(answers) * _ROW + 8)
        _draw_headings(page, answers, depth)
        for row, each in enumerate(answers):
            _draw_row(page, _TOP + row * _ROW, each, held_out)
        return save_figure(page.figure, path)


def _draw_headings(page: Page, answers: list[Answers], depth: int) -> None:
    right = sum(each.right[0] for each in answers)
    title = f"First answer right for {right} of {len(answers)} random held-out queries"
    page.text(20, 28, title, size=14, weight="bold")
    legend = "green: right document · grey: wrong document · number: cosine similarity"
    page.text(20, 54, legend, size=9.5, color=PALE)
    page.text(20, 94, "query", size=11, weight="bold")
    page.text(20 + _QUERY + _GAP, 94, f"best {depth} documents", size=11, weight="bold")


def _draw_row(page: Page, y: float, answers: Answers, held_out: HeldOutTexts) -> None:
    query = " ".join(held_out.queries[answers.query].split())
    lines = textwrap.wrap(query, _QUERY_SIGNS, max_lines=_QUERY_LINES, placeholder=" …")
    for number, line in enumerate(lines):
        page.text(20, y + 8 + number * _LINE, line, size=10.5, width=_QUERY)
    if not any(answers.right):
        page.text(20, y + 8 + len(lines) * _LINE, elsewhere(answers), size=8.5, color=PALE)
    left = 20 + _QUERY + _GAP
    found = zip(answers.found, answers.scores, answers.right, strict=True)
    for place, (document, score, right) in enumerate(found):
        height, color = y + 8 + place * _LINE, RIGHT if right else PALE
        if right:
            page.frame(left - 6, height - _LINE / 2, _DOCUMENT + 56, _LINE, RIGHT, line=2)
        page.text(left, height, f"{score:.2f}", size=9, color=color)
        page.text(left + 40, height, held_out.documents[document], size=10, width=_DOCUMENT - 4,
                  color=color)  # fmt: skip
