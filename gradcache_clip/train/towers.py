"""Image and text towers with linear projections into one feature space.

B rows of a chunk, H and W pixels, L tokens, D feature width, C width of a tower.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gradcache_clip.cache import FrozenTrunk
from gradcache_clip.train.backbones import build_image_backbone, build_text_backbone
from gradcache_clip.train.modalities import IMAGE, TEXT, TOWERS

if TYPE_CHECKING:
    from gradcache_clip.train.config_model import DualConfig, MultiwayConfig


class ImageTower(nn.Module):
    """Pixel normalisation followed by a timm model with its pooling.

    Args:
        backbone: images (B, 3, H, W) to pooled features (B, `width`).
        width: C.
        mean, std: of each colour channel, for pixels from 0 to 1.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, backbone: nn.Module, *, width: int, mean: Iterable[float], std: Iterable[float]
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.width = width
        self.register_buffer("mean", torch.tensor([*mean]).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([*std]).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, 3, H, W) to (B, C); uint8 is normalised, floats are used unchanged.

        Cached features (B, C) of this tower pass through unchanged.
        """
        if images.ndim == 2:
            return images
        # A batch stays uint8, a quarter of the memory; only the current chunk becomes float.
        if images.dtype == torch.uint8:
            images = (images.to(self.mean.dtype) / 255 - self.mean) / self.std
            # DeepSpeed casts the weights, but not these buffers.
            images = images.to(next(self.backbone.parameters()).dtype)
        features: Tensor = self.backbone(images)
        return features


class TextTower(nn.Module):
    """A transformers encoder whose last hidden state is pooled to one vector per text.

    Args:
        backbone: maps `input_ids` and `attention_mask` to `.last_hidden_state` (B, L, C).
        width: C.
        pool: "cls" takes the first token, "mean" averages over unmasked tokens.
    """

    def __init__(self, backbone: nn.Module, *, width: int, pool: str) -> None:
        super().__init__()
        self.backbone = backbone
        self.width = width
        self.pool = pool

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Map `input_ids` and `attention_mask`, both (B, L), to (B, C)."""
        mask = inputs["attention_mask"]
        output = self.backbone(input_ids=inputs["input_ids"], attention_mask=mask)
        hidden: Tensor = output.last_hidden_state
        if self.pool == "cls":
            return hidden[:, 0]
        kept = mask.unsqueeze(-1).to(hidden.dtype)  # (B, L, 1)
        return (hidden * kept).sum(1) / kept.sum(1).clamp(min=1)


