"""Builds the timeline of allocations of each way to train.

B rows per process, c rows per chunk, D feature width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gradcache_clip.memory.timeline import Timeline
from gradcache_clip.memory.trace import Trace

Kept = tuple[int, int]
"""Numbers of chunks of the image and of the text tower."""

_ADDED, _CAST = ", added", "cast"
# Kept graphs number their runs from here on; replays use 0 and 1.
_FIRST_KEPT = 2


@dataclass(frozen=True)
class TowerWork:
    """Work of a step in one tower."""

    trace: Trace
    """Trace of its passes, from `trace_tower`."""
    trainable: bool
    """Whether any part gets a gradient; otherwise the tower is never replayed."""
    input_bytes: int
    """Bytes per row of its input."""
    feature_bytes: int
    """Bytes per row of its features: one vector, or one per token."""


@dataclass(frozen=True)
class Work:
    """Work of a step, for any number of rows."""

    towers: tuple[TowerWork, TowerWork]
    """Image and text tower, in the order in which they run."""
    loss: Trace
    full_loss: Trace
    """Trace of the loss with a B x B matrix."""
    parameter_bytes: tuple[int, ...]
    """Bytes of each parameter and buffer."""
    optimizer_bytes: tuple[int, ...]
    """Bytes of each optimizer state, and of a moving average of the weights."""
    gradient_bytes: int
    """Bytes of all trained parameters."""
    pair_flops: int
    """Multiplications to compute the similarity of one image and one text."""
    workspaces: Callable[[int], dict[str, int]]
    """Function of B that returns bytes inside the tiled loss, by tag."""
    shares: dict[str, float]
    """Shares of this process; see `Timeline`."""
    world_size: int = 1
    """Processes that share the batch; each embeds B rows and gathers the features of all."""
    reserved_bytes: tuple[tuple[str, int], ...] = ()
    """Kind and bytes of further storages that live throughout the step."""
    inputs_on_device: bool = True
    """Whether the whole batch is on the device, or two chunks at a time."""
    rounded: bool = True
    """Round sizes like the CUDA allocator."""


def plain_step(work: Work, rows: int, chunk: int) -> Timeline:
    """Build a plain step: both towers over all rows at once.

    Every process holds the whole matrix of logits, as plain losses do.
    """
    timeline, (image, text) = _started(work, rows, rows), work.towers
    timeline.enter("forward")
    for tower in (image, text):
        timeline.run(tower.trace, "forward plain", rows=rows)
    timeline.enter("loss")
    timeline.run(work.full_loss, "forward", "backward", rows=rows * work.world_size)
    timeline.enter("backward")
    for tower in (text, image):
        timeline.run(tower.trace, "backward plain", "end plain", rows=rows)
    return timeline


def accumulated_step(work: Work, rows: int, chunk: int) -> Timeline:
    """Build a step of open_clip's accumulation: embed all rows, then each chunk against all.

    Every chunk holds the graphs of both towers and the whole matrix of logits.
    """
    chunk, timeline = min(chunk, rows), _started(work, rows, chunk)
    timeline.enter("embed")
    for tower in work.towers:
        timeline.run(tower.trace, "embed", "embed end", rows=chunk)
        timeline.hold([rows * tower.feature_bytes], "feature")
    everyone = rows * work.world_size
    # Two chunks show the peak: the second one adds to existing gradients, further ones repeat it.
    for number in range(1 + (chunk < rows)):
        timeline.enter(f"chunk {number}")
        for tower in work.towers:
            timeline.run(tower.trace, "forward plain", rows=chunk, again=number)
        joined = timeline.hold([everyone * each.feature_bytes for each in work.towers], "feature")
        timeline.run(work.full_loss, "forward", "backward", rows=everyone, again=number)
        for tower in reversed(work.towers):
            backward = f"backward plain{_ADDED * number}"
            timeline.run(tower.trace, backward, "end plain", rows=chunk, again=number)
        timeline.drop(joined)
    return timeline


def cached_step(work: Work, rows: int, chunk: int, *, kept: Kept = (0, 0)) -> Timeline:
    """Build a step of gradient caching that keeps the graphs of `kept` chunks of each tower.

    The last tower always keeps one more, unless replays run both towers together.
    """
    chunk, timeline = min(chunk, rows), _started(work, rows, min(chunk, rows))
    replays = _Replays(timeline, work, rows, chunk)
    timeline.enter("embed")
    for tower in work.towers:
        timeline.run(tower.trace, "embed", rows=chunk)
        timeline.hold([rows * tower.feature_bytes], "feature")
    for tower in work.towers:
        timeline.run(tower.trace, "embed end", rows=chunk)
    replays.keep(kept)
    timeline.enter("loss")
    gathered = timeline.hold(_gathered(work, rows), "feature")
    timeline.run(work.loss, "forward", "backward", rows=rows)
    timeline.drop(gathered)
    timeline.enter("replay")
    replays.take_kept()
    replays.take_others()
    return timeline


class _Replays:
    """Forwards and backwards of a cached step. Of equal chunks only two are run.

    The second one adds to the gradients of the first; a third would repeat the second.
    """

    def __init__(self, timeline: Timeline, work: Work, rows: int, chunk: int) -> None:
        self.timeline, self.work, self.rows, self.chunk = timeline, work, rows, chunk
        trainable = [tower for tower in work.towers if tower.trainable]
        self._last = trainable[-1] if trainable and work.world_size == 1 else None
        self._last_rows = (rows - 1) % chunk + 1
        self._kept: list[tuple[TowerWork, list[int], range]] = []
        self._left = {id(tower): -(-rows // chunk) for tower in trainable}
        self._has_gradients: set[int] = set()

    def keep(self, kept: Kept) -> None:
        """Keep graphs from the embed: run a few of each tower, and count bytes for the others.

        Graphs of a tower share autocast's casts, which live until the last graph is freed. Autocast
        drops its own references before the loss, as before the backward of a plain step.
        """
        for tower, count in zip(self.work.towers, kept, strict=True):
            runs, rest = self._runs_of(tower, count)
            graphs = self.timeline.hold([kept_bytes(tower, rest)] if rest else [], "kept graphs")
            self._kept.append((tower, runs, graphs))
            for number, rows in enumerate(runs):
                self._run_kept("forward", tower, rows, number, runs)

    def _runs_of(self, tower: TowerWork, count: int) -> tuple[list[int], int]:
        """Return rows of each kept graph to run, the tower's last chunk last, and of the others."""
        if not tower.trainable:
            return [], 0
        in_any_case = [self._last_rows] if tower is self._last else []
        self._left[id(tower)] -= count + len(in_any_case)
        rows = min(self.rows - sum(in_any_case), count * self.chunk)
        sizes = [min(self.chunk, rows - start) for start in range(0, rows, self.chunk)]
        runs = sizes if len(sizes) <= 3 else [*sizes[:2], sizes[-1]]
        return [*runs, *in_any_case], rows - sum(runs)

    def _run_kept(
        self, direction: str, tower: TowerWork, rows: int, number: int, runs: list[int]
    ) -> None:
        casts = "" if number == len(runs) - 1 else _CAST
        if direction == "backward":
            self._backward(tower, rows, _FIRST_KEPT + number, "plain", casts)
        else:
            numbered = {"rows": rows, "again": _FIRST_KEPT + number}
            self.timeline.run(tower.trace, "forward plain", **numbered, without=casts)

    def take_kept(self) -> None:
        """Run backwards of the kept graphs; only the last one of a tower after others are freed."""
        for tower, runs, graphs in self._kept:
            for number, rows in enumerate(runs):
                if number == len(runs) - 1:
                    self.timeline.drop(graphs)
                self._run_kept("backward", tower, rows, number, runs)

    def take_others(self) -> None:
        """Replay the other chunks: both towers together on several processes, else in turn."""
        towers = [tower for tower in self.work.towers if self._left.get(id(tower), 0) > 0]
        for group in [towers] if self.work.world_size > 1 else [[tower] for tower in towers]:
            several = max(self._left[id(tower)] for tower in group) > 1
            self._replay(group, "replay", 0, ends=not several)
            if several:
                # Autocast's casts are there, so their gradients wait for the end of a backward.
                self._replay(group, "shared", 1, without=_CAST)
                for tower in group:
                    self.timeline.run(tower.trace, "end replay", rows=self.chunk)

    def _replay(
        self, group: list[TowerWork], kind: str, number: int, without: str = "", ends: bool = True
    ) -> None:
        for tower in group:
            self.timeline.run(
                tower.trace, f"forward {kind}", rows=self.chunk, again=number, without=without
            )
        for tower in reversed(group):
            self._backward(tower, self.chunk, number, kind, without, ends)

    def _backward(
        self,
        tower: TowerWork,
        rows: int,
        number: int,
        kind: str,
        without: str,
        ends: bool = True,
    ) -> None:
        added = _ADDED if id(tower) in self._has_gradients else ""
        self._has_gradients.add(id(tower))
        segments = [f"backward {kind}{added}", *[f"end {kind}"] * ends]
        self.timeline.run(tower.trace, *segments, rows=rows, again=number, without=without)


