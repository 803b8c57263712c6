"""Texts padded on either side, images of any number of patches, and tiny encoders of these."""

from __future__ import annotations

import torch
from torch import Tensor, nn

ROWS, LENGTH, WIDTH = 9, 12, 16


def tokens(side: str, *, positions: bool = True) -> dict[str, Tensor]:
    """Rows of 1 to LENGTH - 2 tokens, so that every chunk is trimmed."""
    lengths = torch.randint(1, LENGTH - 1, (ROWS,))
    mask = (torch.arange(LENGTH) < lengths[:, None]).long()
    mask = mask.flip(1) if side == "left" else mask
    ids = torch.randint(1, 40, mask.shape) * mask
    given = {"input_ids": ids, "attention_mask": mask}
    if positions:
        given["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
    return given


class Siglip2(nn.Module):
    def __init__(self) -> None:
        from transformers import Siglip2VisionConfig, Siglip2VisionModel

        super().__init__()
        config = Siglip2VisionConfig(
            hidden_size=WIDTH,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            patch_size=2,
            num_patches=16,
        )
        self.inner = Siglip2VisionModel(config)
        self.widths: list[int] = []

    def forward(self, **given: Tensor) -> Tensor:
        if self.training:
            self.widths.append(given["pixel_values"].shape[1])
        return self.inner(**given).pooler_output


class NaFlex(nn.Module):
    def __init__(self) -> None:
        from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg

        super().__init__()
        config = NaFlexVitCfg(
            patch_size=2,
            embed_dim=WIDTH,
            depth=2,
            num_heads=2,
            pos_embed_grid_size=(4, 4),
            class_token=False,
            global_pool="avg",
        )
        self.inner = NaFlexVit(config, num_classes=0)
        self.widths: list[int] = []

    def forward(self, patches: Tensor, **given: Tensor) -> Tensor:
        if self.training:
            self.widths.append(patches.shape[1])
        return self.inner(patches, **given)


def images() -> tuple[Tensor, Tensor, Tensor]:
    """Patches (B, L, 12) with zeros as padding, their mask, and rows and columns of each image."""
    shapes = torch.randint(1, 4, (ROWS, 2))
    mask = torch.arange(LENGTH) < shapes.prod(1, keepdim=True)
    return torch.randn(ROWS, LENGTH, 12).double() * mask[..., None], mask, shapes


def siglip2_images() -> dict[str, Tensor]:
    patches, mask, shapes = images()
    return {
        "pixel_values": patches,
        "pixel_attention_mask": mask.int(),
        "spatial_shapes": shapes,
    }


def naflex_images() -> dict[str, Tensor]:
    patches, mask, shapes = images()
    place = torch.arange(LENGTH)
    coordinates = torch.stack([place // shapes[:, 1:], place % shapes[:, 1:]], -1)
    return {
        "patches": patches,
        "patch_coord": coordinates * mask[..., None],
        "patch_valid": mask,
    }
