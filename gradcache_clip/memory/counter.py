"""Counting the bytes of live tensors: exact, on any device, and without allocating anything."""

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
    """Bytes that `torch.cuda.memory_allocated` reports for one tensor of `nbytes`.

    The caching allocator rounds every request up to a multiple of 512 bytes. What this leaves out
    is the unsplit remainder: a request above 1 MiB that is served from a cached block less than
    1 MiB larger keeps that block whole, which depends on the history of the allocator. Nor is
    this `memory_reserved`, where segments of 2 MiB (requests up to 1 MiB), 20 MiB (up to 10 MiB)
    and multiples of 2 MiB (beyond) are taken from the driver.
    Source: c10/core/AllocatorConfig.h and `round_size` in c10/cuda/CUDACachingAllocator.cpp.

    Example:
        >>> cuda_block_bytes(0), cuda_block_bytes(1), cuda_block_bytes(513)
        (0, 512, 1024)
    """
    return -(-nbytes // _CUDA_BLOCK_BYTES) * _CUDA_BLOCK_BYTES


class LiveBytes(TorchDispatchMode):
    """Context that counts the bytes of live tensor storages, and their peak.

    A storage counts from the op that returned it until it is freed, once however many views of it
    live, and so do the activations that autograd saved for the backward. Works on real tensors of
    any device, on the meta device, and under `FakeTensorMode` (entered outside this context).

    Tensors made before entering count only when they are given as `start`; views of others are
    free. Not seen: workspaces inside one op (a BLAS packing buffer), memory not allocated by an op
    (`torch.from_numpy`), and a storage resized through `untyped_storage()` until an op meets it.

    Args:
        start: tensors that are alive on entry, or a mapping from a kind to such tensors. Without
            a kind they count as "start".
        kind: name under which new storages count in `bytes_by_kind`, until `mark` renames them.
        rounding: "none" counts the storages' own sizes, "cuda" what the CUDA caching allocator
            hands out for them (`cuda_block_bytes`).
        on_op: called after every op with the bytes alive then, to draw them over time.

    Attributes, all in bytes:
        start_bytes: the storages of `start`.
        peak_bytes: the most that lived at once, `start_bytes` included.
        peak_by_kind: what `peak_bytes` consisted of when it was first reached.
        largest_tensor_bytes: the largest single storage made inside the context, unrounded.

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
        self._live: dict[int, _Entry] = {}
        # Storages that were there before and do not count; their views must not either.
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
        """Bytes alive now, for each kind that lives."""
        self._measure_again()
        return {kind: nbytes for kind, nbytes in self._bytes_by_kind.items() if nbytes}

    def mark(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Count the storages of `tensors` under `kind` from now on, whoever made them."""
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
        """An argument that no op in here made is foreign; one that was resized is counted anew."""
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
    """One live storage. The reference's callback runs when the storage itself is freed."""

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
    """Storages of all tensors in a nest; tensor subclasses are taken apart first."""
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
