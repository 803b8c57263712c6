"""Compare features of embed and replay: if they differ, gradients are silently wrong."""

from __future__ import annotations

import torch
from torch import Tensor

from gradcache_clip.cache.batch_tree import chunk_of
from gradcache_clip.cache.chunks import Chunk
from gradcache_clip.cache.first_step import operations
from gradcache_clip.cache.kept import Kept, named_tensors
from gradcache_clip.cache.random_state import RandomState, accelerators_among
from gradcache_clip.cache.rounding import relative, row_norms, tolerance_of, wide
from gradcache_clip.cache.tower import Tower
from gradcache_clip.cache.trace import Watched, watch
from gradcache_clip.distributed.strategies import LocalStrategy

# Replayed features that wait to be compared: a share of all features, and not many bytes.
_COLLECTED_SHARE, _COLLECTED_BYTES = 4, 2**20

_ON_ANOTHER_RANK = (
    "expected every rank's replay to repeat its embed, got another rank where it did not, whose "
    "error says where."
)
_LEFT = "The gradients in .grad are not exact: call optimizer.zero_grad() and do not step."
_TAKEN_BACK = "Nothing of this step is left in .grad."


class ReplayMismatchError(RuntimeError):
    """The features of a chunk differ between embed and replay, so its gradients are not exact."""


class _Compared:
    """How far every replayed row of one feature of a tower has moved, on its device.

    A kernel costs the same for one small chunk as for several, so small chunks are collected first.
    """

    def __init__(self, tower: Tower, whole: Tensor) -> None:
        self.tower, self.whole, self.tolerance = tower, whole, tolerance_of(whole)
        self.moved = whole.new_zeros(len(whole), dtype=wide(whole.dtype))
        self.chunks: list[Chunk] = []
        row_bytes = max(1, whole[:1].numel() * self.moved.element_size())
        self._collected: list[Chunk] = []
        self._room = min(len(whole) // _COLLECTED_SHARE, _COLLECTED_BYTES // row_bytes)
        self._rows = self.moved.new_empty((self._room, *whole.shape[1:]))
        self._filled = 0

    def add(self, chunk: Chunk, again: Tensor) -> None:
        self.chunks.append(chunk)
        stop = self._filled + again.shape[0]
        follows = not self._collected or self._collected[-1].span.stop == chunk.span.start
        if stop > self._room or not follows:
            self._compare_collected()
            stop = again.shape[0]
        if stop > self._room:
            self._note(chunk.span, again.detach().to(self.moved.dtype) - self.whole[chunk.rows])
        else:
            self._rows[self._filled : stop] = again.detach()
            self._filled = stop
            self._collected.append(chunk)

    def _compare_collected(self) -> None:
        if self._collected:
            rows = slice(self._collected[0].span.start, self._collected[-1].span.stop)
            self._note(rows, self._rows[: self._filled].sub_(self.whole[rows]))
            self._collected, self._filled = [], 0

    def _note(self, rows: slice, change: Tensor) -> None:
        self.moved[rows] = row_norms(change)

    def relative(self) -> Tensor:
        """Return each row's change relative to its size; zero for rows that were not replayed."""
        self._compare_collected()
        return relative(self.moved, self.whole)

    def failures(self, *, alone: bool) -> list[tuple[Tower, Chunk, float]]:
        """List chunks beyond tolerance, each with its largest change.

        `alone`: whether this rank can run the encoder by itself, to see what it computes in.
        """
        relative = self.relative()
        worst = [(self.tower, chunk, float(relative[chunk.rows].amax())) for chunk in self.chunks]
        found = [each for each in worst if not each[2] <= self.tolerance]
        if not found:
            return []
        # An encoder may compute in 16 bits and return 32.
        dtypes = {p.dtype for module in self.tower.modules for p in module.parameters()}
        if alone:
            dtypes |= operations(self.tower, found[0][1]).dtypes
        tolerance = tolerance_of(self.whole, dtypes)
        return [each for each in found if not each[2] <= tolerance]


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

    def failures(self, *, alone: bool) -> list[tuple[Tower, Chunk, float]]:
        """List chunks beyond tolerance; the only place where the check waits for the device."""
        compared = self._begun()
        if not compared:
            return []
        worst = torch.stack([each.relative().amax().to(self.device) for each in compared]).tolist()
        failing = (
            each
            for each, change in zip(compared, worst, strict=True)
            if not change <= each.tolerance
        )
        return [failure for each in failing for failure in each.failures(alone=alone)]


def failures_of(check: ReplayCheck, mode: str, strategy: LocalStrategy, *, undone: bool) -> str:
    """Describe mismatches, on every rank if one has any; empty if there are none.

    `undone`: whether an error takes the gradients of the step back.

    Raises:
        ReplayMismatchError: with mode "error", instead of a warning.
    """
    if mode == "off":
        return ""
    failures = check.failures(alone=not strategy.collective_forward)
    # On the features' device: NCCL reduces nothing that lies on the host.
    if not strategy.anywhere(bool(failures), check.device):
        return ""
    message = describe(failures) if failures else _ON_ANOTHER_RANK
    if mode == "error":
        raise ReplayMismatchError(f"{message} {_TAKEN_BACK if undone else _LEFT}")
    return f"{message} {_LEFT}"


def describe(failures: list[tuple[Tower, Chunk, float]]) -> str:
    """Describe the worst chunk, and the module that most likely causes it."""
    tower, chunk, change = max(failures, key=lambda failure: failure[2])
    index = next(i for i, each in enumerate(tower.chunks) if each is chunk)
    chunks = len({id(chunk) for _, chunk, _ in failures})
    return (
        f"{tower.name}, chunk {index} of {len(tower.chunks)}: expected the replay to repeat the "
        f"embed up to rounding, got features that changed by {change:.1e} (relative; "
        f"{chunks} chunks in all). {_likely_cause(tower, chunk)}"
    )


def _likely_cause(tower: Tower, chunk: Chunk) -> str:
    state = RandomState.capture(accelerators_among(tower.features))
    try:
        rows = chunk_of(tower.inputs, chunk, tower.replaced)
        kept = {path: Kept(each) for path, each in named_tensors(rows, "input")}
        first = _watched(tower, chunk)
        if changed := [path for path, each in kept.items() if each.changed]:
            return (
                f"Likely cause: the encoder changes its input in place ({changed[0]}); let it "
                "work on a copy, such as x = x * 2 for x *= 2."
            )
        again = _watched(tower, chunk, expected=first).difference
        graph = _watched(tower, chunk, expected=first, with_graph=True).difference
    except Exception as error:  # Whatever happens here must not hide the mismatch itself.
        return f"The cause could not be found ({type(error).__name__}: {error})."
    finally:
        state.restore()
    if again is not None:
        return (
            f"Likely cause: {again.label} does not repeat itself with torch's random state "
            "restored (it draws from numpy, random or a generator of its own, or carries state "
            "from one call to the next)."
        )
    if graph is not None:
        return f"Likely cause: {graph.label} computes something else when gradients are enabled."
    return (
        "The encoder repeats itself now, so its input, its weights or its state were changed in "
        "place between the two passes."
    )


def _watched(
    tower: Tower, chunk: Chunk, expected: Watched | None = None, *, with_graph: bool = False
) -> Watched:
    """Trace one more pass over the chunk, with the random numbers of its embed."""
    if chunk.random_state is not None:
        chunk.random_state.restore()
    tolerance = max(map(tolerance_of, tower.features)) / 10
    return watch(tower, chunk, expected=expected, tolerance=tolerance, with_graph=with_graph)
