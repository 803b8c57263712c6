"""PyTorch's caching allocator for CUDA, as far as sizes go: segments, splits, merges, releases.

Source: c10/cuda/CUDACachingAllocator.cpp and c10/core/AllocatorConfig.h, with their defaults.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from itertools import count

MIB = 2**20
_BLOCK = 512
_LARGEST_SMALL = MIB
_SMALL_SEGMENT = 2 * MIB
_LARGE_SEGMENT = 20 * MIB
_LEAST_OWN_SEGMENT = 10 * MIB
_SEGMENT_STEP = 2 * MIB


class DoesNotFit(Exception):
    """No memory is left, and no cached segment could be given back."""


class _Block:
    """A part of a segment; its neighbours in it are `before` and `after`."""

    __slots__ = ("after", "before", "free", "serial", "size", "small")

    def __init__(self, size: int, small: bool, serial: int) -> None:
        self.size, self.small, self.serial, self.free = size, small, serial, False
        self.before: _Block | None = None
        self.after: _Block | None = None


class CachingAllocator:
    """Allocates and frees sizes in bytes; holds no memory.

    A request is rounded up to 512 bytes. Up to 1 MiB it is cut from segments of 2 MiB; up to 10 MiB
    from segments of 20 MiB; beyond, it gets a segment of its own, a multiple of 2 MiB. The smallest
    free block that is large enough is taken, and split unless what is left is under 512 bytes (of
    a small segment) or 1 MiB. Free neighbours are merged. Where a new segment has no room, all
    segments without a used block are given back first.

    Args:
        capacity: bytes that segments may take together; None: no bound.

    Attributes, in bytes:
        allocated: of used blocks; `torch.cuda.memory_allocated`.
        reserved: of segments; `torch.cuda.memory_reserved`.
        peak_reserved: the most they took.

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
        """A block of at least so many bytes.

        Raises:
            DoesNotFit: there is no room for it.
        """
        size = max(_BLOCK, -(-nbytes // _BLOCK) * _BLOCK)
        small = size <= _LARGEST_SMALL
        block = self._found(size, small) or self._new_segment(size, small)
        self._split(block, size)
        block.free = False
        self.allocated += block.size
        return block

    def free(self, block: _Block) -> None:
        """Give a block back; it is merged with free neighbours and kept."""
        self.allocated -= block.size
        for neighbour in (block.before, block.after):
            if neighbour is not None and neighbour.free:
                self._take(neighbour)
                self._merge(block, neighbour)
        self._keep(block)

    def _found(self, size: int, small: bool) -> _Block | None:
        pool = self._free[small]
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
            self._give_back()
            if self.reserved + segment > self.capacity:
                raise DoesNotFit
        self.reserved += segment
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        return _Block(segment, small, next(self._serials))

    def _give_back(self) -> None:
        for small, pool in self._free.items():
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
        """`block` takes its neighbour over."""
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
