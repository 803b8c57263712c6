"""The allocations and frees of a piece of a training step, in order, for any number of rows."""

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
    """Context that writes down what is allocated and freed on the meta device, and flops.

    Storages are numbered from 1 in the order in which they are made; an event is the number of a
    storage, negative where it is freed. `cut` ends a segment of events. A segment in which
    parameters got gradients has a twin, "NAME, added", in which these are added to others.

    Args:
        known: tensors that are there anyway; their storages do not count.
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
        """End the segment that began at the last cut, and name it."""
        self.segments[name], self.flops[name] = self._events, self._flops
        if self._accumulated:
            self.segments[f"{name}, added"] = _freed_where(self._events, self._accumulated)
        self._events, self._accumulated, self._flops = [], [], 0

    def mark(self, tensor: Tensor | None, kind: str) -> int:
        """The storage of a tensor is of this kind, whoever made it; its number."""
        if tensor is None:
            return 0
        number, _ = self._alive[tensor.untyped_storage()._cdata]
        self.kinds[number - 1] = kind
        return number

    def mark_gradient(self, leaf: Tensor) -> None:
        """`leaf.grad` is there; had there been one before, it would be freed now, added to that."""
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
        # Random states and constants stay on the host.
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


def _freed_where(events: Sequence[int], places: Iterable[tuple[int, int]]) -> list[int]:
    """The same events with frees of further storages put in at these places."""
    result, start = [], 0
    for place, number in places:
        result += [*events[start:place], -number]
        start = place
    return [*result, *events[start:]]


def _freed(recorder: weakref.ref[Recorder], key: int, _: weakref.ref[Any]) -> None:
    live = recorder()
    if live is not None:
        live._free(key)


# Workspaces inside of these ops, whose size the planner fills in.
_TAGGED = {
    "contrast_statistics": "statistics workspace",
    "contrast_gradient": "gradient workspace",
    "late_interaction": "statistics workspace",
    "late_interaction_gradient": "gradient workspace",
}


@dataclass(frozen=True)
class Trace:
    """Segments of events, and the size of every storage as a polynomial in the number of rows.

    Recorded at equally spaced numbers of rows: two for what grows linearly, three for a loss that
    holds a matrix of all pairs. Between and beyond them sizes are extrapolated storage by storage,
    exactly: no sum or peak is.
    """

    segments: dict[str, numpy.ndarray] = field(repr=False)
    kinds: Sequence[str] = field(repr=False)
    first_rows: int
    step: int
    differences: Sequence[numpy.ndarray] = field(repr=False)
    """Forward differences of the sizes in bytes, of order 0, 1 (and 2)."""
    flop_differences: dict[str, Sequence[float]]
    """The same of the flops of each segment."""

    def sizes(self, rows: int) -> numpy.ndarray:
        """Bytes of each storage, in float64, which is exact up to 8 PiB."""
        return numpy.rint(self._newton(self.differences, rows))

    def flops(self, segment: str, rows: int) -> float:
        """Operations of matrix products, convolutions and attention: two per multiply-add."""
        return float(self._newton(self.flop_differences[segment], rows))

    def bytes_left_by(self, segment: str, rows: int, *, without: str = "") -> int:
        """Bytes that a segment allocates and does not free, without storages of a kind."""
        events, sizes = self.segments[segment], self.sizes(rows)
        counted = sizes * [kind != without for kind in self.kinds]
        return int((numpy.sign(events) * counted[abs(events) - 1]).sum())

    def _newton(self, differences: Sequence[Any], rows: int) -> Any:
        t = (rows - self.first_rows) / self.step
        terms = (1.0, t, t * (t - 1) / 2)
        return sum(difference * term for difference, term in zip(differences, terms, strict=False))


def join_recordings(recordings: Sequence[Recorder], rows: Sequence[int]) -> Trace:
    """One trace of recordings of the same work at equally spaced numbers of rows.

    Raises:
        ValueError: the work itself depends on the number of rows.
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
