"""Did the replay compute what the embed computed? If not, the gradients would be silently wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradcache_clip.cache.chunks import Chunk
from gradcache_clip.cache.nested import chunk_of, map_tensors, tensors_in
from gradcache_clip.cache.random_state import RandomState, accelerators_among
from gradcache_clip.cache.settings import kernels_as_with_gradients
from gradcache_clip.cache.tower import Tower
from gradcache_clip.cache.verify_state import Kept, named_tensors
from gradcache_clip.distributed.strategies import LocalStrategy

# Relative change of a chunk's features that rounding alone may cause, by the precision computed in.
_TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}
# Replayed features that wait to be compared: a share of all features, and not many bytes.
_COLLECTED_SHARE, _COLLECTED_BYTES = 4, 2**20

_ON_ANOTHER_RANK = (
    "expected every rank's replay to repeat its embed, got another rank where it did not, whose "
    "error says where. The gradients in .grad are not exact: call optimizer.zero_grad() and do not "
    "step."
)


class ReplayMismatchError(RuntimeError):
    """The features of a chunk differ between embed and replay, so its gradients are not exact."""


class _Compared:
    """How far every replayed row of one feature of a tower has moved, on its device.

    A kernel costs the same for one small chunk as for several, so small chunks are collected first.
    """

    def __init__(self, tower: Tower, whole: Tensor) -> None:
        self.tower, self.whole, self.tolerance = tower, whole, tolerance_of(whole)
        self.moved = whole.new_zeros(len(whole), dtype=_wide(whole.dtype))
        self.chunks: list[Chunk] = []
        row_bytes = max(1, whole[:1].numel() * self.moved.element_size())
        self._collected: list[Chunk] = []
        self._room = min(len(whole) // _COLLECTED_SHARE, _COLLECTED_BYTES // row_bytes)
        self._rows = self.moved.new_empty((self._room, *whole.shape[1:]))
        self._filled = 0

    def add(self, chunk: Chunk, again: Tensor) -> None:
        self.chunks.append(chunk)
        stop = self._filled + again.shape[0]
        if stop > self._room:
            self._compare_collected()
            stop = again.shape[0]
        if stop > self._room:
            self._note(chunk.rows, again.detach().to(self.moved.dtype) - self.whole[chunk.rows])
        else:
            self._rows[self._filled : stop] = again.detach()
            self._filled = stop
            self._collected.append(chunk)

    def _compare_collected(self) -> None:
        if self._collected:
            rows = _rows_of(self._collected)
            self._note(rows, self._rows[: self._filled].sub_(self.whole[rows]))
            self._collected, self._filled = [], 0

    def _note(self, rows: slice | Tensor, change: Tensor) -> None:
        self.moved[rows] = _row_norms(change)

    def relative(self) -> Tensor:
        """The change of every row over its size; zero for rows that were not replayed."""
        self._compare_collected()
        return _relative(self.moved, self.whole)

    def failures(self) -> list[tuple[Tower, Chunk, float]]:
        """Of each chunk beyond tolerance the largest change."""
        relative = self.relative()
        worst = [(self.tower, chunk, float(relative[chunk.rows].amax())) for chunk in self.chunks]
        return [each for each in worst if not each[2] <= self.tolerance]


class ReplayCheck:
    """Keeps one number per row on the device, and reads one per feature at the end of the step."""

    def __init__(self, device: torch.device) -> None:
        """`device`: where the features are, also on a rank that has nothing to compare."""
        self.device = device
        self._compared: dict[int, list[_Compared]] = {}

    def compare(self, tower: Tower, chunk: Chunk, replayed: list[Tensor]) -> None:
        compared = self._compared.get(id(tower))
        if compared is None:
            compared = [_Compared(tower, whole) for whole in tower.features]
            self._compared[id(tower)] = compared
        for each, again in zip(compared, replayed, strict=True):
            if again.is_floating_point():
                each.add(chunk, again)

    def _begun(self) -> list[_Compared]:
        return [each for tower in self._compared.values() for each in tower if each.chunks]

    def failures(self) -> list[tuple[Tower, Chunk, float]]:
        """Chunks that changed beyond tolerance, and by how much; the one wait of the check."""
        compared = self._begun()
        if not compared:
            return []
        worst = torch.stack([each.relative().amax().to(self.device) for each in compared]).tolist()
        failing = (
            each
            for each, change in zip(compared, worst, strict=True)
            if not change <= each.tolerance
        )
        return [failure for each in failing for failure in each.failures()]


def failures_of(check: ReplayCheck, mode: str, strategy: LocalStrategy) -> str:
    """What to warn of, on every rank if on one; empty if nothing.

    Raises:
        ReplayMismatchError: with mode "error", instead of a warning.
    """
    if mode == "off":
        return ""
    failures = check.failures()
    # On the features' device: NCCL reduces nothing that lies on the host.
    if not strategy.anywhere(bool(failures), check.device):
        return ""
    message = describe(failures) if failures else _ON_ANOTHER_RANK
    if mode == "error":
        raise ReplayMismatchError(message)
    return message


def _rows_of(chunks: Sequence[Chunk]) -> slice | Tensor:
    """Rows of chunks in the order of the batch: a range where none is missing between them."""
    rows = [chunk.rows for chunk in chunks]
    ranges = [each for each in rows if isinstance(each, slice)]
    if len(ranges) == len(rows) and ranges[-1].stop - ranges[0].start == sum(map(len, chunks)):
        return slice(ranges[0].start, ranges[-1].stop)
    return torch.cat([torch.arange(r.start, r.stop) if isinstance(r, slice) else r for r in rows])


def tolerance_of(features: Tensor) -> float:
    """Of the features' dtype, or of the coarser one that autocast computes in."""
    device_type = features.device.type
    coarse = (
        _TOLERANCE.get(torch.get_autocast_dtype(device_type), 0.0)
        if torch.is_autocast_enabled(device_type)
        else 0.0
    )
    return max(coarse, _TOLERANCE.get(features.dtype, 3e-2))


