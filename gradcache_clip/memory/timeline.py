"""A training step as a list of allocations and frees, assembled from traces."""

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
    """Maximum of bytes alive at once."""

    nbytes: int
    by_kind: dict[str, int]
    phase: str


@dataclass
class Timeline:
    """Allocations and frees in the order of a step; every storage has a number.

    Args:
        shares: this process's share of a kind, such as {"optimizer": 1 / 4} under ZeRO.
        tags: bytes of storages whose sizes are not in the traces, by kind.
        rounded: round sizes like the CUDA allocator, to 512 bytes.
    """

    shares: dict[str, float] = field(default_factory=dict)
    tags: dict[str, int] = field(default_factory=dict)
    rounded: bool = True
    _events: list[numpy.ndarray] = field(default_factory=list)
    _phases: list[tuple[int, str]] = field(default_factory=list)
    _sizes: list[numpy.ndarray] = field(default_factory=list)
    _kinds: list[str] = field(default_factory=list)
    _offsets: dict[tuple[int, Rows, int], int] = field(default_factory=dict)
    _length: int = 0

    def enter(self, phase: str) -> None:
        """Begin a phase of the step."""
        self._phases.append((self._length, phase))

    def hold(self, sizes: list[int] | numpy.ndarray, kind: str) -> range:
        """Allocate storages of these sizes in bytes; returns their numbers."""
        first = len(self._kinds) + 1
        self._add_storages(numpy.asarray(sizes, dtype=numpy.float64), [kind] * len(sizes))
        numbers = range(first, first + len(sizes))
        self._add_events(numpy.array(numbers, dtype=numpy.int64))
        return numbers

    def drop(self, numbers: range) -> None:
        """Free storages by their numbers."""
        self._add_events(-numpy.array(numbers, dtype=numpy.int64))

    def run(
        self, trace: Trace, *segments: str, rows: Rows, again: int = 0, without: str = ""
    ) -> None:
        """Append segments of a trace, without storages of a kind that already exist.

        `again` distinguishes runs of the same trace, whose storages differ.
        """
        run = id(trace), rows, again
        if run not in self._offsets:
            self._offsets[run] = len(self._kinds)
            self._add_storages(self._open_sizes(trace, rows), list(trace.kinds))
        for segment in segments:
            events = trace.segments[segment]
            if without in trace.kinds:
                others = numpy.array([kind != without for kind in trace.kinds])
                events = events[others[abs(events) - 1]]
            self._add_events(events + numpy.sign(events) * self._offsets[run])

    def peak(self) -> Peak:
        """Return the peak of the step, its phase and its composition."""
        events, sizes = self.events(), self.sizes()
        live = numpy.cumsum(numpy.sign(events) * sizes[abs(events) - 1])
        at = int(live.argmax())
        return Peak(int(live[at]), self._by_kind(events[: at + 1], sizes), self._phase_at(at))

    def peak_of(self, phase: str) -> Peak:
        """Return the peak within one phase."""
        events, sizes = self.events(), self.sizes()
        live = numpy.cumsum(numpy.sign(events) * sizes[abs(events) - 1])
        start, stop = self._span(phase)
        at = start + int(live[start:stop].argmax())
        return Peak(int(live[at]), self._by_kind(events[: at + 1], sizes), phase)

    def live_at(self, phase: str) -> int:
        """Return the bytes alive at the beginning of a phase."""
        events, sizes = self.events()[: self._span(phase)[0]], self.sizes()
        return int((numpy.sign(events) * sizes[abs(events) - 1]).sum())

    def reserved(self, capacity: int | None = None) -> int:
        """Simulate the CUDA allocator; returns the peak bytes of its segments.

        Raises:
            DoesNotFit: the step needs more than `capacity` bytes.
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
        """Return all events: numbers of allocated storages, negative numbers of freed ones."""
        return numpy.concatenate(self._events)

    def sizes(self) -> numpy.ndarray:
        """Return the bytes of every storage."""
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