class DualEncoder(nn.Module):
    """Two towers with projections, called one tower and one chunk at a time.

    Called as `encoder(tower, inputs)`: a single module suits `GradCache` as well as DDP, FSDP and
    DeepSpeed. Features are not normalised; the loss normalises them.

    Args:
        image_tower, text_tower: see the classes above.
        feature_dim: D.

    Source:
        Radford et al. 2021, section 2.3: a linear projection from each tower, without bias.

    Example:
        >>> from types import SimpleNamespace
        >>> config = SimpleNamespace(
        ...     image="convnext_atto", image_kwargs={"depths": [1, 1, 1, 1]},
        ...     image_pretrained=False, image_pool="default", text="bert",
        ...     text_kwargs={"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1},
        ...     text_pretrained=False, text_pool="cls", feature_dim=16, freeze="",
        ...     image_weights="", architecture="dual")
        >>> encoder = build_towers(
        ...     config, image_size=32, context_length=8, vocab_size=300, pad_token_id=0)
        >>> encoder(0, torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).shape
        torch.Size([2, 16])
        >>> tokens = {"input_ids": torch.ones(2, 5, dtype=torch.long)}
        >>> encoder(1, tokens | {"attention_mask": torch.ones(2, 5, dtype=torch.long)}).shape
        torch.Size([2, 16])
    """

    tower_names = TOWERS

    def __init__(self, image_tower: ImageTower, text_tower: TextTower, *, feature_dim: int) -> None:
        super().__init__()
        if feature_dim < 1:
            raise ValueError(
                f"model.feature_dim: expected a positive integer, got {feature_dim}; "
                "pass e.g. model.feature_dim=256"
            )
        self.image_tower = image_tower
        self.text_tower = text_tower
        self.image_projection = linear_projection(image_tower.width, feature_dim)
        self.text_projection = linear_projection(text_tower.width, feature_dim)
        # In a plain dict, because the parts are registered above already.
        self._trunks: dict[int, FrozenTrunk] = {}

    def freeze(self, tower: int) -> None:
        """Freeze a tower in evaluation mode; its projection is still trained.

        Source: Zhai et al. 2022, "LiT: Zero-shot transfer with locked-image text tuning".
        """
        trunk, head = (
            (self.image_tower, self.image_projection),
            (self.text_tower, self.text_projection),
        )[tower]
        trunk.requires_grad_(False).eval()
        self._trunks[tower] = FrozenTrunk(trunk, head)

    def frozen_trunk(self, tower: int) -> FrozenTrunk | None:
        """Return a frozen tower with its projection, for `GradCache` to run once per step."""
        return self._trunks.get(tower)

    def train(self, mode: bool = True) -> DualEncoder:
        """Set the mode of the trained parts; a frozen tower stays in evaluation mode."""
        super().train(mode)
        for frozen in self._trunks.values():
            frozen.trunk.eval()
        return self

    def encode_image(self, images: Tensor) -> Tensor:
        """Map images (B, 3, H, W), uint8 or normalised float, to unnormalised features (B, D)."""
        features: Tensor = self.image_projection(self.image_tower(images))
        return features

    def encode_text(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Map `input_ids` and `attention_mask` (B, L) to unnormalised features (B, D)."""
        features: Tensor = self.text_projection(self.text_tower(inputs))
        return features

    def forward(self, tower: int, inputs: Any) -> Tensor:
        """Return features (B, D) of one tower: 0 takes images, 1 takes tokens.

        Raises:
            ValueError: `tower` is neither 0 nor 1.
        """
        if tower in self._trunks:
            features: Tensor = self._trunks[tower](inputs)
            return features
        if tower == IMAGE:
            return self.encode_image(inputs)
        if tower == TEXT:
            return self.encode_text(inputs)
        raise ValueError(f"tower: expected 0 (image) or 1 (text), got {tower!r}; pass 0 or 1")


def build_towers(
    model_config: DualConfig | MultiwayConfig,
    *,
    image_size: int,
    context_length: int,
    vocab_size: int,
    pad_token_id: int,
) -> DualEncoder:
    """Build both towers from a configuration, in train mode.

    Args:
        model_config: names, keyword arguments and pooling of both towers, and `feature_dim`.
        image_size: height and width in pixels, for models that are built for a fixed size.
        context_length: longest text in tokens, special tokens included.
        vocab_size: rows of the embedding table; `Tokenizer.vocab_size`.
        pad_token_id: id of the padding token.

    Returns:
        The encoder. Every trained parameter gets a gradient from features of both towers (unused
        poolers and classifiers are left out), so DDP needs no `find_unused_parameters`.

    Raises:
        ValueError: an unknown model or argument name (with the nearest valid names), a pooling that
            the model lacks, weights that cannot be loaded, or texts that do not fit the model.
    """
    image_backbone, text_backbone = _backbones(
        model_config,
        image_size=image_size,
        context_length=context_length,
        vocab_size=vocab_size,
        pad_token_id=pad_token_id,
    )
    image_tower = image_tower_around(image_backbone)
    # A Multiway Transformer has neither option; these are its fixed values.
    pool = getattr(model_config, "text_pool", "cls")
    frozen = getattr(model_config, "freeze", "")
    text_tower = TextTower(text_backbone, width=text_backbone.config.hidden_size, pool=pool)
    encoder = DualEncoder(image_tower, text_tower, feature_dim=model_config.feature_dim)
    if frozen:
        encoder.freeze(TOWERS.index(frozen))
    # Pretrained backbones arrive in evaluation mode.
    return encoder.train()


def _backbones(
    config: DualConfig | MultiwayConfig, *, image_size: int, **texts: int
) -> tuple[Any, Any]:
    """Build the image and the text backbone; in a Multiway Transformer they share most weights."""
    if config.architecture == "multiway":
        from gradcache_clip.train.multiway import multiway_backbones

        return multiway_backbones(config, image_size=image_size, **texts)
    image = build_image_backbone(config, image_size=image_size)
    return image, build_text_backbone(config, **texts)


def image_tower_around(backbone: Any) -> ImageTower:
    """Wrap a timm model in the pixel normalisation that it was published with."""
    statistics = backbone.pretrained_cfg
    return ImageTower(
        backbone,
        width=backbone.head_hidden_size,
        mean=statistics["mean"],
        std=statistics["std"],
    )


def linear_projection(width: int, feature_dim: int) -> nn.Linear:
    """Build a projection without bias, initialised to keep the scale of its inputs."""
    layer = nn.Linear(width, feature_dim, bias=False)
    nn.init.normal_(layer.weight, std=width**-0.5)
    return layer
