"""The gradient-caching engine."""

from gradcache_clip.cache.grad_cache import GradCache
from gradcache_clip.cache.replay_check import ReplayMismatchError

__all__ = ["GradCache", "ReplayMismatchError"]
