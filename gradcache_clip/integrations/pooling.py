"""Pool hidden states to one vector per row. B rows, L tokens, D feature width."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from gradcache_clip.cache import PackedTokens

Pooling = Literal["last", "mean", "cls"]
"""The last token that the mask keeps, the mean of all that it keeps, or the first one."""


def pool(hidden: Tensor, mask: Tensor | None, pooling: Pooling) -> Tensor:
    """Pool (B, L, D) to (B, D) over the tokens that a mask (B, L) keeps, padded on either side.

    Without a mask every token counts.
    """
    kept = (hidden.new_ones(hidden.shape[:2]) if mask is None else mask).to(hidden.device).bool()
    if pooling == "mean":
        return hidden.masked_fill(~kept[..., None], 0).sum(1) / kept.sum(1, keepdim=True)
    column = torch.arange(kept.shape[1], device=kept.device)
    if pooling == "last":
        chosen = column.masked_fill(~kept, -1).amax(1)
    else:
        chosen = column.masked_fill(~kept, len(column)).amin(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), chosen]


def pooled_output(output: Any, inputs: Any, pooling: Pooling) -> dict[str, Tensor]:
    """Pool what a model returned; its 0-dim tensors, which are losses, stay beside the features.

    Raises:
        TypeError: the output has no `last_hidden_state`.
        ValueError: its tokens are not those of the mask.
    """
    hidden = output.get("last_hidden_state") if isinstance(output, Mapping) else None
    if not isinstance(hidden, Tensor):
        raise TypeError(
            f"pooling: expected a model whose output has last_hidden_state, got "
            f"{type(output).__name__}; load it with AutoModel, or let towers return its backbone, "
            "such as model.model"
        )
    mask = _mask_in(inputs)
    if hidden.ndim != 3 or (mask is not None and mask.shape != hidden.shape[:2]):
        got = "" if mask is None else f" and attention_mask {tuple(mask.shape)}"
        raise ValueError(
            f"pooling: expected hidden states (B, L, D) of the tokens of attention_mask (B, L), "
            f"got {tuple(hidden.shape)}{got}; leave pooling out, and pool in a method of the "
            "model that towers returns"
        )
    losses = {name: part for name, part in output.items() if _is_loss(part)}
    return {**losses, "sentence_embedding": pool(hidden, mask, pooling)}


def check_pooling(pooling: Any, rows: Any, get_features: Any) -> None:
    """Refuse other names, and packed sequences, of which several are one row of a model's output.

    Raises:
        ValueError: not a pooling, one of packed sequences, or one beside `get_features`.
    """
    if pooling is not None and pooling not in get_args(Pooling):
        raise ValueError(
            f"pooling: expected 'last', 'mean', 'cls' or None, got {pooling!r}; take 'last' for "
            "causal models"
        )
    if pooling and get_features is not None:
        raise ValueError(
            f"get_features: expected None with pooling={pooling!r}, which extracts the features, "
            "got a function; leave one of them out"
        )
    several = rows if isinstance(rows, (list, tuple)) else [rows]
    if pooling and any(isinstance(division, PackedTokens) for division in several):
        raise ValueError(
            "pooling: expected one row per sequence, got rows=PackedTokens(), of which a model "
            "returns all sequences in one row; leave pooling out, and pool by cu_seqlens in a "
            "method of the model that towers returns"
        )


def check_masks(batches: list[Any]) -> None:
    """Refuse rows without a token that could be pooled.

    Raises:
        ValueError: an attention mask has a row of zeros.
    """
    for index, inputs in enumerate(batches):
        mask = _mask_in(inputs)
        if mask is not None and mask.ndim == 2 and not bool(mask.bool().any(1).all()):
            row = int((~mask.bool().any(1)).nonzero()[0])
            raise ValueError(
                f"attention_mask of tower {index}: expected a token in every row, got zeros alone "
                f"in row {row}; leave the row out of the batch"
            )


def entries_of_batch(model: Any, batch: Any) -> list[tuple[Callable[..., Any], Any]]:
    """Return one tower per entry of a batch: the model, and the arguments in the entry.

    Raises:
        ValueError: an entry holds something other than arguments of the model.
    """
    if not all(isinstance(entry, Mapping) for entry in batch.values()):
        raise ValueError(
            "batch: expected one dict of the model's arguments per tower, such as {'query': "
            "{'input_ids': ..., 'attention_mask': ...}, 'document': {...}}, got "
            f"{', '.join(batch)}; nest it in the data collator, or pass towers=function"
        )
    return [(model, entry) for entry in batch.values()]


def _mask_in(inputs: Any) -> Tensor | None:
    return inputs.get("attention_mask") if isinstance(inputs, Mapping) else None


def _is_loss(part: Any) -> bool:
    return isinstance(part, Tensor) and part.dim() == 0 and part.is_floating_point()
