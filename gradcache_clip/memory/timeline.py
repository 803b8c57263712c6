"""A training step as one list of allocations and frees, put together from traces."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import numpy

from gradcache_clip.memory.allocator import CachingAllocator
from gradcache_clip.memory.counter import cuda_block_bytes
from gradcache_clip.memory.trace import Trace

Rows = int


@dataclass(frozen=True)
class Peak:
    """The most that lived at once, in bytes."""

    nbytes: int
    by_kind: dict[str, int]
    phase: str


@dataclass
class Timeline:
    """Allocations and frees in the order of a step; every number stands for one storage.

    Args:
        shares: part of a kind that this process holds, such as {"optimizer": 1 / 4} under ZeRO.
        tags: size in bytes of the storages of a kind that traces leave open.
        rounded: sizes as the CUDA allocator rounds them, to 512 bytes.
    """

    shares: dict[str, float] = field(default_factory=dict)
    tags: dict[str, int] = field(default_factory=dict)
    rounded: bool = True
    _events: list[numpy.ndarray] = field(default_factory=list)
    _phases: list[tuple[int, str]] = field(default_factory=list)
    _sizes: list[numpy.ndarray] = field(default_factory=list)
    _kinds: list[str] = field(default_factory=list)
    _places: dict[tuple[int, Rows, int], int] = field(default_factory=dict)
    _length: int = 0

    def enter(self, phase: str) -> None:
        """Begin a part of the step."""
        self._phases.append((self._length, phase))

    def hold(self, sizes: list[int] | numpy.ndarray, kind: str) -> range:
        """Allocate storages of these bytes; their numbers."""
        first = len(self._kinds) + 1
        self._add_storages(numpy.asarray(sizes, dtype=numpy.float64), [kind] * len(sizes))
        numbers = range(first, first + len(sizes))
        self._add_events(numpy.array(numbers, dtype=numpy.int64))
        return numbers

    def drop(self, numbers: range) -> None:
        """Free what was held."""
        self._add_events(-numpy.array(numbers, dtype=numpy.int64))

    def run(
        self, trace: Trace, *segments: str, rows: Rows, again: int = 0, without: str = ""
    ) -> None:
        """Append segments of a trace, leaving out storages of a kind that are there already.

        `again` tells apart two runs of the same segment.
        """
        place = id(trace), rows, again
        if place not in self._places:
            self._places[place] = len(self._kinds)
            self._add_storages(self._open_sizes(trace, rows), list(trace.kinds))
        for segment in segments:
            events = trace.segments[segment]
            if without in trace.kinds:
                others = numpy.array([kind != without for kind in trace.kinds])
                events = events[others[abs(events) - 1]]
            self._add_events(events + numpy.sign(events) * self._places[place])

    def peak(self) -> Peak:
        """When most bytes live, and what they are."""
        events, sizes = self.events(), self.sizes()
        live = numpy.cumsum(numpy.sign(events) * sizes[abs(events) - 1])
        at = int(live.argmax())
        return Peak(int(live[at]), self._by_kind(events[: at + 1], sizes), self._phase_at(at))

    def peak_of(self, phase: str) -> Peak:
        """The same within one phase."""
        events, sizes = self.events(), self.sizes()
        live = numpy.cumsum(numpy.sign(events) * sizes[abs(events) - 1])
        start, stop = self._span(phase)
        at = start + int(live[start:stop].argmax())
        return Peak(int(live[at]), self._by_kind(events[: at + 1], sizes), phase)

    def live_at(self, phase: str) -> int:
        """Bytes that live when a phase begins."""
        events, sizes = self.events()[: self._span(phase)[0]], self.sizes()
        return int((numpy.sign(events) * sizes[abs(events) - 1]).sum())

    def reserved(self, capacity: int | None = None) -> int:
        """Most bytes of segments that the CUDA allocator takes for this step.

        Raises:
            DoesNotFit: more than `capacity` bytes would be needed.
        """
        allocator, blocks, sizes = CachingAllocator(capacity), {}, self.sizes()
        whole = [int(size) for size in sizes]
        for number in self.events().tolist():
            if number > 0:
                if whole[number - 1]:
                    blocks[number] = allocator.allocate(whole[number - 1])
            elif -number in blocks:
                allocator.free(blocks.pop(-number))
        return allocator.peak_reserved

    def events(self) -> numpy.ndarray:
        """Numbers of storages as they are allocated, negative as they are freed."""
        return numpy.concatenate(self._events)

    def sizes(self) -> numpy.ndarray:
        """Bytes of every storage."""
        sizes = numpy.concatenate(self._sizes)
        if self.shares:
            sizes = sizes * [self.shares.get(kind, 1.0) for kind in self._kinds]
        return -(-sizes // _BLOCK) * _BLOCK if self.rounded else numpy.ceil(sizes)

    def _open_sizes(self, trace: Trace, rows: Rows) -> numpy.ndarray:
        sizes = trace.sizes(rows)
        for index, kind in enumerate(trace.kinds):
            if kind in self.tags:
                sizes[index] = self.tags[kind]
        return sizes

    def _add_storages(self, sizes: numpy.ndarray, kinds: list[str]) -> None:
        self._sizes.append(sizes)
        self._kinds.extend(kinds)

    def _add_events(self, events: numpy.ndarray) -> None:
        self._events.append(events)
        self._length += len(events)

    def _by_kind(self, events: numpy.ndarray, sizes: numpy.ndarray) -> dict[str, int]:
        alive = numpy.zeros(len(sizes), dtype=numpy.int64)
        numpy.add.at(alive, abs(events) - 1, numpy.sign(events))  # type: ignore[arg-type]
        parts: dict[str, int] = {}
        for index in alive.nonzero()[0]:
            kind = self._kinds[index]
            parts[kind] = parts.get(kind, 0) + int(sizes[index])
        return parts

    def _span(self, phase: str) -> tuple[int, int]:
        starts = pairwise([*self._phases, (self._length, "end")])
        return next((start, stop) for (start, name), (stop, _) in starts if name == phase)

    def _phase_at(self, at: int) -> str:
        return next((name for start, name in reversed(self._phases) if start <= at), "")


_BLOCK = cuda_block_bytes(1)
