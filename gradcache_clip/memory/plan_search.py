"""How much of something fits: the largest batch, chunk, or share of kept graphs."""

from __future__ import annotations

from collections.abc import Callable

from gradcache_clip.memory.allocator import DoesNotFit
from gradcache_clip.memory.timeline import Timeline

LARGEST_ROWS = 2**24
_RESOLUTION = 128


def largest_that_fits(step: Callable[[int], Timeline], capacity: int, at_most: int) -> int:
    """The largest size up to `at_most` whose step fits into `capacity` bytes of segments.

    The bytes of its tensors are looked at first, for they never shrink as a size grows; then the
    allocator is played through, whose fragmentation is looked for in steps of under 1 %.
    """
    bound = _last(lambda size: step(size).peak().nbytes <= capacity, at_most)
    lower, gap = bound, max(1, bound // _RESOLUTION)
    upper = bound + 1
    while lower > 0 and not fits(step(lower), capacity):
        upper, lower, gap = lower, max(0, lower - gap), 2 * gap
    while upper - lower > max(1, upper // _RESOLUTION):
        middle = (lower + upper) // 2
        lower, upper = (middle, upper) if fits(step(middle), capacity) else (lower, middle)
    return _tidy(lower)


def fits(timeline: Timeline, capacity: int) -> bool:
    """Whether the allocator gets through a step with so many bytes."""
    try:
        timeline.reserved(capacity)
    except DoesNotFit:
        return False
    return True


def _last(holds: Callable[[int], bool], at_most: int) -> int:
    """The largest size up to `at_most` for which it holds, where it holds for all below."""
    if holds(at_most):
        return at_most
    low, high = 0, at_most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _tidy(size: int) -> int:
    """Down to a multiple of 8, which matrix units like, where that loses little."""
    return size if size < 64 else size - size % 8
