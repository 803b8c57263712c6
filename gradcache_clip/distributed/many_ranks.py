"""What strategies for several processes have in common."""

from __future__ import annotations

import torch

from gradcache_clip.distributed.collectives import world_size
from gradcache_clip.distributed.strategy import LocalStrategy


class ManyRanks(LocalStrategy):
    """Base of the strategies for several processes: ranks average, and wait for each other.

    The loss must be that of the global batch, the same on every rank, and must give each rank the
    gradient of its own rows without summing over ranks, as `ClipLoss` and `gather_rows` do. With
    a loss over the local rows alone, or one gathered by `torch.distributed.nn.all_gather`, whose
    backward sums over ranks already, gradients come out larger by the world size.

    The global loss asks for the sum over ranks where gradients are averaged, so feature gradients
    are multiplied by the world size. Gradients of the loss's own parameters are complete on every
    rank and are not reduced.
    """

    reduces = True

    def __init__(self, grad_scaler: torch.amp.GradScaler | None = None) -> None:
        super().__init__(grad_scaler)

    @property
    def talks(self) -> bool:
        return world_size() > 1

    @property
    def recovers(self) -> bool:
        return False

    def gradient_factor(self) -> float:
        return float(world_size())
