"""Several processes: collectives, and strategies for taking a backward."""

from gradcache_clip.distributed.collectives import gather_rows, world_size
from gradcache_clip.distributed.strategies import DDPStrategy, LocalStrategy

__all__ = ["DDPStrategy", "LocalStrategy", "gather_rows", "world_size"]
