"""Outputs of an encoder: which tensors are features, and which are losses of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradcache_clip.cache.batch_errors import hint_at_lists
from gradcache_clip.cache.rounding import wide

_MODEL_OUTPUT_FIELDS = (
    *("image_embeds", "text_embeds", "audio_embeds"),
    *("sentence_embedding", "pooler_output"),
)

_REMEDY = (
    "give get_features a function that returns one row a sample, and pass inputs as tensors or "
    "lists; a loss of the encoder's own, of shape (), belongs at the top of a dict, weighted by "
    "auxiliary_losses"
)


class WithLosses(NamedTuple):
    """Features of some rows, and losses that the encoder returned beside them."""

    features: Any
    losses: dict[str, Tensor]
    """(rows,) each: a loss of a chunk stands in each of its rows, so that its mean over all rows
    weights chunks by their rows, and its gradient is cached as those of features are."""


def select(
    output: Any,
    get_features: Callable[[Any], Any] | None,
    weighted: Sequence[str],
    rows: int,
    name: str,
) -> Any:
    """Take features out of an encoder's output, and losses of the names in `weighted`.

    Raises:
        TypeError: a mapping without known features, or with a loss that has no weight.
    """
    chosen = output if get_features is None else get_features(output)
    losses = _losses_in([chosen, output], weighted, name)
    if isinstance(chosen, Mapping):
        _refuse_unweighted(chosen, weighted, name)
        if losses:
            chosen = {key: value for key, value in chosen.items() if key not in losses}
        if get_features is None:
            chosen = _known_features(output, chosen, name)
    if not losses:
        return chosen
    # In 32 bits at least, for the gradient of a row is that of the chunk over its rows.
    spread = {key: loss.to(wide(loss.dtype)).expand(rows) for key, loss in losses.items()}
    return WithLosses(chosen, spread)


def names_in(output: Any) -> tuple[str, ...]:
    """Keys of a dict of features, and names of losses: the same in every chunk."""
    features, losses = output if isinstance(output, WithLosses) else (output, {})
    return (*(map(str, features) if isinstance(features, dict) else ()), *losses)


def _losses_in(places: Iterable[Any], weighted: Iterable[str], name: str) -> dict[str, Tensor]:
    mappings, found = [place for place in places if isinstance(place, Mapping)], {}
    for key in weighted:
        given = [place[key] for place in mappings if place.get(key) is not None]
        if given:
            _check_loss(given[0], key, name)
            found[key] = given[0]
    return found


def _check_loss(loss: Any, key: str, name: str) -> None:
    if isinstance(loss, Tensor) and loss.dim() == 0 and loss.is_floating_point():
        return
    got = f"shape {tuple(loss.shape)} of {loss.dtype}" if isinstance(loss, Tensor) else repr(loss)
    raise TypeError(
        f"{name}: expected {key!r} of auxiliary_losses to be a 0-dim floating tensor, the loss of "
        f"a chunk, got {got}; one loss per row is a feature, which the loss adds up: leave it out "
        "of auxiliary_losses"
    )


def _refuse_unweighted(chosen: Mapping[str, Any], weighted: Sequence[str], name: str) -> None:
    for key, value in chosen.items():
        is_loss = isinstance(value, Tensor) and value.dim() == 0 and value.is_floating_point()
        if is_loss and key not in weighted:
            raise TypeError(
                f"{name}: expected a weight for every loss that an encoder returns, got {key!r}, a "
                f"0-dim tensor, with auxiliary_losses={list(weighted)}; pass "
                f"auxiliary_losses={{{key!r}: weight}} to GradCache (0.0 leaves it in the log "
                "alone), or drop it with get_features"
            )


def _known_features(output: Mapping[str, Any], named: Mapping[str, Any], name: str) -> Any:
    for key in _MODEL_OUTPUT_FIELDS:
        if isinstance(output.get(key), Tensor):
            return output[key]
    # Other mappings hold much beside features, such as the hidden states of a transformers model.
    if type(output) is dict and output:
        return named
    # Scores of whole rows, as classifiers and rerankers return; those of tokens have three axes.
    logits = output.get("logits")
    if isinstance(logits, Tensor) and logits.dim() < 3 and "last_hidden_state" not in output:
        return logits
    raise TypeError(
        f"{name}: expected features (a tensor or a tuple of tensors), got "
        f"{type(output).__name__} with {', '.join(map(str, output))}; say which with "
        "get_features, such as get_features=lambda output: output.last_hidden_state[:, 0] for "
        "a BERT; around a causal model write a module that returns each row's last token, "
        "hidden[torch.arange(len(mask)), mask.sum(1) - 1] where padding is on the right"
    )


def check_features(
    features: Sequence[Any], rows: int, name: str, inputs: Any, *, trainable: bool
) -> None:
    """Refuse what cannot be cached.

    Raises:
        TypeError, ValueError: not real tensors with one row for each sample of a chunk.
    """
    for feature in features or [None]:
        if unusable := _unusable(feature, trainable):
            raise TypeError(
                f"{name}: expected features (a real tensor or a tuple of them), got {unusable}"
            )
        if feature.dim() == 0 or feature.shape[0] != rows:
            raise ValueError(
                f"{name}: expected features with {rows} rows, one for each sample of the chunk, "
                f"got shape {tuple(feature.shape)}; {_REMEDY}{hint_at_lists(inputs)}"
            )


def _unusable(feature: Any, trainable: bool) -> str:
    """Say why a feature cannot be cached, and what to do; empty if it can."""
    if not isinstance(feature, Tensor):
        return f"{type(feature).__name__}; extract them with get_features"
    if feature.is_complex():
        return f"{feature.dtype}; extract them with get_features"
    if feature.is_nested:
        return "a NestedTensor; pool each sample to one vector"
    if feature.layout is not torch.strided:
        return f"layout {feature.layout}; return x.to_dense()"
    if feature.is_meta:
        return "a tensor on the meta device; give the encoder its weights first"
    if trainable and feature.is_inference() and not torch.is_inference_mode_enabled():
        return (
            "a tensor made inside torch.inference_mode(), which no gradient passes; leave it out "
            "of the encoder, or freeze the encoder with requires_grad_(False)"
        )
    return ""
