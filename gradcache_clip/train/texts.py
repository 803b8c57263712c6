"""Text encoder for queries and documents.

B rows of a chunk, L tokens, D feature width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

from gradcache_clip.train.backbones import build_text_backbone
from gradcache_clip.train.towers import TextTower

if TYPE_CHECKING:
    from gradcache_clip.train.config_model import TextTowerConfig


class TextEncoder(nn.Module):
    """One text tower for queries, documents and hard negatives.

    Called as `encoder(tower, texts)`; all three share the weights, so the number is ignored. There
    is no projection: the pooled vectors are the features, so a pretrained tower works from the
    start.

    Args:
        text_tower: texts to (B, D).

    Example:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> class Ones(nn.Module):
        ...     def forward(self, input_ids, attention_mask):
        ...         return SimpleNamespace(last_hidden_state=torch.ones(*input_ids.shape, 4))
        >>> encoder = TextEncoder(TextTower(Ones(), width=4, pool="mean"))
        >>> tokens = {"input_ids": torch.ones(2, 5), "attention_mask": torch.ones(2, 5)}
        >>> encoder(1, tokens).shape
        torch.Size([2, 4])
    """

    def __init__(self, text_tower: TextTower) -> None:
        super().__init__()
        self.text_tower = text_tower

    def encode_text(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Map `input_ids` and `attention_mask` (B, L) to unnormalised features (B, D)."""
        features: Tensor = self.text_tower(inputs)
        return features

    def forward(self, tower: int, inputs: Mapping[str, Tensor]) -> Tensor:
        """Encode texts; `tower` is ignored."""
        return self.encode_text(inputs)


def build_text_encoder(
    config: TextTowerConfig, *, context_length: int, vocab_size: int, pad_token_id: int
) -> TextEncoder:
    """Build a text encoder from a configuration, in train mode.

    Raises:
        ValueError: a model that cannot be built; see `build_text_backbone`.
    """
    backbone = build_text_backbone(
        config, context_length=context_length, vocab_size=vocab_size, pad_token_id=pad_token_id
    )
    width = backbone.config.hidden_size
    # A pretrained backbone arrives in evaluation mode.
    return TextEncoder(TextTower(backbone, width=width, pool=config.text_pool)).train()
