"""Evaluation of held-out texts: retrieval of each query's document among all documents.

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
    """Retrieval of documents by queries, for several widths of feature prefixes."""

    by_width: Mapping[int, DirectionMetrics]
    """Widest first."""

    def to_scalars(self) -> dict[str, float]:
        """Return metrics as `query_to_document_recall_at_1`, `..._at_1_of_64_numbers`, ..."""
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
        documents: M distinct texts.
        query_ids: (N,), index of each query's document.
        widths: of the feature prefixes to evaluate, in addition to D.
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
        """Ids (M,) of the documents: their indices."""
        return torch.arange(len(self.documents))

    def scalars(self) -> dict[str, float]:
        """Return recall and ranks by name, for the log."""
        return self.metrics().to_scalars()

    def metrics(self) -> TextMetrics:
        """Compute recall@k of the queries for prefixes of every width."""
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
    """Embed every query and every distinct document once, in evaluation mode.

    Each row is one query with one correct document: if the same query occurs in several rows, each
    row counts the other rows' documents as wrong. Called by all processes of `options.peers`
    together.

    Args:
        encoder: called as `encoder(tower, inputs)`.
        tokenizer: texts -> inputs of a tower.
        rows: (query, document).
        options: batch size, precision and processes.
        widths, recall_at: see `HeldOutTexts`.

    Returns:
        The features on rank 0, None on other ranks.

    Raises:
        ValueError: there are no rows.
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
    """Embed texts in batches of similar length; returns features in the order of the texts."""
    order = sorted(range(len(texts)), key=lambda number: len(texts[number]))
    ordered = [texts[number] for number in order]
    parts = embed_rows(encoder, ordered, tokenizer, options, tower=tower, description="texts")
    return None if parts is None else parts[0].float()[torch.tensor(order).argsort()]
