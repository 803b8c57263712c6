"""Held-out queries, each to find its document among all held-out documents.

N queries, M documents, D feature width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from gradcache_clip.train.evaluation.embed import EmbedOptions, embed_rows
from gradcache_clip.train.evaluation.features import unit
from gradcache_clip.train.evaluation.recall import DirectionMetrics, recall_of_queries

if TYPE_CHECKING:
    from gradcache_clip.train.tokenizer import Tokenizer

_QUERY, _DOCUMENT = 0, 1


@dataclass(frozen=True)
class TextMetrics:
    """How well queries find their document, by the width of the prefix that is compared."""

    by_width: Mapping[int, DirectionMetrics]
    """Widest first."""

    def to_scalars(self) -> dict[str, float]:
        """Names for a log: `query_to_document_recall_at_1`, `..._at_1_of_64_numbers`, ..."""
        (_, whole), *shorter = self.by_width.items()
        scalars = whole.to_scalars("query_to_document")
        for width, found in shorter:
            for k, share in found.recall.items():
                scalars[f"query_to_document_recall_at_{k}_of_{width}_numbers"] = share
        return scalars


@dataclass(frozen=True)
class HeldOutTexts:
    """Features of a validation set of texts.

    Args:
        query_features, document_features: (N, D) and (M, D), fp32, on the CPU, not normalised.
        queries: N texts.
        documents: M different texts.
        query_ids: (N,), the number of the document that each query belongs to.
        widths: of the prefixes that are compared, beside D.
        recall_at: depths k of recall@k.
    """

    query_features: Tensor
    document_features: Tensor
    queries: list[str]
    documents: list[str]
    query_ids: Tensor
    widths: Sequence[int] = ()
    recall_at: Sequence[int] = (1, 5, 10)

    @property
    def document_ids(self) -> Tensor:
        """(M,), from 0."""
        return torch.arange(len(self.documents))

    def scalars(self) -> dict[str, float]:
        """Recall and ranks for the log."""
        return self.metrics().to_scalars()

    def metrics(self) -> TextMetrics:
        """Recall@k of the queries, for prefixes of every width."""
        widths = sorted({self.query_features.shape[1], *self.widths}, reverse=True)
        return TextMetrics({width: self._of_prefix(width) for width in widths})

    def _of_prefix(self, width: int) -> DirectionMetrics:
        queries, documents = (
            unit(features[:, :width]) for features in (self.query_features, self.document_features)
        )
        return recall_of_queries(
            queries, self.query_ids, documents, self.document_ids, ks=self.recall_at
        )


def embed_held_out_texts(
    encoder: nn.Module,
    tokenizer: Tokenizer,
    rows: Iterable[Sequence[str]],
    options: EmbedOptions,
    *,
    widths: Sequence[int] = (),
    recall_at: Sequence[int] = (1, 5, 10),
) -> HeldOutTexts | None:
    """Embed every query and every different document once, in evaluation mode.

    Each row is a query of its own with one right document: where a query stands in several rows,
    the documents of the others count as wrong. All processes of `options.peers` call this function
    together.

    Args:
        encoder: called as `encoder(tower, inputs)`.
        tokenizer: texts -> inputs of a tower.
        rows: (query, document).
        options: batch size, precision and processes.
        widths, recall_at: see `HeldOutTexts`.

    Returns:
        The features on rank 0, None on the others.

    Raises:
        ValueError: no rows.
    """
    pairs = [*rows]
    queries, right = [query for query, _ in pairs], [document for _, document in pairs]
    numbers = {document: number for number, document in enumerate(dict.fromkeys(right))}
    documents = [*numbers]
    query_features = _embed(encoder, tokenizer, queries, options, tower=_QUERY)
    document_features = _embed(encoder, tokenizer, documents, options, tower=_DOCUMENT)
    if query_features is None or document_features is None:
        return None
    ids = torch.tensor([numbers[document] for document in right])
    return HeldOutTexts(
        query_features, document_features, queries, documents, ids, widths, recall_at
    )


def _embed(
    encoder: nn.Module,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    options: EmbedOptions,
    *,
    tower: int,
) -> Tensor | None:
    """Features in the order of the texts; texts of similar length share a batch."""
    order = sorted(range(len(texts)), key=lambda number: len(texts[number]))
    ordered = [texts[number] for number in order]
    parts = embed_rows(encoder, ordered, tokenizer, options, tower=tower, description="texts")
    return None if parts is None else parts[0].float()[torch.tensor(order).argsort()]
