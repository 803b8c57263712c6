"""Simulates PyTorch's caching allocator for CUDA: segments, splits, merges, releases.

Source: c10/cuda/CUDACachingAllocator.cpp and c10/core/AllocatorConfig.h, with their defaults.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from itertools import count

MIB = 2**20
# As there: kMinBlockSize, kSmallSize, kSmallBuffer, kLargeBuffer, kMinLargeAlloc, kRoundLarge.
_BLOCK = 512
_LARGEST_SMALL = MIB
_SMALL_SEGMENT = 2 * MIB
_LARGE_SEGMENT = 20 * MIB
_LEAST_OWN_SEGMENT = 10 * MIB
_SEGMENT_STEP = 2 * MIB


class DoesNotFit(Exception):
    """No memory is left, and no cached segment can be released."""


class _Block:
    """Part of a segment, between its neighbours `before` and `after`."""

    __slots__ = ("after", "before", "free", "serial", "size", "small")

    def __init__(self, size: int, small: bool, serial: int) -> None:
        self.size, self.small, self.serial, self.free = size, small, serial, False
        self.before: _Block | None = None
        self.after: _Block | None = None


class CachingAllocator:
    """Tracks allocated and freed sizes in bytes, without allocating memory.

    A request is rounded up to 512 bytes. Up to 1 MiB it is taken from a segment of 2 MiB, up to 10
    MiB from a segment of 20 MiB; beyond that it gets its own segment, a multiple of 2 MiB. The
    smallest sufficient free block is used, and split unless the rest is under 512 bytes (in a small
    segment) or at most 1 MiB (in a large one). Free neighbours are merged. If a new segment would
    exceed the capacity, all segments without a used block are released first.

    Args:
        capacity: total bytes of segments; None for no limit.

    Attributes, in bytes:
        allocated: of used blocks, as `torch.cuda.memory_allocated`.
        reserved: of segments, as `torch.cuda.memory_reserved`.
        peak_reserved: maximum of `reserved`.

    Example:
        >>> allocator = CachingAllocator()
        >>> block = allocator.allocate(1000)
        >>> allocator.allocated, allocator.reserved
        (1024, 2097152)
        >>> allocator.free(block)
        >>> allocator.allocated, allocator.reserved
        (0, 2097152)
    """

    def __init__(self, capacity: int | None = None) -> None:
        self.capacity = capacity
        self.allocated = self.reserved = self.peak_reserved = 0
        self._free: dict[bool, list[tuple[int, int, _Block]]] = {True: [], False: []}
        self._serials = count()

    def allocate(self, nbytes: int) -> _Block:
        """Allocate a block of at least `nbytes`.

        Raises:
            DoesNotFit: there is no room for it.
        """
        size = max(_BLOCK, -(-nbytes // _BLOCK) * _BLOCK)
        small = size <= _LARGEST_SMALL
        block = self._best_fit(size, small) or self._new_segment(size, small)
        self._split(block, size)
        block.free = False
        self.allocated += block.size
        return block

    def free(self, block: _Block) -> None:
        """Free a block: merge it with free neighbours and cache it."""
        self.allocated -= block.size
        for neighbour in (block.before, block.after):
            if neighbour is not None and neighbour.free:
                self._take(neighbour)
                self._merge(block, neighbour)
        self._keep(block)

    def _best_fit(self, size: int, small: bool) -> _Block | None:
        pool = self._free[small]
        # Sorted by size; (size, -1) precedes every block of this size.
        index = bisect_left(pool, (size, -1))
        return pool.pop(index)[2] if index < len(pool) else None

    def _new_segment(self, size: int, small: bool) -> _Block:
        if small:
            segment = _SMALL_SEGMENT
        elif size < _LEAST_OWN_SEGMENT:
            segment = _LARGE_SEGMENT
        else:
            segment = -(-size // _SEGMENT_STEP) * _SEGMENT_STEP
        if self.capacity is not None and self.reserved + segment > self.capacity:
            self._release_cached()
            if self.reserved + segment > self.capacity:
                raise DoesNotFit
        self.reserved += segment
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        return _Block(segment, small, next(self._serials))

    def _release_cached(self) -> None:
        for small, pool in self._free.items():
            # A free block without neighbours is a whole segment.
            whole = [entry for entry in pool if entry[2].before is entry[2].after is None]
            self.reserved -= sum(size for size, _, _ in whole)
            released = {serial for _, serial, _ in whole}
            self._free[small] = [entry for entry in pool if entry[1] not in released]

    def _split(self, block: _Block, size: int) -> None:
        rest = block.size - size
        if rest < _BLOCK or (not block.small and rest <= _LARGEST_SMALL):
            return
        tail = _Block(rest, block.small, next(self._serials))
        tail.before, tail.after = block, block.after
        if block.after is not None:
            block.after.before = tail
        block.size, block.after = size, tail
        self._keep(tail)

    def _merge(self, block: _Block, neighbour: _Block) -> None:
        """Extend `block` by its neighbour."""
        if neighbour is block.before:
            block.before = neighbour.before
            if neighbour.before is not None:
                neighbour.before.after = block
        else:
            block.after = neighbour.after
            if neighbour.after is not None:
                neighbour.after.before = block
        block.size += neighbour.size

    def _keep(self, block: _Block) -> None:
        block.free = True
        insort(self._free[block.small], (block.size, block.serial, block))

    def _take(self, block: _Block) -> None:
        pool = self._free[block.small]
        del pool[bisect_left(pool, (block.size, block.serial))]
