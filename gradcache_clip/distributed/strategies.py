"""How a backward is taken: on one process, or on many under any of the usual engines."""

from gradcache_clip.distributed.strategy import LocalStrategy
from gradcache_clip.distributed.strategy_all_reduce import AllReduceStrategy
from gradcache_clip.distributed.strategy_ddp import DDPStrategy
from gradcache_clip.distributed.strategy_deepspeed import DeepSpeedStrategy
from gradcache_clip.distributed.strategy_fsdp import FSDPStrategy
from gradcache_clip.distributed.wrappers import innermost

__all__ = [
    "AllReduceStrategy",
    "DDPStrategy",
    "DeepSpeedStrategy",
    "FSDPStrategy",
    "LocalStrategy",
    "innermost",
]
