"""Find out why a cached step differs from the plain one: one experiment per question."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gradcache_clip.cache.chunks import Chunk, indices, row_count
from gradcache_clip.cache.kept import Kept, named_tensors
from gradcache_clip.cache.torch_state import frozen_running_statistics
from gradcache_clip.cache.tower import Tower
from gradcache_clip.cache.trace import Place, Watched, largest_change, run, watch
from gradcache_clip.verification.state import Start

RANDOM, BATCH_NORM, STATE, IN_PLACE, ROWS, LOSSES, PADDING, BACKWARD, UNKNOWN = (
    "random", "batch norm", "state", "in place", "rows", "losses", "padding", "backward", "unknown",
)  # fmt: skip

_SHOWN = 3


class Reason(NamedTuple):
    """A cause of a difference, and the sentence that reports it."""

    kind: str
    text: str


class Experiments:
    """Experiments on one encoder; each pass starts from the state that the steps started from.

    Args:
        start: that state.
        index: the encoder's.
        make: returns new towers of all encoders.
        rounding: relative change of features to ignore.
    """

    def __init__(
        self, start: Start, index: int, make: Callable[[], list[Tower]], rounding: float
    ) -> None:
        self._start, self._rounding = start, rounding
        self._input = f"input {index}"
        self._make = lambda: make()[index]
        self._tower = self._make()
        self._chunks = [Chunk(chunk.rows) for chunk in self._tower.chunks]

    def reasons(self, *, replayed: bool, repeats: bool) -> Iterator[Reason]:
        """Yield the most telling reason first; an experiment that fails is reported as one.

        Args:
            replayed: whether the encoder is replayed; a frozen one is not.
            repeats: whether its replay is known to be right.
        """
        try:
            yield from self._found(replayed, repeats)
        except Exception as error:
            yield Reason(
                UNKNOWN,
                f"{self._tower.name}: diagnosis stopped early ({type(error).__name__}: {error})",
            )

    def _found(self, replayed: bool, repeats: bool) -> Iterator[Reason]:
        noted = self._watch(self._chunks[0])
        drew, norms = noted.drew["torch"], noted.batch_norms
        broken = [] if repeats else list(self._broken_replays(replayed))
        quieted = self._watch(self._chunks[0], [*drew, *norms])
        # The influence of other rows shows only where the same rows give the same features twice.
        comparable = not quieted.drew["torch"] and all(r.kind != STATE for r in broken)
        if drew:
            yield self._random(drew, quieted.drew["torch"])
        if norms:
            yield self._batch_norm(norms, self._apart(drew)[0] if comparable else None)
        yield from broken
        if comparable and not quieted.batch_norms:
            yield from self._rows([*drew, *norms])
            yield from self._losses([*drew, *norms])
            yield from self._padding([*drew, *norms])

    def _random(self, drew: Sequence[Place], still_draws: Sequence[Place]) -> Reason:
        hidden = (
            f"; {still_draws[0].label} draws in eval mode too, so it hides rows that look at other "
            "rows"
            if still_draws
            else ""
        )
        return Reason(
            RANDOM,
            f"{self._tower.name}: random layers: compared over the same chunks, with the same "
            f"draws: {_labels(drew)}{hidden}",
        )

    def _batch_norm(self, norms: Sequence[Place], change: float | None) -> Reason:
        how_much = "" if change is None else f", which changes features by {change:.1e} (relative)"
        return Reason(
            BATCH_NORM,
            f"{self._tower.name}: batch norm in train mode normalises each chunk by itself"
            f"{how_much}: {_labels(norms)}; put these layers into eval mode, or use layer or group "
            "norm",
        )

    def _broken_replays(self, replayed: bool) -> Iterator[Reason]:
        """Replay chunks as the engine does; report differences, and inputs that were changed."""
        passes = _Passes(self._start, self._make(), self._input, self._rounding / 10)
        name = self._tower.name
        if passes.again is not None:
            yield Reason(STATE, f"{name}: {self._state(passes.again, passes.first)}")
        elif passes.graph is not None and replayed:
            yield Reason(
                STATE,
                f"{name}: {passes.graph.label} computes something else when gradients are enabled, "
                "as they are in the replay alone",
            )
        for path in passes.changed_inputs if replayed else ():
            yield Reason(
                IN_PLACE,
                f"{name}: {path} is changed in place by the encoder, so the replay reads other "
                "values than the embed; let the encoder work on a copy",
            )

    def _state(self, place: Place, first: Watched) -> str:
        outside = [name for name in ("numpy", "Python's random") if place in first.drew[name]]
        kept = [] if place.module is None else self._start.changed_in(place.module)
        if outside:
            why = f"it draws from {outside[0]}; use torch's generator"
        elif kept:
            why = f"it carries state from one call to the next in {', '.join(kept[:_SHOWN])}"
        else:
            why = "it draws from a generator of its own, or carries state from one call to the next"
        return (
            f"{place.label} does not repeat itself with torch's random state restored, as the "
            f"replay must: {why}"
        )

    def _rows(self, quiet: Sequence[Place]) -> Iterator[Reason]:
        change, place = self._apart(quiet)
        if change <= self._rounding:
            return
        padded = " or at how far these are padded" if isinstance(self._tower.inputs, list) else ""
        yield Reason(
            ROWS,
            f"{self._tower.name}: rows look at other rows{padded}: features of a chunk differ by "
            f"{change:.1e} (relative) from those of the same rows in the whole batch"
            f"{_first_in(place)}; compute each row from itself alone there, or do it in the loss, "
            "which is given the whole batch",
        )

    def _losses(self, quiet: Sequence[Place]) -> Iterator[Reason]:
        whole = self._mean_losses([Chunk(slice(0, row_count(self._chunks)))], quiet)
        parts = self._mean_losses(self._chunks, quiet)
        for name, one, other in zip(self._tower.losses, parts, whole, strict=True):
            if abs(one - other) > self._rounding * abs(other):
                yield Reason(
                    LOSSES,
                    f"{self._tower.name}: the auxiliary loss {name!r} is not a mean over rows: the "
                    f"mean of the chunks' own is {one:.6g}, that of the whole batch {other:.6g}; "
                    "return its sums per row as features, and let the loss add them up",
                )

    def _mean_losses(self, chunks: Sequence[Chunk], quiet: Sequence[Place]) -> list[float]:
        """Average each auxiliary loss over the rows of all chunks."""
        parts = [self._run_all(chunk, quiet) for chunk in chunks]
        losses = [features[len(features) - len(self._tower.losses) :] for features in parts]
        return [float(torch.cat(each).mean()) for each in zip(*losses, strict=True)]

    def _padding(self, quiet: Sequence[Place]) -> Iterator[Reason]:
        for trimmed in self._tower.chunks:
            if trimmed.columns is None:
                continue
            short, long = self._run(trimmed, quiet), self._run(Chunk(trimmed.rows), quiet)
            change = largest_change(short, long)
            if change <= self._rounding:
                continue
            expected = self._watch(trimmed, quiet)
            place = self._watch(Chunk(trimmed.rows), quiet, expected).difference
            yield Reason(
                PADDING,
                f"{self._tower.name}: padding counts: features change by {change:.1e} (relative) "
                f"when {self._trimmed(trimmed)} keep only the columns of a chunk's longest row"
                f"{_first_in(place)}; follow attention_mask there, name the token tensors with "
                "ByLength(columns=...), or leave sort_by_length out",
            )
            return

    def _trimmed(self, chunk: Chunk) -> str:
        """Name the tensors that are cut."""
        named = named_tensors(self._tower.passed, self._input)
        return ", ".join(path for path, tensor in named if id(tensor) in (chunk.columns or ()))

    def _apart(self, quiet: Sequence[Place]) -> tuple[float, Place | None]:
        """Compare features of chunks with the whole batch's; name the first module to differ."""
        whole = self._run(Chunk(slice(0, row_count(self._chunks))), quiet)
        changes = [
            largest_change(self._run(chunk, quiet), [feature[chunk.rows] for feature in whole])
            for chunk in self._chunks
        ]
        change = max(changes)
        if change <= self._rounding:
            return change, None
        worst = self._chunks[changes.index(change)]
        others = [chunk for chunk in self._chunks if chunk is not worst]
        together = Chunk(torch.cat([indices(chunk) for chunk in (worst, *others)]))
        alone = self._watch(worst, quiet)
        return change, self._watch(together, quiet, alone).difference

    def _watch(
        self, chunk: Chunk, quiet: Iterable[Place] = (), expected: Watched | None = None
    ) -> Watched:
        self._begin(quiet)
        return watch(self._tower, chunk, expected=expected, tolerance=self._rounding)

    def _run(self, chunk: Chunk, quiet: Iterable[Place]) -> list[Tensor]:
        """Features without auxiliary losses, which other rows may change."""
        features = self._run_all(chunk, quiet)
        return features[: len(features) - len(self._tower.losses)]

    def _run_all(self, chunk: Chunk, quiet: Iterable[Place]) -> list[Tensor]:
        self._begin(quiet)
        return run(self._tower, chunk)

    def _begin(self, quiet: Iterable[Place]) -> None:
        self._start.restore()
        for place in quiet:
            if place.module is not None:
                # Its own flag alone; restored with all plain attributes.
                place.module.training = False


