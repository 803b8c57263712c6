"""One training run: load, fit, evaluate, draw, summarise."""

from __future__ import annotations

import dataclasses
import shlex
from collections import Counter
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from rich.console import Console

from gradcache_clip.train.config import Config
from gradcache_clip.train.config_errors import ConfigError
from gradcache_clip.train.device import choose_device, local_world_size
from gradcache_clip.train.fit import FitResult, Step, fit
from gradcache_clip.train.folder_lock import locked
from gradcache_clip.train.optimizer import learning_rate_at
from gradcache_clip.train.peers import Peers, join_processes
from gradcache_clip.train.programs import program_of
from gradcache_clip.train.programs.program import Program
from gradcache_clip.train.progress import peak_memory_bytes
from gradcache_clip.train.report.metrics_log import MetricsLog
from gradcache_clip.train.run_folder import RunFolder, check_run
from gradcache_clip.train.run_pictures import draw_run
from gradcache_clip.train.state import TrainState, start, tokenizer_digest
from gradcache_clip.train.step import StepResult, make_backward, take_step
from gradcache_clip.train.tokenizer import Tokenizer

# Paths may hold what rich takes for markup, and a command must stay on its line.
_PLAIN: dict[str, Any] = {"markup": False, "highlight": False, "soft_wrap": True}


@dataclass(frozen=True)
class RunSummary:
    """Outcome of a run, as written to `summary.json`."""

    output: str
    """Folder of the run."""
    step: int
    """Optimizer steps taken."""
    finished: bool
    """False if the run was interrupted; it can be resumed."""
    loss: float | None
    """Loss of the last logged step."""
    pairs_per_s: float
    """Training samples per second since this start, evaluation excluded."""
    peak_memory_bytes: int
    """Peak memory: allocated tensors on a GPU, resident memory on a CPU."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Number of broken training samples skipped, by reason; counted again in every epoch."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Held-out retrieval or classification after the last step; empty without a validation set."""


_FIELDS = [item.name for item in fields(RunSummary)]


def train(config: Config, *, console: Console | None = None) -> RunSummary:
    """Train, evaluate, save and draw one run.

    Writes to `train.output`: config.yaml, tokenizer.json, metrics.jsonl and TensorBoard events,
    checkpoints/, pictures/ and summary.json. The first Ctrl-C finishes the current step and saves
    a checkpoint; an error in a run of one process saves one too. Under a launcher, every process
    calls this function, the processes share the batch, and rank 0 writes.

    Raises:
        ConfigError, ValueError, OSError: the configuration cannot be run here (raised before
            anything is written), data cannot be read, or features are not finite.
        PeerFailure: another process failed; the message names it and what it was doing.
    """
    with join_processes(config) as peers, ExitStack() as held:
        console = console or Console(stderr=True)
        shown = console if peers.is_first else Console(quiet=True)
        return _Trainer(config, peers, shown, held).train()


def _summary_of(folder: RunFolder) -> RunSummary | None:
    """Return the summary that is there, or None.

    Raises:
        ConfigError: its file holds something else.
    """
    found = folder.read_summary()
    if found is None:
        return None
    known = {name: found[name] for name in _FIELDS if name in found}
    try:
        return TypeAdapter(RunSummary).validate_python(known)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(
            f"{folder.summary}: expected the summary of a run, got {first['input']!r:.60} for "
            f"{'.'.join(map(str, first['loc']))} ({first['msg']}); remove the file, which is "
            "written again"
        ) from error


