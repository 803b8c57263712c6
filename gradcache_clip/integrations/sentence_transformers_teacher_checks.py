"""Checks what a guide or a teacher gives to the losses for sentence-transformers.

b rows of a column.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase


def guide_needs_own_tokens(model: nn.Module, guide: Any) -> bool:
    """Whether texts are tokenized again for the guide; raises if they cannot be."""
    if not isinstance(guide, nn.Module):
        raise TypeError(
            f"guide: expected a SentenceTransformer, got {guide!r}; such as "
            "SentenceTransformer('sentence-transformers/all-MiniLM-L6-v2')"
        )
    vocabularies = [_vocabulary(name, of) for name, of in (("model", model), ("guide", guide))]
    shorter = guide.max_seq_length < model.max_seq_length  # type: ignore[operator]
    return bool(shorter) or vocabularies[0] != vocabularies[1]


def _vocabulary(name: str, model: nn.Module) -> dict[str, int]:
    tokenizer = getattr(model, "tokenizer", None)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(
            f"{name}: expected one with a tokenizer of transformers, got "
            f"{type(tokenizer).__name__}; the guide reads tokens of the model, or decodes them"
        )
    return tokenizer.get_vocab()


def token_rows(features: Mapping[str, Any]) -> list[Tensor]:
    """Return the token ids of each row; raise ValueError where they are not known."""
    ids, bounds = features.get("input_ids"), features.get("cu_seq_lens_q")
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        raise ValueError(
            f"guide: expected texts, to tokenize them again, got {[*features]}; take a guide with "
            "the vocabulary of the model and at least its max_seq_length"
        )
    return [*ids] if bounds is None else [*ids[0].tensor_split(bounds[1:-1].cpu())]


def scores_of(labels: Any, rows: int, candidates: int) -> Tensor:
    """Return scores (b, candidates) of a batch."""
    scores = _floating(labels)
    if tuple(scores.shape) != (rows, candidates):
        raise ValueError(_expected(rows, candidates, labels))
    return scores


def margins_of(labels: Any, rows: int, candidates: int) -> Tensor:
    """Return scores (b, candidates) of labels that may be differences from the first one."""
    scores = _floating(labels)
    if scores.ndim == 1:
        scores = scores[:, None]
    if tuple(scores.shape) == (rows, candidates - 1):
        return torch.cat((torch.zeros_like(scores[:, :1]), -scores), 1)
    if tuple(scores.shape) != (rows, candidates):
        further = f", or ({rows}, {candidates - 1}) differences from the first"
        raise ValueError(_expected(rows, candidates, labels, further))
    return scores


def _floating(labels: Any) -> Tensor:
    if not isinstance(labels, Tensor):
        raise TypeError(
            f"labels: expected a tensor of scores, got {type(labels).__name__}; give the dataset "
            "a column named label"
        )
    return labels.detach() if labels.is_floating_point() else labels.detach().float()


def _expected(rows: int, candidates: int, labels: Tensor, further: str = "") -> str:
    return (
        f"labels: expected ({rows}, {candidates}) scores, of the positive and of each "
        f"negative{further}, got shape {tuple(labels.shape)}; score each row of the dataset"
    )
