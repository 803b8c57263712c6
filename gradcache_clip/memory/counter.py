"""Counts the bytes of live tensors: exactly, on any device, without allocating anything."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

Rounding = Literal["none", "cuda"]

# c10/core/AllocatorConfig.h: "all sizes are rounded to at least 512 bytes".
_CUDA_BLOCK_BYTES = 512


def cuda_block_bytes(nbytes: int) -> int:
    """Return the bytes that `torch.cuda.memory_allocated` reports for a tensor of `nbytes`.

    The caching allocator rounds every request up to a multiple of 512 bytes. Unsplit remainders are
    not included: a request above 1 MiB served from a cached block less than 1 MiB larger keeps the
    whole block, which depends on the allocator's history. Nor is this `memory_reserved`, which
    counts segments of 2 MiB (for requests up to 1 MiB), 20 MiB (up to 10 MiB) and multiples of 2
    MiB (beyond).
    Source: c10/core/AllocatorConfig.h and `round_size` in c10/cuda/CUDACachingAllocator.cpp.

    Example:
        >>> cuda_block_bytes(0), cuda_block_bytes(1), cuda_block_bytes(513)
        (0, 512, 1024)
    """
    return -(-nbytes // _CUDA_BLOCK_BYTES) * _CUDA_BLOCK_BYTES


class LiveBytes(TorchDispatchMode):
    """Context manager that counts the bytes of live tensor storages, and their peak.

    A storage counts from the op that returned it until it is freed, once regardless of the number
    of views; so do activations that autograd saves for the backward. Works with real tensors on
    any device, on the meta device, and under `FakeTensorMode` (entered outside this context).

    Tensors created before entering count only if passed as `start`; views of others are free. Not
    counted: workspaces inside one op (a BLAS packing buffer), memory not allocated by an op
    (`torch.from_numpy`), and a storage resized through `untyped_storage()` until an op uses it.

    Args:
        start: tensors alive on entry, or a mapping from a kind to such tensors. Without a kind
            they count as "start".
        kind: kind of new storages in `bytes_by_kind`, until `mark` changes it.
        rounding: "none" counts the sizes of the storages, "cuda" the sizes that the CUDA caching
            allocator returns for them (`cuda_block_bytes`).
        on_op: called after every op with the bytes alive, e.g. to plot them over time.

    Attributes, all in bytes:
        start_bytes: storages of `start`.
        peak_bytes: maximum alive at once, including `start_bytes`.
        peak_by_kind: composition of `peak_bytes` when it was first reached.
        largest_tensor_bytes: largest single storage created inside the context, unrounded.

    Raises:
        ValueError: unknown `rounding`.

    Example:
        >>> weight = torch.ones(256, 4)
        >>> with LiveBytes(start=[weight]) as live:
        ...     doubled = weight * 2
        ...     del doubled
        >>> live.start_bytes, live.peak_bytes, live.current_bytes
        (4096, 8192, 4096)
    """

    def __init__(
        self,
        *,
        start: Iterable[Tensor] | Mapping[str, Iterable[Tensor]] = (),
        kind: str = "activation",
        rounding: Rounding = "none",
        on_op: Callable[[int], None] | None = None,
    ) -> None:
        super().__init__()
        if rounding not in ("none", "cuda"):
            raise ValueError(
                f"rounding: expected 'none' or 'cuda', got {rounding!r}; 'none' counts the bytes "
                "of the storages themselves"
            )
        self.kind = kind
        self._on_op = on_op
        self._round = cuda_block_bytes if rounding == "cuda" else int
        # By the address of the C++ storage, for which Python may create several objects.
        self._live: dict[int, _Entry] = {}
        # Storages from before that do not count, so that new views of them do not either.
        self._foreign: dict[int, weakref.ref[Any]] = {}
        self._bytes_by_kind: dict[str, int] = {}
        self._total_bytes = 0
        self.peak_bytes = 0
        self.peak_by_kind: dict[str, int] = {}
        self.largest_tensor_bytes = 0
        groups = start if isinstance(start, Mapping) else {"start": start}
        for name, tensors in groups.items():
            for storage in _storages_of(list(tensors)):
                self._count(storage, name)
        self.start_bytes = self._total_bytes
        self._update_peak()

    @property
    def current_bytes(self) -> int:
        """Bytes alive now."""
        self._measure_again()
        return self._total_bytes

    @property
    def bytes_by_kind(self) -> dict[str, int]:
        """Bytes alive now, by kind."""
        self._measure_again()
        return {kind: nbytes for kind, nbytes in self._bytes_by_kind.items() if nbytes}

    def mark(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Count the storages of `tensors` as `kind` from now on, also ones created before."""
        for storage in _storages_of(list(tensors)):
            self._foreign.pop(storage._cdata, None)
            entry = self._live.get(storage._cdata)
            if entry is None:
                self._count(storage, kind)
            else:
                self._add(entry.kind, -entry.nbytes)
                entry.kind = kind
                self._add(kind, entry.nbytes)
        self._update_peak()

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._measure_again()
        super().__exit__(exc_type, exc_value, traceback)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        known = list(_storages_of((args, kwargs)))
        for storage in known:
            self._meet(storage)
        output = func(*args, **kwargs)
        for storage in known:
            self._remeasure(storage)
        for storage in _storages_of(output):
            if storage._cdata not in self._foreign:
                self._count(storage, self.kind, made_here=True)
        self._update_peak()
        if self._on_op is not None:
            self._on_op(self._total_bytes)
        return output

    def _meet(self, storage: torch.UntypedStorage) -> None:
        """Remember an argument created outside as foreign; count a resized one anew."""
        key = storage._cdata
        if key in self._live:
            self._remeasure(storage)
        elif key not in self._foreign:
            self._foreign[key] = weakref.ref(storage, partial(_forget, self._foreign, key))

    def _count(self, storage: torch.UntypedStorage, kind: str, *, made_here: bool = False) -> None:
        key, nbytes = storage._cdata, storage.nbytes()
        if key in self._live:
            return self._remeasure(storage)
        if made_here:
            self.largest_tensor_bytes = max(self.largest_tensor_bytes, nbytes)
        reference = weakref.ref(storage, partial(_freed, weakref.ref(self), key))
        self._live[key] = _Entry(reference, self._round(nbytes), kind)
        self._add(kind, self._round(nbytes))

    def _remeasure(self, storage: torch.UntypedStorage) -> None:
        entry, nbytes = self._live.get(storage._cdata), storage.nbytes()
        if entry is None or entry.nbytes == self._round(nbytes):
            return
        self.largest_tensor_bytes = max(self.largest_tensor_bytes, nbytes)
        self._add(entry.kind, self._round(nbytes) - entry.nbytes)
        entry.nbytes = self._round(nbytes)

    def _measure_again(self) -> None:
        # resize_() of an untyped storage is not an op, so it goes unseen at first.
        for entry in list(self._live.values()):
            storage = entry.reference()
            if storage is not None:
                self._remeasure(storage)
        self._update_peak()

    def _add(self, kind: str, nbytes: int) -> None:
        self._bytes_by_kind[kind] = self._bytes_by_kind.get(kind, 0) + nbytes
        self._total_bytes += nbytes

    def _update_peak(self) -> None:
        if self._total_bytes > self.peak_bytes:
            self.peak_bytes = self._total_bytes
            self.peak_by_kind = {k: n for k, n in self._bytes_by_kind.items() if n}

    def _release(self, key: int) -> None:
        entry = self._live.pop(key)
        self._add(entry.kind, -entry.nbytes)


