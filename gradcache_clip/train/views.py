"""Image encoder for augmented views of the same images.

B rows of a chunk, H and W pixels, C width of the tower, D feature width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from gradcache_clip.train.backbones import build_image_backbone
from gradcache_clip.train.towers import ImageTower, image_tower_around, linear_projection

if TYPE_CHECKING:
    from gradcache_clip.train.config_model import ViewConfig


class ViewEncoder(nn.Module):
    """One image tower with a projection, for every view of an image.

    Called as `encoder(tower, images)`; all views share the weights, so the number is ignored. The
    projection is discarded after training.

    Args:
        image_tower: images to (B, C).
        feature_dim: D.
        hidden: width of the projection's hidden layer; 0 for a linear projection.

    Source:
        Chen et al. 2020 (SimCLR), section 2.1.

    Example:
        >>> import torch
        >>> tower = ImageTower(nn.Flatten(), width=12, mean=[0.5] * 3, std=[0.5] * 3)
        >>> encoder = ViewEncoder(tower, feature_dim=4, hidden=8)
        >>> encoder(1, torch.zeros(5, 3, 2, 2)).shape
        torch.Size([5, 4])
    """

    def __init__(self, image_tower: ImageTower, *, feature_dim: int, hidden: int = 0) -> None:
        super().__init__()
        self.image_tower = image_tower
        self.image_projection = _projection(image_tower.width, feature_dim, hidden)

    def encode_image(self, images: Tensor) -> Tensor:
        """Map images (B, 3, H, W), uint8 or normalised float, to unnormalised features (B, D)."""
        features: Tensor = self.image_projection(self.image_tower(images))
        return features

    def forward(self, tower: int, images: Tensor) -> Tensor:
        """Encode images; `tower`, the number of the view, is ignored."""
        return self.encode_image(images)


def build_view_encoder(config: ViewConfig, *, image_size: int) -> ViewEncoder:
    """Build an image tower and its projection from a configuration, in train mode.

    Raises:
        ValueError: a model that cannot be built; see `build_image_backbone`.
    """
    tower = image_tower_around(build_image_backbone(config, image_size=image_size))
    hidden = config.projection_hidden
    # A pretrained backbone arrives in evaluation mode.
    return ViewEncoder(tower, feature_dim=config.feature_dim, hidden=hidden).train()


def _projection(width: int, feature_dim: int, hidden: int) -> nn.Module:
    if not hidden:
        return linear_projection(width, feature_dim)
    return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, feature_dim))
