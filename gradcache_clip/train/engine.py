"""Builds module, optimizer and strategy from a configuration, and steps them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from gradcache_clip.distributed import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    LocalStrategy,
)
from gradcache_clip.distributed.strategies import innermost
from gradcache_clip.train.config import Config
from gradcache_clip.train.config_errors import ConfigError
from gradcache_clip.train.deepspeed_config import deepspeed_settings, zero_stage
from gradcache_clip.train.optimizer import build_optimizer, parameter_groups
from gradcache_clip.train.peers import Peers
from gradcache_clip.train.precision import autocast, make_scaler


@dataclass
class Engine:
    """An encoder and a loss trained together, on one process or several.

    Weights and state are exchanged unsharded and by name, so a checkpoint loads under any other
    strategy and number of processes. All processes call `finish_step`, `weights`, `state` and
    their counterparts together.
    """

    module: nn.Module
    """The encoder in its wrapper (DDP, FSDP, DeepSpeed), called as `module(tower, inputs)`."""
    loss: nn.Module
    strategy: LocalStrategy
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    max_grad_norm: float
    precision: str

    @property
    def evaluated(self) -> nn.Module:
        """The encoder to call without gradients."""
        return self.strategy.unwrap(self.module)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's parameter groups."""
        return self.optimizer.param_groups

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the autocast context that the encoder runs in."""
        return autocast(self.precision, next(self.module.parameters()).device)

    def set_learning_rate(self, rate: float) -> None:
        """Set the learning rate of the next step."""
        self.strategy.set_learning_rate(self.optimizer, rate)

    def begin_step(self) -> None:
        """Discard the gradients of the last step."""
        self.optimizer.zero_grad(set_to_none=True)

    def finish_step(self) -> Tensor:
        """Clip gradients and step; returns the global norm before clipping. Never synchronises."""
        return self.strategy.step(self.optimizer, [self.module, self.loss], self.max_grad_norm)

    def weights(self) -> dict[str, Tensor]:
        """Return all weights of the encoder on rank 0; elsewhere some tensors may be empty."""
        return self.strategy.weights(self.module)

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Load the result of `weights`."""
        self.strategy.load_weights(self.module, weights)

    def state(self) -> dict[str, Any]:
        """Return optimizer and scaler state, complete on rank 0."""
        return self.strategy.state(self.optimizer, [self.module, self.loss])

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Load the result of `state`."""
        self.strategy.load_state(self.optimizer, [self.module, self.loss], state)


def build_engine(encoder: nn.Module, loss: nn.Module, config: Config, peers: Peers) -> Engine:
    """Build the engine for `config.distributed`; one process needs no wrapper.

    Args:
        encoder, loss: on this process's device, with equal weights on all processes.
        config: of the run; `distributed.deepspeed_config` may name a file.
        peers: the processes.

    Raises:
        ConfigError: settings under which the strategy would not be exact, or a DeepSpeed
            configuration that contradicts the run.
    """
    kind = config.distributed.strategy
    if peers.world_size == 1 and kind != "deepspeed":
        return _with(LocalStrategy, encoder, loss, config)
    if not config.train.grad_cache:
        raise ConfigError(
            f"train.grad_cache: expected true with {peers.world_size} processes, got false, which "
            "limits the softmax to a chunk of one process; use one process"
        )
    if kind == "deepspeed":
        return _in_deepspeed(encoder, loss, config, peers)
    if kind == "fsdp":
        return _sharded(encoder, loss, config)
    device = next(encoder.parameters()).device
    device_ids = None if device.type == "cpu" else [device.index]
    module = nn.parallel.DistributedDataParallel(encoder, device_ids=device_ids)
    return _with(DDPStrategy, module, loss, config)


def repeated_layers(encoder: nn.Module) -> Iterator[nn.Module]:
    """Yield the blocks of an encoder: items of its outermost lists of modules of one class.

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


def _with(
    strategy: type[LocalStrategy | DDPStrategy | FSDPStrategy],
    module: nn.Module,
    loss: nn.Module,
    config: Config,
    optimizer: torch.optim.Optimizer | None = None,
) -> Engine:
    precision = config.train.precision
    scaler = make_scaler(precision, next(module.parameters()).device)
    optimizer = optimizer or build_optimizer(config.optimizer, innermost(module), loss)
    norm = config.optimizer.max_grad_norm
    return Engine(module, loss, strategy(scaler), optimizer, scaler, norm, precision)


def _sharded(encoder: nn.Module, loss: nn.Module, config: Config) -> Engine:
    """Shard each block of both towers by itself, then the rest of the encoder together."""
    if config.train.precision == "fp16":
        raise ConfigError(
            "train.precision: expected fp32 or bf16 with distributed.strategy=fsdp, got fp16, "
            "under which each process would check only its own shard for overflow; use bf16"
        )
    _refuse_average(config, "distributed.strategy=fsdp", "distributed.strategy=ddp")
    # dict.fromkeys: towers may share blocks, and a module can be sharded only once.
    for layer in dict.fromkeys(repeated_layers(encoder)):
        fully_shard(layer)
    fully_shard(encoder)
    optimizer = build_optimizer(config.optimizer, encoder)
    # A separate group: fused optimizers cannot mix sharded and plain tensors in one.
    trained = [parameter for parameter in loss.parameters() if parameter.requires_grad]
    optimizer.add_param_group({"params": trained, "weight_decay": 0.0})
    return _with(FSDPStrategy, encoder, loss, config, optimizer)


def _in_deepspeed(encoder: nn.Module, loss: nn.Module, config: Config, peers: Peers) -> Engine:
    """Put the encoder into a DeepSpeed engine, with the optimizer of its file or with ours.

    The logit scale stays outside, in fp32 on every process with its own optimizer, because its
    gradient is already complete on every process.
    """
    settings = deepspeed_settings(config, peers.world_size)
    if zero_stage(settings) == 3:
        _refuse_average(config, "ZeRO-3, which shards the weights", "ZeRO-2")
    engine = _initialize(encoder, config, settings)
    optimizer = build_optimizer(config.optimizer, loss)
    # DeepSpeed casts the weights and scales the loss itself.
    scaler = torch.amp.GradScaler(enabled=False)
    norm = settings["gradient_clipping"]
    return Engine(engine, loss, DeepSpeedStrategy(engine), optimizer, scaler, norm, "fp32")


def _initialize(encoder: nn.Module, config: Config, settings: dict[str, Any]) -> Any:
    if next(encoder.parameters()).device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # DeepSpeed requires the variable, which only a launcher sets.
    os.environ.setdefault("LOCAL_RANK", "0")
    import deepspeed

    if "optimizer" in settings:
        groups = parameter_groups(encoder)
        engine, *_ = deepspeed.initialize(model=encoder, model_parameters=groups, config=settings)
    else:
        optimizer = build_optimizer(config.optimizer, encoder)
        engine, *_ = deepspeed.initialize(model=encoder, optimizer=optimizer, config=settings)
    return engine


def _refuse_average(config: Config, where: str, instead: str) -> None:
    if config.train.ema_decay:
        raise ConfigError(
            f"train.ema_decay: expected 0 with {where}, got {config.train.ema_decay}; use {instead}"
        )
