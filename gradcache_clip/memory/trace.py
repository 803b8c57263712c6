"""Traces of allocations and frees in a part of a training step, for any number of rows."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class Recorder(TorchDispatchMode):
    """Context manager that records allocations, frees and flops on the meta device.

    Storages are numbered from 1 in order of creation. An event is the number of a storage, negative
    if it is freed. `cut` ends a segment of events. A segment in which parameters got gradients has
    a variant, "NAME, added", in which they add to existing gradients.

    Args:
        known: tensors that exist before; their storages do not count.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self.kinds: list[str] = []
        self.segments: dict[str, list[int]] = {}
        self.flops: dict[str, int] = {}
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._alive: dict[int, tuple[int, Any]] = {}
        self._events: list[int] = []
        self._accumulated: list[tuple[int, int]] = []
        self._flops = 0

    def cut(self, name: str) -> None:
        """End the segment since the last cut, and name it."""
        self.segments[name], self.flops[name] = self._events, self._flops
        if self._accumulated:
            self.segments[f"{name}, added"] = _freed_where(self._events, self._accumulated)
        self._events, self._accumulated, self._flops = [], [], 0

    def mark(self, tensor: Tensor | None, kind: str) -> int:
        """Set the kind of a tensor's storage; returns the storage's number."""
        if tensor is None:
            return 0
        number, _ = self._alive[tensor.untyped_storage()._cdata]
        self.kinds[number - 1] = kind
        return number

    def mark_gradient(self, leaf: Tensor) -> None:
        """Mark `leaf.grad`, and where it would be freed if it were added to an existing one."""
        if number := self.mark(leaf.grad, "gradient"):
            self._accumulated.append((len(self._events), number))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        tag = _TAGGED.get(name)
        inside = None if tag is None else self._add(0, tag)
        output = func(*args, **kwargs)
        kind = "attention" if "attention" in name else "activation"
        for tensor in output if isinstance(output, (tuple, list)) else (output,):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage(), kind)
        if inside is not None:
            self._events.append(-inside)
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self._flops += formula(*args, **kwargs, out_val=output)
        return output

    def _see(self, storage: torch.UntypedStorage, kind: str) -> None:
        key = storage._cdata
        # Only meta storages count: random states and constants are on the host.
        if key in self._alive or key in self._known or storage.device.type != "meta":
            return
        number = self._add(storage.nbytes(), kind)
        freed = partial(_freed, weakref.ref(self), key)
        self._alive[key] = number, weakref.ref(storage, freed)

    def _add(self, nbytes: int, kind: str) -> int:
        self.sizes.append(nbytes)
        self.kinds.append(kind)
        self._events.append(len(self.sizes))
        return len(self.sizes)

    def _free(self, key: int) -> None:
        number, _ = self._alive.pop(key)
        self._events.append(-number)


def _freed_where(events: Sequence[int], frees: Iterable[tuple[int, int]]) -> list[int]:
    """Insert frees, pairs of an index into the events and a storage's number."""
    result, start = [], 0
    for index, number in frees:
        result += [*events[start:index], -number]
        start = index
    return [*result, *events[start:]]


def _freed(recorder: weakref.ref[Recorder], key: int, _: weakref.ref[Any]) -> None:
    live = recorder()
    if live is not None:
        live._free(key)


# Ops with a workspace inside, whose size depends on the card and is filled in by the planner.
_TAGGED = {
    "contrast_statistics": "statistics workspace",
    "contrast_gradient": "gradient workspace",
    "late_interaction": "statistics workspace",
    "late_interaction_gradient": "gradient workspace",
}


@dataclass(frozen=True)
class Trace:
    """Segments of events, and the size of each storage as a polynomial in the number of rows.

    Recorded at equally spaced numbers of rows: two for linear growth, three for a loss with a
    matrix of all pairs. Each storage is extrapolated by itself, which is exact; extrapolating sums
    or peaks would not be.
    """

    segments: dict[str, numpy.ndarray] = field(repr=False)
    kinds: Sequence[str] = field(repr=False)
    first_rows: int
    step: int
    differences: Sequence[numpy.ndarray] = field(repr=False)
    """Forward differences of the sizes in bytes, of order 0, 1 (and 2)."""
    flop_differences: dict[str, Sequence[float]]
    """Forward differences of the flops of each segment."""

    def sizes(self, rows: int) -> numpy.ndarray:
        """Return the bytes of each storage, in float64, which is exact up to 8 PiB."""
        return numpy.rint(self._newton(self.differences, rows))

    def flops(self, segment: str, rows: int) -> float:
        """Return flops of matrix products, convolutions and attention, two per multiply-add."""
        return float(self._newton(self.flop_differences[segment], rows))

    def bytes_left_by(self, segment: str, rows: int, *, without: str = "") -> int:
        """Return the bytes that a segment leaves allocated, except storages of a kind."""
        events, sizes = self.segments[segment], self.sizes(rows)
        counted = sizes * [kind != without for kind in self.kinds]
        return int((numpy.sign(events) * counted[abs(events) - 1]).sum())

    def _newton(self, differences: Sequence[Any], rows: int) -> Any:
        """Evaluate Newton's forward-difference polynomial at a number of rows."""
        t = (rows - self.first_rows) / self.step
        terms = (1.0, t, t * (t - 1) / 2)
        return sum(difference * term for difference, term in zip(differences, terms, strict=False))


def join_recordings(recordings: Sequence[Recorder], rows: Sequence[int]) -> Trace:
    """Combine recordings of the same work at equally spaced numbers of rows into one trace.

    Raises:
        ValueError: the sequence of ops depends on the number of rows.
    """
    first = recordings[0]
    for other, count in zip(recordings, rows, strict=True):
        if other.segments != first.segments:
            raise ValueError(
                f"encoder: expected the same ops for any number of rows, got others for {count} "
                f"than for {rows[0]}; count its steps with count_cached_step instead"
            )
    sizes = [numpy.array(each.sizes, dtype=numpy.float64) for each in recordings]
    flops = {name: [float(each.flops[name]) for each in recordings] for name in first.flops}
    return Trace(
        segments={name: numpy.array(e, dtype=numpy.int64) for name, e in first.segments.items()},
        kinds=tuple(first.kinds),
        first_rows=rows[0],
        step=rows[1] - rows[0],
        differences=_forward_differences(sizes),
        flop_differences={name: _forward_differences(each) for name, each in flops.items()},
    )


def _forward_differences(values: Sequence[Any]) -> list[Any]:
    differences, left = [], list(values)
    while left:
        differences.append(left[0])
        left = [after - before for before, after in pairwise(left)]
    return differences
