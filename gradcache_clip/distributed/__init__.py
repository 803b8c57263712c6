"""Several processes: collectives, and strategies for taking a backward."""

from gradcache_clip.distributed.collectives import gather_rows, world_size
from gradcache_clip.distributed.strategies import (
    AllReduceStrategy,
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    LocalStrategy,
)

__all__ = [
    "AllReduceStrategy",
    "DDPStrategy",
    "DeepSpeedStrategy",
    "FSDPStrategy",
    "LocalStrategy",
    "gather_rows",
    "world_size",
]
