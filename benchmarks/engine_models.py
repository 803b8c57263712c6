"""Encoders and batches that engine.py measures with. B pairs, L tokens a text."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_FEATURES = 384
_VOCABULARY = 30522
_WORDNET_FILES = ("data.noun", "data.verb", "data.adj", "data.adv")


class Workload(NamedTuple):
    """Two encoders, and one batch for each."""

    encoders: tuple[nn.Module, nn.Module]
    inputs: tuple[Any, Any]


class MeanPooledBert(nn.Module):
    """A BERT from a configuration; the mean of its tokens is the feature."""

    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        config = BertConfig(
            vocab_size=_VOCABULARY,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=4 * width,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        self.bert = BertModel(config, add_pooling_layer=False)
        self.projection = nn.Linear(width, _FEATURES, bias=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
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
    text = MeanPooledBert(256, 2 if small else 6, 4)
    tokens = torch.randint(0, _VOCABULARY, (batch_size, 32))
    texts = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    return Workload((image, text), (torch.randn(batch_size, 3, 64, 64), texts))


def lemma_gloss(batch_size: int, folder: Path, *, small: bool) -> Workload:
    """WordNet's lemmas and glosses through one encoder of the shape of MiniLM-L6."""
    torch.manual_seed(0)
    encoder = MeanPooledBert(384, 2 if small else 6, 12)
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
    rows = [
        [1 + zlib.crc32(word.encode()) % (_VOCABULARY - 1) for word in t.split()] for t in texts
    ]
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


def _token(word: str) -> int:
    return 1 + zlib.crc32(word.encode()) % (_VOCABULARY - 1)
