"""Held-out queries looking for their document among all held-out documents.

N queries, M documents, D feature width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
from torch import Tensor, nn

from gradcache_clip.train.config import Config, EvaluationConfig
from gradcache_clip.train.data.text_lines import read_all_texts
from gradcache_clip.train.evaluation.embed import embed_dataset
from gradcache_clip.train.evaluation.features import unit
from gradcache_clip.train.evaluation.held_out import evaluating
from gradcache_clip.train.evaluation.recall import DirectionMetrics, recall_of_queries
from gradcache_clip.train.evaluation.sharding import interleave, shard_batches
from gradcache_clip.train.peers import Peers
from gradcache_clip.train.precision import autocast
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
        name = "query_to_document"
        scalars = {
            f"{name}_median_rank": whole.median_rank,
            f"{name}_mean_rank": whole.mean_rank,
        }
        for k, share in whole.recall.items():
            scalars[f"{name}_recall_at_{k}"] = share
            scalars[f"{name}_recall_at_{k}_chance"] = whole.chance[k]
        for width, found in shorter:
            for k, share in found.recall.items():
                scalars[f"{name}_recall_at_{k}_of_{width}_numbers"] = share
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
    """

    query_features: Tensor
    document_features: Tensor
    queries: list[str]
    documents: list[str]
    query_ids: Tensor
    widths: Sequence[int] = ()

    @property
    def document_ids(self) -> Tensor:
        """(M,), from 0."""
        return torch.arange(len(self.documents))

    def scalars(self, evaluation: EvaluationConfig) -> dict[str, float]:
        """What is logged of it."""
        return self.metrics(evaluation.recall_at).to_scalars()

    def metrics(self, ks: Iterable[int]) -> TextMetrics:
        """Recall@k of the queries, for prefixes of every width."""
        depths, whole = tuple(ks), self.query_features.shape[1]
        widths = sorted({whole, *self.widths}, reverse=True)
        return TextMetrics({width: self._of_prefix(width, depths) for width in widths})

    def _of_prefix(self, width: int, ks: tuple[int, ...]) -> DirectionMetrics:
        queries, documents = (
            unit(features[:, :width]) for features in (self.query_features, self.document_features)
        )
        return recall_of_queries(queries, self.query_ids, documents, self.document_ids, ks=ks)


def embed_held_out_texts(
    encoder: nn.Module, tokenizer: Tokenizer, config: Config, peers: Peers | None = None
) -> HeldOutTexts | None:
    """Embed every validation query and every different document once, in evaluation mode.

    Each row is a query of its own with one right document: where a query stands in several rows,
    the documents of the others count as wrong. Hard negatives are not read. Several processes embed
    a batch in turn, and all of them call this function.

    Args:
        encoder: called as `encoder(tower, inputs)`.
        tokenizer, config: of the run.
        peers: the processes; this one alone when None.

    Returns:
        The features, on the first process; None on the others.

    Raises:
        FileNotFoundError, ValueError: the validation set is missing, empty or broken.
    """
    peers, data = peers or Peers(), config.data
    rows = [
        *read_all_texts(
            data.validation,
            data.text_fields[:2],
            prompts=data.text_prompts,
            max_broken_share=data.max_broken_share,
        )
    ]
    queries = [query for query, _ in rows]
    numbers = {document: n for n, document in enumerate(dict.fromkeys(d for _, d in rows))}
    embed = partial(_embedded, encoder, tokenizer, config, peers)
    asked, found = embed(_QUERY, queries), embed(_DOCUMENT, [*numbers])
    if asked is None or found is None:
        return None
    ids = torch.tensor([numbers[document] for _, document in rows])
    return HeldOutTexts(asked, found, queries, [*numbers], ids, config.loss.matryoshka)


def _embedded(
    encoder: nn.Module,
    tokenizer: Tokenizer,
    config: Config,
    peers: Peers,
    tower: int,
    texts: Sequence[str],
) -> Tensor | None:
    """The features of texts in their order, on the first process; texts of like length together."""
    device, size = next(encoder.parameters()).device, config.evaluation.batch_size
    order = sorted(range(len(texts)), key=lambda number: len(texts[number]))

    def batches() -> Iterator[dict[str, Tensor]]:
        left = iter(order)
        while chosen := [texts[number] for number in islice(left, size)]:
            yield tokenizer(chosen)

    mine = (
        {name: tensor.to(device) for name, tensor in tokens.items()}
        for tokens in shard_batches(batches(), peers)
    )
    with evaluating(encoder), autocast(config.train.precision, device):
        (features,) = embed_dataset(
            partial(encoder, tower), mine, description="texts", progress=peers.is_first
        )
    collected = peers.gather_to_rank0(features.float().cpu())
    if not peers.is_first:
        return None
    return interleave(collected, size, len(texts))[torch.tensor(order).argsort()]
