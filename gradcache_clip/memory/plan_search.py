"""Searches for the largest batch or chunk that fits."""

from __future__ import annotations

from collections.abc import Callable

from gradcache_clip.memory.allocator import DoesNotFit
from gradcache_clip.memory.timeline import Timeline

LARGEST_ROWS = 2**24
_RESOLUTION = 128


def largest_that_fits(step: Callable[[int], Timeline], capacity: int, at_most: int) -> int:
    """Find the largest size up to `at_most` whose step fits into `capacity` bytes of segments.

    First bisects on the peak of tensors, which never shrinks as the size grows. Then simulates the
    allocator on smaller sizes, in steps of under 1 %, because fragmentation is not monotonic.
    """
    bound = _largest(lambda size: step(size).peak().nbytes <= capacity, at_most)
    lower, gap = bound, max(1, bound // _RESOLUTION)
    upper = bound + 1
    while lower > 0 and not fits(step(lower), capacity):
        upper, lower, gap = lower, max(0, lower - gap), 2 * gap
    while upper - lower > max(1, upper // _RESOLUTION):
        middle = (lower + upper) // 2
        lower, upper = (middle, upper) if fits(step(middle), capacity) else (lower, middle)
    return _rounded_down(lower)


def fits(timeline: Timeline, capacity: int) -> bool:
    """Return whether the allocator completes a step within `capacity` bytes."""
    try:
        timeline.reserved(capacity)
    except DoesNotFit:
        return False
    return True


def _largest(holds: Callable[[int], bool], at_most: int) -> int:
    """Bisect for the largest size up to `at_most` for which a monotonic condition holds."""
    if holds(at_most):
        return at_most
    low, high = 0, at_most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _rounded_down(size: int) -> int:
    """Round a size of 64 or more down to a multiple of 8, which suits matrix units."""
    return size if size < 64 else size - size % 8
