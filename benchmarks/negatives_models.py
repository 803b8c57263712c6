"""The towers of negatives.py. B rows, L words a text."""

from __future__ import annotations

from itertools import pairwise

import torch
from negatives_data import Pairs
from torch import Tensor, nn

FEATURES = 256

Towers = tuple[nn.Module, nn.Module]


class BagOfWords(nn.Module):
    """The mean of the vectors of a text's words, projected; 0 stands for no word."""

    def __init__(self, words: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.EmbeddingBag(words, width, mode="mean", padding_idx=0)
        self.projection = nn.Linear(width, FEATURES)

    def forward(self, rows: Tensor) -> Tensor:
        """(B, L) numbers of words to (B, FEATURES)."""
        return self.projection(self.embedding(rows))


class SmallConvNet(nn.Module):
    """Three convolutions of stride two over uint8 images; no batch norm, so chunks matter not."""

    def __init__(self, widths: tuple[int, ...] = (32, 64, 128)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in pairwise((3, *widths)):
            layers += [nn.Conv2d(before, after, 3, 2, 1), nn.GroupNorm(8, after), nn.GELU()]
        self.layers = nn.Sequential(*layers)
        self.projection = nn.Linear(widths[-1], FEATURES)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, height, width) to (B, FEATURES)."""
        return self.projection(self.layers(images.float() / 127.5 - 1).mean((2, 3)))


def head(width: int) -> nn.Sequential:
    """What is trained on top of a frozen encoder's (B, width) features."""
    layers = (nn.LayerNorm(width), nn.Linear(width, 512), nn.GELU(), nn.Dropout(0.2))
    return nn.Sequential(*layers, nn.Linear(512, FEATURES))


def two_heads(pairs: Pairs) -> Towers:
    """For features of frozen encoders on both sides."""
    return head(pairs.first.shape[1]), head(pairs.second.shape[1])


def two_bags(pairs: Pairs) -> Towers:
    """For texts on both sides, each with its own words."""
    return _bag(pairs.first, 256), _bag(pairs.second, 256)


def images_and_bags(pairs: Pairs) -> Towers:
    """For uint8 images and texts."""
    return SmallConvNet(), _bag(pairs.second, 128)


def _bag(rows: Tensor, width: int) -> BagOfWords:
    return BagOfWords(int(torch.max(rows)) + 1, width)
