"""The encoder sharded over the processes by torch's fully_shard (FSDP2)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from gradcache_clip.distributed import FSDPStrategy
from gradcache_clip.train.config import Config, ConfigError
from gradcache_clip.train.engine import Engine
from gradcache_clip.train.optimizer import build_optimizer
from gradcache_clip.train.optimizer_state import load_state_by_name, state_by_name
from gradcache_clip.train.peers import first_keeps


class ShardedEngine(Engine):
    """Each process keeps a part of every parameter, its moments and its gradient.

    The layers of both towers are sharded one by one, and what is left of the encoder together.

    Args:
        encoder, loss: on the device of this process, with the same weights on all.
        config: of the run.

    Raises:
        ConfigError: fp16 or a moving average of the weights is asked for.
    """

    def __init__(self, encoder: nn.Module, loss: nn.Module, config: Config) -> None:
        _check(config)
        # Towers may share layers.
        for layer in dict.fromkeys(repeated_layers(encoder)):
            fully_shard(layer)
        fully_shard(encoder)
        super().__init__(encoder, loss, config, encoder, FSDPStrategy())

    def weights(self) -> dict[str, Tensor]:
        # One at a time: no process has room for all of them.
        return {name: _on_first(value) for name, value in self.encoder.state_dict().items()}

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        for name, value in self.encoder.state_dict().items():
            value.copy_(_part(weights[name], value))

    def state(self) -> dict[str, Any]:
        return {
            "optimizer": state_by_name(self.optimizer, self.named_parameters, _on_first),
            "scaler": self.scaler.state_dict(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        load_state_by_name(self.optimizer, self.named_parameters, state["optimizer"], _part)

    def _optimizer(self) -> torch.optim.Optimizer:
        optimizer = build_optimizer(self.config.optimizer, self.encoder)
        # In a group of its own: an operation over a group takes sharded tensors or plain ones.
        trained = [parameter for parameter in self.loss.parameters() if parameter.requires_grad]
        optimizer.add_param_group({"params": trained, "weight_decay": 0.0})
        return optimizer

    def _clip(self, max_norm: float) -> Tensor:
        """The norm over all processes: of each shard here, then of what all have."""
        gradients = [p.grad for _, p in self.named_parameters if p.grad is not None]
        norms = [_whole(torch.linalg.vector_norm(gradient)) for gradient in gradients]
        norm = torch.linalg.vector_norm(torch.stack(norms))
        if max_norm > 0:
            factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
            for gradient in gradients:
                local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
                local.mul_(factor)
        return norm


def repeated_layers(encoder: nn.Module) -> Iterator[nn.Module]:
    """The outermost lists of several modules of one kind, item by item: blocks of a transformer.

    Example:
        >>> blocks = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
        >>> len([*repeated_layers(nn.ModuleDict({"blocks": blocks, "head": nn.Linear(2, 1)}))])
        2
    """
    for child in encoder.children():
        items = [*child] if isinstance(child, nn.ModuleList | nn.Sequential) else []
        if len(items) > 1 and len({type(item) for item in items}) == 1:
            yield from items
        else:
            yield from repeated_layers(child)


def _check(config: Config) -> None:
    if config.train.precision == "fp16":
        raise ConfigError(
            "train.precision: expected fp32 or bf16 with distributed.engine=fsdp, got fp16, whose "
            "scaled gradients no process sees whole; use bf16"
        )
    if config.train.ema_decay:
        raise ConfigError(
            f"train.ema_decay: expected 0 with distributed.engine=fsdp, got "
            f"{config.train.ema_decay}; use distributed.engine=ddp"
        )


def _whole(value: Any) -> Any:
    return value.full_tensor() if isinstance(value, DTensor) else value


def _on_first(value: Any) -> Any:
    """What a checkpoint holds of it."""
    return first_keeps(_whole(value)) if isinstance(value, DTensor) else value


def _part(value: Any, of: Tensor) -> Any:
    if not isinstance(of, DTensor):
        return value
    return distribute_tensor(value.to(of.device), of.device_mesh, of.placements)
