"""The gradient-caching engine."""

from gradcache_clip.cache.auxiliary import AuxiliaryOutput
from gradcache_clip.cache.batch_tree import Shared
from gradcache_clip.cache.deferred import deferred_step
from gradcache_clip.cache.grad_cache import GradCache
from gradcache_clip.cache.lengths import ByLength
from gradcache_clip.cache.methods import methods
from gradcache_clip.cache.packed import PackedPatches
from gradcache_clip.cache.packed_tokens import PackedTokens
from gradcache_clip.cache.replay_check import ReplayMismatchError
from gradcache_clip.cache.rows import Ragged, Rows
from gradcache_clip.cache.trunk import FrozenTrunk

__all__ = [
    "AuxiliaryOutput",
    "ByLength",
    "FrozenTrunk",
    "GradCache",
    "PackedPatches",
    "PackedTokens",
    "Ragged",
    "ReplayMismatchError",
    "Rows",
    "Shared",
    "deferred_step",
    "methods",
]
