"""Multiway Transformer of BEiT-3: shared attention, separate experts for images and texts.

B rows of a chunk, H and W pixels, P patches, L tokens, C width of the Transformer.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.layers import DropPath, Mlp, PatchEmbed
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from gradcache_clip.train.config_errors import ConfigError
from gradcache_clip.train.config_model import MultiwayConfig, MultiwaySizes
from gradcache_clip.train.modalities import IMAGE, TEXT, TOWERS

_EMBEDDING_STD = 0.02


class Expert(nn.Module):
    """Parts of a block that belong to one modality: its norms and its feed-forward network."""

    def __init__(self, sizes: MultiwaySizes) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(sizes.width)
        self.heads_norm = nn.LayerNorm(sizes.width)
        self.mlp_norm = nn.LayerNorm(sizes.width)
        self.mlp = Mlp(sizes.width, sizes.hidden, norm_layer=nn.LayerNorm)
        for layer in (self.mlp.fc1, self.mlp.fc2):
            nn.init.xavier_normal_(layer.weight, sizes.gain)
            nn.init.zeros_(layer.bias)


class MultiwayBlock(nn.Module):
    """Shared self-attention, then the feed-forward network of the tokens' modality.

    A layer norm precedes every projection, also those inside the attention and the feed-forward
    network (Sub-LN).
    """

    def __init__(self, sizes: MultiwaySizes, drop_path: float) -> None:
        super().__init__()
        self.heads = sizes.heads
        self.qkv = nn.Linear(sizes.width, 3 * sizes.width)
        self.out = nn.Linear(sizes.width, sizes.width)
        self.experts = nn.ModuleList(Expert(sizes) for _ in TOWERS)
        self.drop_path = DropPath(drop_path)
        # Magneto scales values, but not queries and keys.
        starts = zip(self.qkv.weight.detach().chunk(3), (1, 1, sizes.gain), strict=True)
        for weight, gain in (*starts, (self.out.weight, sizes.gain)):
            nn.init.xavier_normal_(weight, gain)
        for bias in (self.qkv.bias, self.out.bias):
            nn.init.zeros_(bias)

    def forward(self, x: Tensor, tower: int, mask: Tensor | None) -> Tensor:
        """Map tokens (B, L, C) of one modality; `mask` (B, 1, 1, L) is true for real tokens."""
        expert: Any = self.experts[tower]
        attended = self._attend(expert.attention_norm(x), mask)
        x = x + self.drop_path(self.out(expert.heads_norm(attended)))
        return x + self.drop_path(expert.mlp(expert.mlp_norm(x)))

    def _attend(self, x: Tensor, mask: Tensor | None) -> Tensor:
        B, L, C = x.shape
        q, k, v = self.qkv(x).view(B, L, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, heads, L, C/heads)
        return mixed.transpose(1, 2).reshape(B, L, C)


class MultiwayTransformer(nn.Module):
    """Blocks shared by images and texts, and a final layer norm for each.

    Example:
        >>> sizes = MultiwaySizes(width=16, depth=2, heads=2, hidden=32)
        >>> transformer = MultiwayTransformer(sizes)
        >>> transformer(torch.randn(3, 5, 16), TEXT).shape
        torch.Size([3, 5, 16])
    """

    def __init__(self, sizes: MultiwaySizes) -> None:
        super().__init__()
        rates = torch.linspace(0, sizes.drop_path, sizes.depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(MultiwayBlock(sizes, rate) for rate in rates)
        self.norms = nn.ModuleList(nn.LayerNorm(sizes.width) for _ in TOWERS)

    def forward(self, x: Tensor, tower: int, mask: Tensor | None = None) -> Tensor:
        """Map embedded tokens (B, L, C) of images (tower 0) or texts (1) to hidden states."""
        for block in self.blocks:
            x = block(x, tower, mask)
        hidden: Tensor = self.norms[tower](x)
        return hidden


class MultiwayImages(nn.Module):
    """Maps images (B, 3, H, W) to the last layer's [CLS] (B, C), with a timm model's interface."""

    def __init__(
        self, transformer: MultiwayTransformer, sizes: MultiwaySizes, image_size: int
    ) -> None:
        super().__init__()
        self.patches = PatchEmbed(image_size, sizes.patch_size, embed_dim=sizes.width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, sizes.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.patches.num_patches, sizes.width))
        for embedding in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(embedding, std=_EMBEDDING_STD)
        self.transformer = transformer
        self.head_hidden_size = sizes.width
        statistics = {"mean": IMAGENET_INCEPTION_MEAN, "std": IMAGENET_INCEPTION_STD}
        self.pretrained_cfg = {"architecture": "multiway", **statistics}

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images)  # (B, P, C)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        pooled: Tensor = self.transformer(x + self.pos_embed, IMAGE)[:, 0]
        return pooled


class MultiwayTexts(nn.Module):
    """Maps ids and mask (B, L) to hidden states (B, L, C), as a transformers encoder does."""

    def __init__(
        self,
        transformer: MultiwayTransformer,
        sizes: MultiwaySizes,
        *,
        context_length: int,
        vocab_size: int,
        pad_token_id: int,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, sizes.width, padding_idx=pad_token_id)
        self.pos_embed = nn.Parameter(torch.zeros(1, context_length, sizes.width))
        nn.init.trunc_normal_(self.pos_embed, std=_EMBEDDING_STD)
        nn.init.normal_(self.embedding.weight, std=sizes.width**-0.5)
        self.transformer = transformer
        self.config = SimpleNamespace(hidden_size=sizes.width, model_type="multiway")

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> BaseModelOutput:
        x = self.embedding(input_ids) + self.pos_embed[:, : input_ids.shape[1]]
        hidden = self.transformer(x, TEXT, attention_mask.bool()[:, None, None, :])
        return BaseModelOutput(last_hidden_state=hidden)


def multiway_backbones(
    config: MultiwayConfig,
    *,
    image_size: int,
    context_length: int,
    vocab_size: int,
    pad_token_id: int,
) -> tuple[MultiwayImages, MultiwayTexts]:
    """Build the image and the text backbone around one shared Transformer.

    Each pass sees tokens of one modality, as in BEiT-3's contrastive training and retrieval. The
    shared attention gets gradients from both passes.

    Raises:
        ConfigError: the patch size does not divide the image size.

    Source:
        Wang et al. 2023, "Image as a foreign language", sections 2.1 and 3.1; Sub-LN and its
        initialisation are from Wang et al. 2022, "Foundation transformers" (Magneto), figure 2.
    """
    sizes = config.multiway_kwargs
    if image_size % sizes.patch_size:
        raise ConfigError(
            f"model.multiway_kwargs.patch_size: expected a divisor of data.image_size, which is "
            f"{image_size}, got {sizes.patch_size}; change either"
        )
    transformer = MultiwayTransformer(sizes)
    texts = MultiwayTexts(
        transformer,
        sizes,
        context_length=context_length,
        vocab_size=vocab_size,
        pad_token_id=pad_token_id,
    )
    return MultiwayImages(transformer, sizes, image_size), texts