class _Passes:
    """All chunks of a tower, as in the embed, the same again, and the same with a graph.

    Between the passes only torch's generators and the inputs are put back: the engine does the
    former, and would have to do the latter.

    Attributes:
        first: trace of the first chunk's first pass.
        again, graph: the module that differed in the second and in the third pass.
        changed_inputs: places in the input that the first pass wrote to.
    """

    def __init__(self, start: Start, tower: Tower, name: str, tolerance: float) -> None:
        start.restore()
        # A frozen trunk is not replayed.
        tower.run_trunk_once()
        inputs = {path: Kept(tensor) for path, tensor in named_tensors(tower.inputs, name)}
        state = start.random_state()
        self.first = self._all_chunks(tower, tolerance)
        self.changed_inputs = [path for path, kept in inputs.items() if kept.changed]
        found = []
        with frozen_running_statistics([tower.bare_module]):
            for with_graph in (False, True):
                state.restore()
                for kept in inputs.values():
                    kept.put_back()
                watched = self._all_chunks(tower, tolerance, self.first, with_graph=with_graph)
                found.append(watched.difference)
        self.again, self.graph = found

    def _all_chunks(
        self,
        tower: Tower,
        tolerance: float,
        expected: Watched | None = None,
        *,
        with_graph: bool = False,
    ) -> Watched:
        first, *others = tower.chunks
        watched = watch(tower, first, expected=expected, tolerance=tolerance, with_graph=with_graph)
        for chunk in others:
            run(tower, chunk)
        return watched


def _first_in(place: Place | None) -> str:
    return "" if place is None else f", first in {place.label}"


def _labels(places: Sequence[Place]) -> str:
    return listed([place.label for place in places])


def listed(names: Sequence[str]) -> str:
    """Join the first names, each once."""
    names = list(dict.fromkeys(names))
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