def describe(failures: list[tuple[Tower, Chunk, float]]) -> str:
    """The message for the first failing chunk, with the module that most likely causes it."""
    tower, chunk, change = max(failures, key=lambda failure: failure[2])
    index = next(i for i, each in enumerate(tower.chunks) if each is chunk)
    chunks = len({id(chunk) for _, chunk, _ in failures})
    return (
        f"{tower.name}, chunk {index} of {len(tower.chunks)}: expected the replay to repeat the "
        f"embed up to rounding, got features that changed by {change:.1e} (relative; "
        f"{chunks} chunks in all). {_likely_cause(tower, chunk)} The gradients in .grad are "
        "not exact: call optimizer.zero_grad() and do not step."
    )


def relative_change(before: Tensor, after: Tensor) -> Tensor:
    """Largest change of a row, relative to its own size or that of a mean row if it is smaller."""
    before, after = before.to(_wide(before.dtype)), after.to(_wide(after.dtype))
    return _relative(_row_norms(after - before), before).amax()


def _relative(moved: Tensor, features: Tensor) -> Tensor:
    sizes = _row_norms(features.to(moved.dtype))
    floor = sizes.mean().clamp_min(torch.finfo(torch.float32).tiny)
    return moved / torch.maximum(sizes, floor)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _row_norms(features: Tensor) -> Tensor:
    flat = features if features.ndim == 2 else features.reshape(len(features), -1)
    return torch.linalg.vector_norm(flat, dim=1)


def _likely_cause(tower: Tower, chunk: Chunk) -> str:
    state = RandomState.capture(accelerators_among(tower.features))
    try:
        rows = chunk_of(tower.inputs, chunk)
        kept = {path: Kept(each) for path, each in named_tensors(rows, "input")}
        with kernels_as_with_gradients():
            plain = _trace(tower, chunk, with_graph=False)
            if changed := [path for path, each in kept.items() if each.changed]:
                return (
                    f"Likely cause: the encoder changes its input in place ({changed[0]}); let it "
                    "work on a copy, such as x = x * 2 for x *= 2."
                )
            again = _trace(tower, chunk, with_graph=False)
        graph = _trace(tower, chunk, with_graph=True)
    except Exception as error:  # Whatever happens here must not hide the mismatch itself.
        return f"The cause could not be found ({type(error).__name__}: {error})."
    finally:
        state.restore()
    if name := _first_difference(plain, again):
        return (
            f"Likely cause: {name} does not repeat itself with torch's random state restored "
            "(it draws from numpy, random or a generator of its own, or carries state from one "
            "call to the next)."
        )
    if name := _first_difference(again, graph):
        return f"Likely cause: {name} computes something else when gradients are enabled."
    return (
        "The encoder repeats itself now, so its input, its weights or its state were changed in "
        "place between the two passes."
    )


def _first_difference(one: list[tuple[str, Any]], other: list[tuple[str, Any]]) -> str | None:
    pairs = zip(one, other, strict=False)
    return next((name for (name, a), (_, b) in pairs if not _same(a, b)), None)


def _trace(tower: Tower, chunk: Chunk, *, with_graph: bool) -> list[tuple[str, Any]]:
    """Output of every module, innermost first, in one more pass over the chunk."""
    outputs: list[tuple[str, Any]] = []

    def record(name: str, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        label = f"{name or 'the encoder'} ({type(module).__name__})"
        return module.register_forward_hook(
            lambda _m, _i, output: outputs.append((label, map_tensors(torch.clone, output)))
        )

    module = tower.bare_module
    handles = [record(name, child) for name, child in module.named_modules()]
    try:
        if chunk.random_state is not None:
            chunk.random_state.restore()
        with torch.set_grad_enabled(with_graph):
            tower.forward(module, chunk)
    finally:
        for handle in handles:
            handle.remove()
    return outputs


def _same(before: Any, after: Any) -> bool:
    pairs = zip(tensors_in(before), tensors_in(after), strict=False)
    return all(a.shape == b.shape and torch.allclose(a, b, equal_nan=True) for a, b in pairs)