class _Entry:
    """One live storage. The weak reference's callback runs when the storage is freed."""

    __slots__ = ("kind", "nbytes", "reference")

    def __init__(self, reference: weakref.ref[Any], nbytes: int, kind: str) -> None:
        self.reference = reference
        self.nbytes = nbytes
        self.kind = kind


def _freed(counter: weakref.ref[LiveBytes], key: int, _: weakref.ref[Any]) -> None:
    live = counter()
    if live is not None:
        live._release(key)


def _forget(foreign: dict[int, Any], key: int, _: weakref.ref[Any]) -> None:
    del foreign[key]


def _storages_of(nested: Any) -> Iterator[torch.UntypedStorage]:
    """Yield the storages of all tensors in a nested structure, also inside tensor subclasses."""
    for leaf in pytree.tree_leaves(nested):
        if not isinstance(leaf, Tensor):
            continue
        if is_traceable_wrapper_subclass(leaf):
            names, _ = leaf.__tensor_flatten__()
            yield from _storages_of([getattr(leaf, name) for name in names])
        elif leaf.layout == torch.strided:
            yield leaf.untyped_storage()
        else:
            raise TypeError(
                f"tensor: expected a strided layout, got {leaf.layout}; LiveBytes cannot count "
                "its memory, so use dense tensors, such as nn.Embedding(..., sparse=False)"
            )
