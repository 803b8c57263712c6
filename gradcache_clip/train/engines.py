"""The engine that a configuration asks for."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gradcache_clip.distributed import DDPStrategy
from gradcache_clip.train.config import Config, ConfigError
from gradcache_clip.train.engine import Engine
from gradcache_clip.train.peers import Peers


def build_engine(encoder: nn.Module, loss: nn.Module, config: Config, peers: Peers) -> Engine:
    """The engine that `config.distributed` names; with one process, this process alone.

    Raises:
        ConfigError: settings that the engine cannot be exact with, or a DeepSpeed configuration
            that contradicts the run.
    """
    kind = config.distributed.engine
    if peers.world_size == 1 and kind != "deepspeed":
        return Engine(encoder, loss, config, encoder)
    _check_negatives(config, peers)
    if kind == "deepspeed":
        from gradcache_clip.train.engine_deepspeed import DeepSpeedTraining

        return DeepSpeedTraining(encoder, loss, config, peers)
    if kind == "fsdp":
        from gradcache_clip.train.engine_fsdp import ShardedEngine

        return ShardedEngine(encoder, loss, config)
    device = next(encoder.parameters()).device
    places = None if device.type == "cpu" else [device.index]
    module = DistributedDataParallel(encoder, device_ids=places)
    return Engine(encoder, loss, config, module, DDPStrategy())


def _check_negatives(config: Config, peers: Peers) -> None:
    if config.train.negatives != "batch":
        raise ConfigError(
            f"train.negatives: expected batch with {peers.world_size} processes, got "
            f"{config.train.negatives}, whose softmax ends at a chunk of one; train it with one"
        )
