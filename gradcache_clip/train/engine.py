"""What holds the parameters of a run, reduces their gradients and steps: one process, or DDP."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from gradcache_clip.distributed import LocalStrategy
from gradcache_clip.train.config import Config, ConfigError
from gradcache_clip.train.optimizer import apply_learning_rate, build_optimizer, clip_grad_norm
from gradcache_clip.train.optimizer_state import load_state_by_name, state_by_name
from gradcache_clip.train.precision import autocast, make_scaler


class Engine:
    """An encoder and a loss that learn together, in this process alone or in several.

    Weights and states go in and out whole and by name, so a checkpoint of one engine and number of
    processes serves every other. `weights` and `state` are called by all processes together.

    Args:
        encoder, loss: on the device of this process.
        config: of the run.
        module: the encoder as it is called while training, `module(tower, inputs)`.
        strategy: how `GradCache` takes a backward through it; None: this process alone.

    Attributes:
        named_parameters: of the encoder and the loss.
    """

    def __init__(
        self,
        encoder: nn.Module,
        loss: nn.Module,
        config: Config,
        module: nn.Module,
        strategy: LocalStrategy | None = None,
    ) -> None:
        self.encoder, self.loss, self.config, self.module = encoder, loss, config, module
        self.device = next(encoder.parameters()).device
        # Once: sharded encoders show others while they are gathered.
        self.named_parameters = [*encoder.named_parameters(), *loss.named_parameters()]
        self.scaler = make_scaler(config.train.precision, self.device)
        self.strategy = strategy or LocalStrategy()
        self.strategy.grad_scaler = self.scaler
        self.optimizer = self._optimizer()

    @property
    def evaluated(self) -> nn.Module:
        """The encoder as it is called without gradients."""
        return self.strategy.unwrap(self.module)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Of the optimizer."""
        return self.optimizer.param_groups

    def autocast(self) -> AbstractContextManager[Any]:
        """The context that the encoder runs in."""
        return autocast(self.config.train.precision, self.device)

    def set_learning_rate(self, rate: float) -> None:
        """For the next step."""
        apply_learning_rate(self.optimizer, rate)

    def begin_step(self) -> None:
        """Forget the gradients of the last one."""
        self.optimizer.zero_grad(set_to_none=True)

    def finish_step(self) -> Tensor:
        """Gradients, clipped, into the weights; their global norm before. Nothing waits."""
        self.scaler.unscale_(self.optimizer)
        norm = self._clip(self.config.optimizer.max_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return norm

    def weights(self) -> dict[str, Tensor]:
        """The whole encoder, on the first process; on others some may be left out."""
        return self.encoder.state_dict()

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """What `weights` returned."""
        self.encoder.load_state_dict(weights)

    def state(self) -> dict[str, Any]:
        """All else that the next step depends on, on the first process, as `weights`."""
        moments = state_by_name(self.optimizer, self.named_parameters)
        return {"optimizer": moments, "scaler": self.scaler.state_dict()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """What `state` returned."""
        load_state_by_name(self.optimizer, self.named_parameters, state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])

    def _optimizer(self) -> torch.optim.Optimizer:
        return build_optimizer(self.config.optimizer, self.encoder, self.loss)

    def _clip(self, max_norm: float) -> Tensor:
        return clip_grad_norm((p for _, p in self.named_parameters if p.requires_grad), max_norm)


def rows_of_a_process(config: Config, processes: int) -> int:
    """Pairs of a step that each of so many processes embeds.

    Raises:
        ConfigError: the batch does not divide by the number of processes.
    """
    rows, rest = divmod(config.train.batch_size, processes)
    if rest:
        fitting = [n for n in (rows * processes, (rows + 1) * processes) if n]
        raise ConfigError(
            f"train.batch_size: expected a multiple of the {processes} processes, which share it, "
            f"got {config.train.batch_size}; use {' or '.join(map(str, fitting))}"
        )
    return rows