def kept_within(work: Work, rows: int, chunk: int, budget: int) -> Kept:
    """Return how many graphs of each tower fit a budget; the first tower comes first."""
    counts = []
    for tower, most in zip(work.towers, all_kept(work, rows, chunk), strict=True):
        counts.append(min(most, budget // max(1, kept_bytes(tower, chunk))))
        budget -= counts[-1] * kept_bytes(tower, chunk)
    return counts[0], counts[1]


def all_kept(work: Work, rows: int, chunk: int) -> Kept:
    """Return how many chunks of each tower may be kept, besides the one that always is."""
    chunks = -(-rows // min(chunk, rows))
    if work.world_size > 1:
        # The first and the last replay exchange gradients, so they cannot be skipped.
        return max(0, chunks - 2), max(0, chunks - 2)
    image, text = work.towers
    return (chunks - (not text.trainable)) * image.trainable, (chunks - 1) * text.trainable


def kept_bytes(tower: TowerWork, rows: int) -> int:
    """Return the bytes of a kept graph of `rows`, without casts, which it shares with others."""
    return tower.trace.bytes_left_by("forward plain", rows, without=_CAST) * tower.trainable


def graph_bytes(tower: TowerWork, rows: int) -> int:
    """Return the bytes alive between forward and backward of a chunk."""
    return tower.trace.bytes_left_by("forward replay", rows) if tower.trainable else 0


def _started(work: Work, rows: int, chunk: int) -> Timeline:
    """Return a timeline with everything alive before the step: weights, states, inputs."""
    timeline = Timeline(work.shares, work.workspaces(rows), work.rounded)
    timeline.enter("start")
    timeline.hold(list(work.parameter_bytes), "parameter")
    timeline.hold(list(work.optimizer_bytes), "optimizer")
    for kind, nbytes in work.reserved_bytes:
        timeline.hold([nbytes], kind)
    # From the host, the current chunk and the next one.
    at_once = rows if work.inputs_on_device else min(rows, 2 * chunk)
    timeline.hold([tower.input_bytes * at_once for tower in work.towers], "input")
    return timeline


def _gathered(work: Work, rows: int) -> list[int]:
    """Return the bytes of features from other processes, for both towers."""
    others = (work.world_size - 1) * rows
    return [others * tower.feature_bytes for tower in work.towers] if others else []
