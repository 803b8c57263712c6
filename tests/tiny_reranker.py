"""A small cross-encoder. Q queries of a batch, K candidates of each, L tokens."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from tiny_trainer import STEPS, TEXT
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

Q, K, L = 3, 4, 6
OFF = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def reranker(kind: Any = BertForSequenceClassification) -> Any:
    torch.manual_seed(1)
    return kind(BertConfig(**TEXT, **OFF, num_labels=1)).double()


def batches() -> list[dict[str, Any]]:
    """Pairs of one to L tokens, padded on the right."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(1, 39, (STEPS, Q * K, L), generator=generator)
    lengths = torch.randint(1, L + 1, (STEPS, Q * K, 1), generator=generator)
    masks = (torch.arange(L) < lengths).long()
    return [
        {"pairs": {"input_ids": x * mask, "attention_mask": mask}}
        for x, mask in zip(tokens, masks, strict=True)
    ]


def towers(model: nn.Module, batch: dict[str, Any]) -> list[tuple[Any, Any]]:
    return [(model, batch["pairs"])]


def listwise(model: nn.Module, scores: Tensor) -> Tensor:
    """The first candidate of a query is its answer."""
    by_query = scores.view(-1, K)
    return F.cross_entropy(by_query, torch.zeros(len(by_query), dtype=torch.long))
