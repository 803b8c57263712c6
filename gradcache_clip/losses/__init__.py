"""Losses as modules, over the ops."""

from gradcache_clip.losses.clip import ClipLoss, ContrastiveOutput

__all__ = ["ClipLoss", "ContrastiveOutput"]