class _Trainer:
    """Runs the phases of one run in one process."""

    _is_held = False

    def __init__(self, config: Config, peers: Peers, console: Console, held: ExitStack) -> None:
        self.config, self.peers, self.console, self._held = config, peers, console, held
        folder = check_run(config) if peers.is_first else RunFolder(Path(config.train.output))
        self.folder = folder
        if peers.is_first and folder.path.exists():
            self._hold_folder()
        self.program: Program[Any] = program_of(config)
        self.state, self.tokenizer = start(self.program, folder, peers)
        self.device = choose_device(config.train.device)

    def train(self) -> RunSummary:
        state, peers = self.state, self.peers
        before = peers.broadcast_from_rank0(_summary_of(self.folder) if peers.is_first else None)
        first_step = state.step
        if peers.is_first:
            self._hold_folder()
            self.folder.begin(self.config, self.tokenizer, state.encoder)
            state.tokenizer_digest = tokenizer_digest(self.folder)
        if first_step:
            self.console.print(f"resuming from step {first_step} of {self.folder.path}", **_PLAIN)
        fitted = self._fit()
        if self._finished and state.step == first_step and self.config.data.validation:
            # Nothing left to train. The log already has this evaluation; the pictures need it.
            fitted.evaluated = self._evaluate()
        # Without a new step, keep the figures of the summary that exists.
        if state.step == first_step and before is not None:
            summary = dataclasses.replace(before, finished=self._finished)
        else:
            summary = peers.broadcast_from_rank0(self._summary(fitted))
        if peers.is_first:
            self.folder.write_summary(summary)
        if summary.finished:
            self._draw(fitted.evaluated)
        else:
            self.console.print(_how_to_resume(summary, peers.world_size), **_PLAIN)
        return summary

    def _hold_folder(self) -> None:
        """Let no other run write here; until now one may have, so it is checked again."""
        if self._is_held:
            return
        self._held.enter_context(locked(self.folder.path))
        self._is_held = True
        check_run(self.config)

    @property
    def _finished(self) -> bool:
        return self.state.step >= self.config.train.steps

    def _fit(self) -> FitResult:
        if self.config.train.compile:
            self.state.encoder.compile()
        with self._log() as log:
            return fit(
                self.state,
                training_step(self.program, self.state, self.tokenizer, self.device),
                self.config.train,
                evaluate=self._evaluate if self.config.data.validation else None,
                at_start=self.config.evaluation.at_start,
                log=log,
                console=self.console,
            )

    def _log(self) -> AbstractContextManager[MetricsLog | None]:
        """Open the log on rank 0; other processes log nothing."""
        if not self.peers.is_first:
            return nullcontext()
        # -1 also drops the evaluation at step 0 of an earlier start, which is about to be repeated.
        return MetricsLog(self.folder.path, resume_step=self.state.step or -1)

    def _evaluate(self) -> Any:
        """Evaluate on all processes; returns the result on rank 0, None elsewhere."""
        self.peers.set_phase(f"evaluating after step {self.state.step}")
        return self.program.evaluate(self.state.evaluated, self.tokenizer, self.peers)

    def _draw(self, evaluated: Any) -> None:
        self.peers.set_phase("embedding a batch for a picture")
        with closing(self.state.batches()) as batches:
            preview = self.program.preview(self.state.evaluated, self.tokenizer, batches)
        if self.peers.is_first:
            draw_run(self.folder, self.program, evaluated, preview)

    def _summary(self, fitted: FitResult) -> RunSummary:
        skipped = Counter[str]()
        for counts in self.peers.gather_to_rank0(self.state.loader.broken.counts):
            skipped.update(counts)
        meter = fitted.meter
        return RunSummary(
            output=str(self.folder.path),
            step=self.state.step,
            finished=self._finished,
            loss=fitted.row.get("loss"),
            pairs_per_s=meter.samples / meter.seconds if meter.seconds else 0.0,
            peak_memory_bytes=peak_memory_bytes(self.device),
            skipped=dict(skipped),
            metrics=fitted.evaluated.scalars() if fitted.evaluated else {},
        )


def training_step(
    program: Program[Any], state: TrainState, tokenizer: Tokenizer | None, device: torch.device
) -> Step:
    """Return the function that takes one optimizer step on a batch."""
    config, engine = program.config, state.engine
    backward = make_backward(
        engine.module, state.loss, config.train, engine.strategy, program.sort_by_length
    )

    def step(batch: Any) -> StepResult:
        rate = learning_rate_at(state.step, config.optimizer, config.train.steps)
        engine.set_learning_rate(rate)
        inputs, loss_kwargs = program.inputs(batch, tokenizer, device)
        result = take_step(backward, inputs, loss_kwargs, engine)
        program.after_step(state.encoder, state.loss)
        return result

    return step


def _how_to_resume(summary: RunSummary, processes: int) -> str:
    if not summary.step:
        return "stopped before the first step"
    config = shlex.quote(f"{summary.output}/config.yaml")
    command = "train" if processes == 1 else f"launch --nproc {local_world_size(processes)} train"
    return (
        f"stopped after step {summary.step} with a checkpoint; resume with\n"
        f"    gradcache-clip {command} {config} train.resume=true"
    )
