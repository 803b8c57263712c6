"""Ways to take the gradients of a large batch. Each returns the loss and fills `.grad`.

B pairs. The published algorithms are written out here as their papers and repositories describe
them, where they are no libraries or want a model class of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from engine_models import Workload, encode, rows_of
from torch import Tensor, nn

from gradcache_clip import ByLength, ClipLoss, GradCache

Step = Callable[[], float]
SCALE = 20.0


def plain(work: Workload, chunk_size: int) -> Step:
    """One graph over the whole batch, and the B x B matrix."""

    def step() -> float:
        features = [encode(e, given) for e, given in zip(work.encoders, work.inputs, strict=True)]
        loss = _clip(*features)
        loss.backward()
        return loss.item()

    return step


def ours(work: Workload, chunk_size: int, **options: object) -> Step:
    """`GradCache` with these options."""
    loss = ClipLoss(init_logit_scale=SCALE)
    cache = GradCache(work.encoders, _Fixed(loss), chunk_size=chunk_size, **options)
    return lambda: cache(*work.inputs).loss.item()


class _Fixed(nn.Module):
    """The same scale for all contestants."""

    def __init__(self, loss: ClipLoss) -> None:
        super().__init__()
        self.loss = loss.requires_grad_(False)

    def forward(self, images: Tensor, texts: Tensor) -> Tensor:
        return self.loss(images, texts).loss


def published_gradient_cache(work: Workload, chunk_size: int) -> Step:
    """Gao et al. 2021: embed, loss over the matrix, replay with <gradient, output> as its loss."""

    def step() -> float:
        states: list[list[Tensor]] = [[], []]
        features = []
        for tower, (encoder, given) in enumerate(zip(work.encoders, work.inputs, strict=True)):
            parts = []
            with torch.no_grad():
                for rows in _chunks(work, chunk_size):
                    states[tower].append(torch.get_rng_state())
                    parts.append(encode(encoder, rows_of(given, rows)))
            features.append(torch.cat(parts).requires_grad_())
        loss = _clip(*features)
        loss.backward()
        for tower, (encoder, given) in enumerate(zip(work.encoders, work.inputs, strict=True)):
            for rows, state in zip(_chunks(work, chunk_size), states[tower], strict=True):
                torch.set_rng_state(state)
                again = encode(encoder, rows_of(given, rows))
                torch.dot(features[tower].grad[rows].flatten(), again.flatten()).backward()
        return loss.item()

    return step


def feature_accumulation(work: Workload, chunk_size: int) -> Step:
    """open_clip's --accum-freq: each chunk again with its graph, the whole loss every time."""

    def step() -> float:
        with torch.no_grad():
            cached = [
                [encode(encoder, rows_of(given, rows)) for rows in _chunks(work, chunk_size)]
                for encoder, given in zip(work.encoders, work.inputs, strict=True)
            ]
        for index, rows in enumerate(_chunks(work, chunk_size)):
            spliced = [
                torch.cat([*parts[:index], encode(e, rows_of(given, rows)), *parts[index + 1 :]])
                for e, given, parts in zip(work.encoders, work.inputs, cached, strict=True)
            ]
            loss = _clip(*spliced)
            loss.backward()
        return loss.item()

    return step


def sentence_transformers(work: Workload, chunk_size: int) -> Step:
    """CachedMultipleNegativesRankingLoss in both directions; one encoder, dicts of tensors."""
    from sentence_transformers.sentence_transformer.losses import (
        CachedMultipleNegativesRankingLoss,
    )

    model = nn.Sequential(_SentenceEmbedding(work.encoders[0]))
    loss_function = CachedMultipleNegativesRankingLoss(
        model,
        scale=SCALE,
        mini_batch_size=chunk_size,
        directions=("query_to_doc", "doc_to_query"),
        partition_mode="per_direction",
    )

    def step() -> float:
        loss = loss_function([dict(given) for given in work.inputs], torch.empty(0))
        loss.backward()
        return loss.item()

    return step


class _SentenceEmbedding(nn.Module):
    """What sentence-transformers calls a module: a dict in, a dict with an embedding out."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        given = {name: features[name] for name in ("input_ids", "attention_mask")}
        return {**features, "sentence_embedding": self.encoder(**given)}


IMAGE_TEXT: dict[str, Callable[[Workload, int], Step]] = {
    "plain step": plain,
    "gradcache-clip": ours,
    "gradcache-clip, room for all graphs": partial(ours, memory_budget=2**60),
    "gradient cache as published": published_gradient_cache,
    "open_clip accumulation": feature_accumulation,
}
LEMMA_GLOSS: dict[str, Callable[[Workload, int], Step]] = {
    "gradcache-clip, sorted by length": partial(ours, sort_by_length=ByLength()),
    "gradcache-clip": ours,
    "sentence-transformers": sentence_transformers,
    "gradient cache as published": published_gradient_cache,
}


def _clip(image_features: Tensor, text_features: Tensor) -> Tensor:
    images, texts = F.normalize(image_features, dim=-1), F.normalize(text_features, dim=-1)
    logits = SCALE * images @ texts.T
    labels = torch.arange(len(logits))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def _chunks(work: Workload, chunk_size: int) -> list[slice]:
    first = work.inputs[0]
    rows = len(first["input_ids"] if isinstance(first, dict) else first)
    return [slice(start, min(start + chunk_size, rows)) for start in range(0, rows, chunk_size)]
