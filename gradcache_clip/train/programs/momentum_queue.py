"""MoCo for any program: a momentum encoder, and queues of earlier keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gradcache_clip.cache.batch_tree import pick_rows
from gradcache_clip.cache.torch_state import has_batch_statistics
from gradcache_clip.distributed.collectives import world_size
from gradcache_clip.losses import FeatureQueue, InfoNCELoss, MoCoLoss
from gradcache_clip.train.config import Config
from gradcache_clip.train.config_errors import ConfigError
from gradcache_clip.train.config_loss import MoCoConfig
from gradcache_clip.train.config_section import expect
from gradcache_clip.train.momentum import MomentumEncoder


class MomentumQueue:
    """Builds a program's encoder, loss and inputs for MoCo.

    Args:
        config: of the run.
        towers: number of towers; each has its own momentum encoder and queue.

    Source:
        He et al. 2020, "Momentum contrast for unsupervised visual representation learning".
    """

    def __init__(self, config: Config, *, towers: int) -> None:
        self.config, self.towers = config, towers
        self._shuffles = False

    @property
    def _loss(self) -> MoCoConfig:
        loss = self.config.loss
        assert isinstance(loss, MoCoConfig)
        return loss

    @property
    def candidates(self) -> int:
        """Candidates of a query: its own key and the queue."""
        return self._loss.queue_size + 1

    def encoder(self, query: Any) -> MomentumEncoder:
        """Return the towers together with their moving average."""
        encoder = MomentumEncoder(query, towers=self.towers, momentum=self._loss.momentum)
        self._shuffles = has_batch_statistics(encoder)
        if self._shuffles:
            self._check_chunks()
        return encoder

    def loss(self, loss: InfoNCELoss, width: int) -> MoCoLoss:
        """Return `loss` with queues for features of width D.

        Raises:
            ConfigError: the queue does not divide by the number of processes.
        """
        size, ranks = self._loss.queue_size, world_size()
        if size % ranks:
            raise ConfigError(
                f"loss.queue_size: expected a multiple of the {ranks} processes, got {size}; use "
                f"loss.queue_size={size // ranks * ranks}"
            )
        return MoCoLoss(loss, [FeatureQueue(size, width) for _ in range(self.towers)])

    def inputs(self, queries: tuple[Any, ...], keys: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return inputs of all towers and averages; batch norm requires shuffled keys."""
        if self._shuffles:
            images = keys[0]
            keys = pick_rows(keys, self._order(len(images)).to(images.device))
        return *queries, *keys

    def loss_kwargs(self, rows: int, device: torch.device) -> dict[str, Any]:
        """Return the position of each query's key, if keys are shuffled."""
        if not self._shuffles:
            return {}
        return {"order": self._order(rows).argsort().to(device, non_blocking=True)}

    def after_step(self, encoder: nn.Module, loss: nn.Module) -> None:
        """Update the average, and push the keys of this step to the queues."""
        assert isinstance(encoder, MomentumEncoder) and isinstance(loss, MoCoLoss)
        encoder.update()
        loss.push()

    def _order(self, rows: int) -> Tensor:
        """Order keys so that those of one chunk of queries are spread over all chunks.

        Otherwise a query could recognise its own key by their chunk's batch statistics (section
        3.3).
        """
        chunks = -(-rows // self.config.train.chunk_size)
        return torch.cat([torch.arange(first, rows, chunks) for first in range(chunks)])

    def _check_chunks(self) -> None:
        train = self.config.train
        if train.chunk_size >= train.batch_size:
            raise ConfigError(
                f"train.chunk_size: expected less than train.batch_size, which is "
                f"{train.batch_size}, for towers with batch norm under loss.name=moco, got "
                f"{train.chunk_size}; with one chunk, batch statistics would reveal a query's key"
            )


def check_queue(config: Config) -> None:
    """Raise ConfigError for settings under which a moving average or a queue would be wrong."""
    loss, rows = config.loss, config.train.batch_size
    if not isinstance(loss, MoCoConfig):
        return
    expect(config, "train.grad_cache", True, "loss.name=moco")
    expect(config, "train.ema_decay", 0.0, "loss.name=moco, which averages the weights itself")
    # Every process updates its own copy of the average, which needs unsharded weights.
    expect(config, "distributed.strategy", "ddp", "loss.name=moco")
    if loss.queue_size < rows:
        raise ConfigError(
            f"loss.queue_size: expected at least train.batch_size, which is {rows}, got "
            f"{loss.queue_size}; use e.g. loss.queue_size={4 * rows}"
        )
