"""Encoders, batches, and ways to take the gradients of a large batch. B pairs, L tokens a text.

The published algorithms are written out here as their papers and repositories describe them, where
they are no libraries or want a model class of their own.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradcache_clip import ByLength, ClipLoss, GradCache

Step = Callable[[], float]
"""Returns the loss and fills `.grad`."""
SCALE = 20.0
_FEATURES = 384
VOCABULARY = 30522
_WORDNET_FILES = ("data.noun", "data.verb", "data.adj", "data.adv")


class Workload(NamedTuple):
    """Two encoders, and one batch for each."""

    encoders: tuple[nn.Module, nn.Module]
    inputs: tuple[Any, Any]


class Bert(nn.Module):
    """A BERT from a configuration; the projected mean of its tokens, or the first, is the feature.

    Args:
        mean: whether to take the mean.
    """

    def __init__(
        self, width: int, layers: int, heads: int, features: int = _FEATURES, *, mean: bool = True
    ) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        config = BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=4 * width,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        self.bert = BertModel(config, add_pooling_layer=False)
        self.projection = nn.Linear(width, features, bias=False)
        self.mean = mean

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        if not self.mean:
            return self.projection(hidden[:, 0])
        weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return self.projection((hidden * weights).sum(1) / weights.sum(1))


def image_text(batch_size: int, *, small: bool) -> Workload:
    """A ViT on 64-pixel images and a six-layer text tower, or two layers each if small."""
    import timm

    torch.manual_seed(0)
    depth = 2 if small else 12
    image = timm.create_model(
        "vit_small_patch16_224", img_size=64, patch_size=8, depth=depth, num_classes=_FEATURES
    )
    text = Bert(256, 2 if small else 6, 4)
    tokens = torch.randint(0, VOCABULARY, (batch_size, 32))
    texts = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    return Workload((image, text), (torch.randn(batch_size, 3, 64, 64), texts))


def lemma_gloss(batch_size: int, folder: Path, *, small: bool) -> Workload:
    """WordNet's lemmas and glosses through one encoder of the shape of MiniLM-L6."""
    torch.manual_seed(0)
    encoder = Bert(384, 2 if small else 6, 12)
    pairs = list(wordnet_pairs(folder))
    chosen = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))[:batch_size]
    lemmas, glosses = zip(*(pairs[i] for i in chosen.tolist()), strict=True)
    return Workload((encoder, encoder), (padded_words(lemmas), padded_words(glosses)))


def wordnet_pairs(folder: Path) -> Iterator[tuple[str, str]]:
    """First lemma and gloss of every synset.

    Raises:
        FileNotFoundError: the folder does not hold WordNet 3.0's data files.
    """
    for name in _WORDNET_FILES:
        if not (folder / name).exists():
            raise FileNotFoundError(
                f"--wordnet: expected {name} of WordNet 3.0 in {folder}, got none; install the "
                "Debian package wordnet-base, or unpack it and pass its folder"
            )
        for line in (folder / name).read_text(encoding="utf-8").splitlines():
            if line[:1].isdigit():
                fields, gloss = line.split(" | ", 1)
                yield fields.split()[4].replace("_", " "), gloss.strip()


def padded_words(texts: tuple[str, ...], longest: int = 128) -> dict[str, Tensor]:
    """Each word hashed to a token, padded on the right: lengths as they are, no vocabulary."""
    rows = [[1 + zlib.crc32(word.encode()) % (VOCABULARY - 1) for word in t.split()] for t in texts]
    rows = [row[:longest] for row in rows]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


def rows_of(inputs: Any, rows: slice) -> Any:
    """Rows of a tensor or of a dict of tensors."""
    if isinstance(inputs, dict):
        return {name: tensor[rows] for name, tensor in inputs.items()}
    return inputs[rows]


def encode(encoder: nn.Module, inputs: Any) -> Tensor:
    return encoder(**inputs) if isinstance(inputs, dict) else encoder(inputs)


# Ways to take the gradients


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

    model = nn.Sequential(SentenceEmbedding(work.encoders[0]))
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


class SentenceEmbedding(nn.Module):
    """A module as sentence-transformers calls it: a dict in, a dict with an embedding out."""

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
