"""A MultiVectorEncoder of two small layers, and the library's scores, not rounded to fp32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from sentence_transformers import MultiVectorEncoder
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
from tiny_sentences import columns, tiny_model
from torch import Tensor, nn

SKIPLIST = ["Ġdot", "Ġmark"]
EXPANSION = {"strategy": "fixed", "length": 8, "token": "Ġsquare"}
_VECTORS = {"module_input_name": "token_embeddings", "module_output_name": "token_embeddings"}


def tiny_tokens(folder: Path, *, bare: bool = False, **options: Any) -> Any:
    """The same weights at every call, in fp64; `bare` leaves normalisation and mask to the loss."""
    if not (folder / "config.json").exists():
        tiny_model(folder)
    config = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    transformer = Transformer(str(folder), config_kwargs=config, **options)
    torch.manual_seed(5)
    narrow = Dense(32, 16, bias=False, activation_function=nn.Identity(), **_VECTORS)
    modules = [transformer, narrow]
    if not bare:
        modules += [Normalize(**_VECTORS), MultiVectorMask(SKIPLIST)]
    return MultiVectorEncoder(modules=modules, device="cpu").double()


def token_columns(model: Any, count: int = 2, rows: int = 9) -> list[dict[str, Any]]:
    """Queries, documents and columns of negatives, as the library's collator makes them."""
    made = []
    for index, texts in enumerate(columns(rows, count).values()):
        task = "document" if index else "query"
        made.append({**model.preprocess(texts, task=task), "task": task})
    return made


def exact_scores(
    queries: Tensor, documents: Tensor, queries_mask: Tensor, documents_mask: Tensor
) -> Tensor:
    """`colbert_scores`: (Q, B * N) of (Q, q, D) and (B, N, d, D)."""
    found = torch.einsum("aqh,bndh->abnqd", queries, documents)
    best = found.masked_fill(~documents_mask[None, :, :, None], -torch.inf).amax(-1)
    return (best * queries_mask[:, None, None]).sum(-1).flatten(1)


def exact_own_scores(
    queries: Tensor, documents: Tensor, queries_mask: Tensor, documents_mask: Tensor
) -> Tensor:
    """`colbert_kd_scores`: (B, N) of (B, q, D) and (B, N, d, D)."""
    rows = (each.split(1) for each in (queries, documents, queries_mask, documents_mask))
    return torch.cat([exact_scores(*each) for each in zip(*rows, strict=True)])


def exact_pair_scores(
    queries: Tensor, documents: Tensor, queries_mask: Tensor, documents_mask: Tensor
) -> Tensor:
    """`colbert_scores_pairwise`: (B,) of (B, q, D) and (B, d, D)."""
    return exact_own_scores(queries, documents[:, None], queries_mask, documents_mask[:, None])[
        :, 0
    ]


def mean_over_tokens(scores: Any) -> Any:
    """The mean over the tokens of a query in place of the sum."""

    def mean(queries: Tensor, *others: Tensor, queries_mask: Tensor, **masks: Tensor) -> Tensor:
        found = scores(queries, *others, queries_mask=queries_mask, **masks)
        counts = queries_mask.sum(1)
        return found / (counts[:, None] if found.ndim == 2 else counts)

    return mean
