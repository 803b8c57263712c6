"""Momentum (EMA) key encoder, as in MoCo."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from gradcache_clip.train.towers import DualEncoder, ImageTower, TextTower
from gradcache_clip.train.views import ViewEncoder


class MomentumEncoder(nn.Module):
    """A query encoder, and its exponential moving average as key encoder.

    Called as `encoder(tower, inputs)`: towers 0 to n - 1 are those of `query`, towers n to 2 n - 1
    their averages. The averages are frozen submodules, so `GradCache` embeds their inputs once per
    step without replaying them, and every checkpoint contains them.

    Args:
        query: the encoder to train; the average starts as a copy of it.
        towers: n, the number of its towers.
        momentum: m; after a step, keys = m keys + (1 - m) queries.

    Source:
        He et al. 2020, "Momentum contrast for unsupervised visual representation learning",
        equation 2.

    Example:
        >>> import torch
        >>> from gradcache_clip.train.views import ViewEncoder
        >>> tower = ImageTower(torch.nn.Flatten(), width=12, mean=[0.5] * 3, std=[0.5] * 3)
        >>> encoder = MomentumEncoder(ViewEncoder(tower, feature_dim=4), towers=1, momentum=0.5)
        >>> with torch.no_grad():
        ...     _ = encoder.query.image_projection.weight.fill_(1.0)
        ...     _ = encoder.key.image_projection.weight.fill_(0.0)
        >>> encoder.update()
        >>> encoder.key.image_projection.weight[0, 0].item()
        0.5
    """

    def __init__(self, query: DualEncoder | ViewEncoder, *, towers: int, momentum: float) -> None:
        super().__init__()
        self.towers, self.momentum = towers, momentum
        self.query = query
        self.key = copy.deepcopy(query).requires_grad_(False)

    def forward(self, tower: int, inputs: Any) -> Tensor:
        """Return features (B, D) of a query tower, or of the average of one."""
        encoder, tower = (
            (self.query, tower) if tower < self.towers else (self.key, tower - self.towers)
        )
        features: Tensor = encoder(tower, inputs)
        return features

    def update(self) -> None:
        """Update the average; call it after each optimizer step."""
        move = get_ema_multi_avg_fn(self.momentum)
        move([*self.key.parameters()], [*self.query.parameters()], None)

    @property
    def image_tower(self) -> ImageTower:
        return self.query.image_tower

    @property
    def text_tower(self) -> TextTower:
        assert isinstance(self.query, DualEncoder)
        return self.query.text_tower

    def encode_image(self, images: Tensor) -> Tensor:
        """Encode images with the query encoder."""
        return self.query.encode_image(images)

    def encode_text(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Encode texts with the query encoder, which must have a text tower."""
        assert isinstance(self.query, DualEncoder)
        return self.query.encode_text(inputs)
