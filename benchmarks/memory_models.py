"""Encoders and batches that memory_vs_batch.py trains. B pairs a batch, L tokens a text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

FEATURES = 512
"""Width of the features of every pair of encoders."""

Inputs = tuple[Tensor, dict[str, Tensor]]


@dataclass(frozen=True)
class ModelSize:
    """A pair of encoders and the shape of their inputs."""

    description: str
    image: dict[str, Any]
    """Arguments of timm.create_model; empty for an MLP that needs no library."""
    text: dict[str, Any]
    """Arguments of transformers.BertConfig."""
    image_size: int = 64
    tokens: int = 32
    vocabulary: int = 30522


SIZES = {
    "small": ModelSize(
        "ViT-S/16 at 64 px + BERT-small (4 x 512) at 32 tokens",
        {"model_name": "vit_small_patch16_224"},
        {"hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8},
    ),
    "mini": ModelSize(
        "ViT (4 x 192, patch 16) at 64 px + BERT-mini (2 x 256) at 32 tokens",
        {"model_name": "vit_tiny_patch16_224", "depth": 4},
        {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4},
    ),
    "mlp": ModelSize("two MLPs, to try the script itself", {}, {}, 16, 8, 512),
}


class Encoders(NamedTuple):
    """An image and a text encoder with features of the same width."""

    image: nn.Module
    text: nn.Module


class BertEncoder(nn.Module):
    """BERT from a configuration; the projected first token is the feature."""

    def __init__(self, vocabulary: int, config: dict[str, Any]) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        full = BertConfig(
            vocab_size=vocabulary,
            intermediate_size=4 * config["hidden_size"],
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            **config,
        )
        self.bert = BertModel(full, add_pooling_layer=False)
        self.projection = nn.Linear(config["hidden_size"], FEATURES, bias=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return self.projection(hidden[:, 0])


class BagOfWords(nn.Module):
    """The text side of the "mlp" pair."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, 64)
        self.layers = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, FEATURES))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.layers(self.embedding(input_ids) * attention_mask.unsqueeze(-1)).mean(1)


def build_encoders(size: ModelSize, *, checkpointed: bool = False) -> Encoders:
    """Randomly initialised encoders; the same weights for the same seed.

    Args:
        checkpointed: whether every block (of an MLP: all of it) computes its activations again.
    """
    if not size.image:
        return _mlps(size, checkpointed)
    import timm

    image = timm.create_model(**size.image, img_size=size.image_size, num_classes=FEATURES)
    text = BertEncoder(size.vocabulary, size.text)
    if checkpointed:
        image.set_grad_checkpointing()
        # Older versions of transformers know it by another name.
        enable = getattr(text.bert, "activation_checkpointing_enable", None)
        (enable or text.bert.gradient_checkpointing_enable)()
    return Encoders(image, text)


def make_inputs(size: ModelSize, batch_size: int) -> Inputs:
    """Random images (B, 3, H, W), and token ids and mask (B, L)."""
    images = torch.randn(batch_size, 3, size.image_size, size.image_size)
    ids = torch.randint(size.vocabulary, (batch_size, size.tokens))
    return images, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _mlps(size: ModelSize, checkpointed: bool) -> Encoders:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    layers = nn.Linear(3 * size.image_size**2, 256), nn.GELU(), nn.Linear(256, FEATURES)
    encoders = nn.Sequential(nn.Flatten(), *layers), BagOfWords(size.vocabulary)
    return Encoders(*(map(checkpoint_wrapper, encoders) if checkpointed else encoders))
