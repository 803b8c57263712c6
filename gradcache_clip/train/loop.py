"""The training loop, top to bottom."""

from __future__ import annotations

import shlex
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from gradcache_clip.train.config import Config
from gradcache_clip.train.device import processes_here
from gradcache_clip.train.ema import update_average
from gradcache_clip.train.evaluation.held_out import HeldOut
from gradcache_clip.train.optimizer import learning_rate_at
from gradcache_clip.train.peers import Peers, joined
from gradcache_clip.train.progress import TrainingBar, peak_memory_bytes, stop_on_interrupt
from gradcache_clip.train.report.metrics_log import MetricsLog
from gradcache_clip.train.report.pictures import SIMILARITY_PAIRS
from gradcache_clip.train.run_folder import RunFolder, check_run
from gradcache_clip.train.run_pictures import draw_run
from gradcache_clip.train.session import AnyBatch, Session, saved_at_the_end, start_session
from gradcache_clip.train.step import Backward, StepResult, make_backward, take_step
from gradcache_clip.train.task import Evaluated

# Paths may hold what rich takes for markup, and a command must stay on its line.
_PLAIN: dict[str, Any] = {"markup": False, "highlight": False, "soft_wrap": True}


@dataclass(frozen=True)
class RunSummary:
    """What a run came to; written to `summary.json`."""

    output: str
    """The run's folder."""
    step: int
    """Optimizer steps taken."""
    finished: bool
    """False when it was interrupted and can be resumed."""
    loss: float | None
    """Of the last logged step."""
    pairs_per_s: float
    """Training pairs a second over this part of the run, evaluation left out."""
    peak_memory_bytes: int
    """Most memory that the process (on a GPU: its tensors) held."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Broken training samples that were passed over, by reason; counted in every epoch."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Held-out retrieval, or classification, after the last step, if there is a validation set."""


class Meter:
    """Time in training steps and pairs seen, between log rows and in all."""

    def __init__(self) -> None:
        self.seconds = self.pairs = self._seconds = self._pairs = self._steps = 0.0
        self._start = time.perf_counter()

    @contextmanager
    def held(self) -> Iterator[None]:
        """What happens in this context is no training and does not count."""
        self._seconds += time.perf_counter() - self._start
        try:
            yield
        finally:
            self._start = time.perf_counter()

    def count(self, pairs: int) -> None:
        self._pairs += pairs
        self._steps += 1

    def rates(self) -> dict[str, float]:
        """Pairs a second and milliseconds a step since the last call."""
        now = time.perf_counter()
        self._seconds, self._start = self._seconds + now - self._start, now
        rates = {
            "pairs_per_s": self._pairs / self._seconds,
            "step_ms": 1000 * self._seconds / self._steps,
        }
        self.seconds += self._seconds
        self.pairs += self._pairs
        self._seconds = self._pairs = self._steps = 0.0
        return rates


def train(config: Config, *, console: Console | None = None) -> RunSummary:
    """Train, evaluate, save and draw one run, as its configuration says.

    Leaves in `train.output`: config.yaml, tokenizer.json, metrics.jsonl and TensorBoard events,
    checkpoints/, pictures/ and summary.json. The first Ctrl-C ends after the running step with a
    checkpoint, and so does an error on one process. Where a launcher has started several processes,
    all call this function together, share the batch, and the first of them writes.

    Raises:
        ConfigError, ValueError, OSError: before anything is written, when the configuration cannot
            be run here; while training, for data that cannot be read and features that are not
            finite.
        PeerFailure: another process has failed; the message names it and what it was doing.
    """
    with joined(config) as peers:
        console = console or Console(stderr=True)
        return _train(config, peers, console if peers.is_first else Console(quiet=True))


def _train(config: Config, peers: Peers, console: Console) -> RunSummary:
    run = check_run(config) if peers.is_first else RunFolder(Path(config.train.output))
    session = start_session(config, run, peers)
    before = peers.broadcast_from_rank0(run.read_summary() if peers.is_first else None)
    first_step = session.step
    if peers.is_first:
        run.begin(config, session.tokenizer, session.encoder)
    if first_step:
        console.print(f"going on from step {first_step} of {run.path}", **_PLAIN)
    if config.train.compile:
        session.encoder.compile()
    with _log(session) as log:
        row, meter, held_out = _run_steps(session, log, console)
    if _finished(session) and session.step == first_step and config.data.validation:
        # Nothing was left to train: the log has this evaluation already.
        held_out = _embed(session)
    if session.step == first_step and before is not None:
        summary = RunSummary(**{**before, "finished": _finished(session)})
    else:
        summary = peers.broadcast_from_rank0(_summary(session, row, meter, held_out))
    if peers.is_first:
        run.write_summary(summary)
    if summary.finished:
        _draw(session, held_out)
    else:
        console.print(_how_to_resume(summary, peers.world_size), **_PLAIN)
    return summary


def _finished(session: Session) -> bool:
    return session.step >= session.config.train.steps


def _draw(session: Session, held_out: Evaluated | None) -> None:
    batch = _embed_batch(session)
    if session.peers.is_first:
        draw_run(session.run, session.config, batch, held_out)


def _log(session: Session) -> AbstractContextManager[MetricsLog | None]:
    """Where the figures of this process go; nowhere unless it is the first."""
    if not session.peers.is_first:
        return nullcontext()
    # A run that begins anew has not been evaluated at its start, either.
    return MetricsLog(session.run.path, resume_step=session.step or -1)


def _run_steps(
    session: Session, log: MetricsLog | None, console: Console
) -> tuple[dict[str, float], Meter, Evaluated | None]:
    """Steps until the last or until Ctrl-C; the last log row and the last evaluation."""
    config, peers, meter = session.config.train, session.peers, Meter()
    strategy = session.engine.strategy
    backward = make_backward(session.engine.module, session.loss, session.objective, strategy)
    row: dict[str, float] = {}
    held_out = None
    with (
        stop_on_interrupt() as stop,
        TrainingBar(config.steps, session.step, console) as bar,
        saved_at_the_end(session),
        closing(session.batches()) as batches,
    ):
        if not session.step and session.config.evaluation.at_start:
            with meter.held():
                _evaluate(session, log)
        while session.step < config.steps and not peers.any(bool(stop)):
            result, held_out = _train_one(session, backward, _next_batch(session, batches)), None
            meter.count(config.batch_size)
            bar.advance()
            last = session.step == config.steps
            if log is not None and (last or stop or session.step % config.log_every == 0):
                row = _log_row(session, result, meter)
                log.write(session.step, row)
                bar.show({"step": session.step, **row})
            if last or _due(session, config.checkpoint_every):
                with meter.held():
                    session.save()
            if last or (_due(session, config.evaluate_every) and not peers.any(bool(stop))):
                with meter.held():
                    held_out = _evaluate(session, log)
    return row, meter, held_out


def _next_batch(session: Session, batches: Iterator[AnyBatch]) -> AnyBatch:
    session.peers.set_phase(f"reading the batch of step {session.step + 1}")
    return next(batches)


def _evaluate(session: Session, log: MetricsLog | None) -> Evaluated | None:
    if not session.config.data.validation:
        return None
    held_out = _embed(session)
    if log is not None and held_out is not None:
        log.write(session.step, held_out.scalars())
    return held_out


def _train_one(session: Session, backward: Backward, batch: AnyBatch) -> StepResult:
    config = session.config
    session.peers.set_phase(f"taking step {session.step + 1}")
    rate = learning_rate_at(session.step, config.optimizer, config.train.steps)
    session.engine.set_learning_rate(rate)
    result = take_step(backward, *session.inputs_of(batch), session.engine)
    session.objective.after_step(session.encoder, session.loss)
    session.step += 1
    if session.ema is not None:
        update_average(session.ema, session.encoder, session.step)
    return result


def _due(session: Session, every: int) -> bool:
    return bool(every) and session.step % every == 0


def _log_row(session: Session, result: StepResult, meter: Meter) -> dict[str, float]:
    """Figures of the step that was just taken: the one place that waits for the device."""
    loss: Any = session.loss
    values = torch.stack([*result, loss.logit_scale.detach()]).tolist()
    names = ("loss", "accuracy", "grad_norm", "logit_scale")
    return {
        **dict(zip(names, values, strict=True)),
        "learning_rate": session.engine.param_groups[0]["lr"],
        **meter.rates(),
        "peak_memory_bytes": peak_memory_bytes(session.device),
    }


def _embed(session: Session) -> Evaluated | None:
    """The held-out samples, embedded by all processes, on the first."""
    session.peers.set_phase(f"evaluating after step {session.step}")
    return session.task.embed_held_out(session.evaluated, session.tokenizer, session.peers)


def _embed_batch(session: Session) -> HeldOut | None:
    """Some pairs of the batch that would come next, for a picture."""
    session.peers.set_phase("embedding a batch for a picture")
    encoder, tokenizer = session.evaluated, session.tokenizer
    with closing(session.batches()) as batches:
        return session.task.embed_batch(encoder, tokenizer, batches, SIMILARITY_PAIRS)


def _summary(
    session: Session, row: dict[str, float], meter: Meter, held_out: Evaluated | None
) -> RunSummary:
    skipped = Counter[str]()
    for counts in session.peers.gather_to_rank0(session.loader.broken.counts):
        skipped.update(counts)
    return RunSummary(
        output=str(session.run.path),
        step=session.step,
        finished=_finished(session),
        loss=row.get("loss"),
        pairs_per_s=meter.pairs / meter.seconds if meter.seconds else 0.0,
        peak_memory_bytes=peak_memory_bytes(session.device),
        skipped=dict(skipped),
        metrics=held_out.scalars() if held_out else {},
    )


def _how_to_resume(summary: RunSummary, processes: int) -> str:
    if not summary.step:
        return "stopped before the first step"
    config = shlex.quote(f"{summary.output}/config.yaml")
    command = "train" if processes == 1 else f"launch --nproc {processes_here(processes)} train"
    return (
        f"stopped after step {summary.step} with a checkpoint; go on with\n"
        f"    gradcache-clip {command} {config} train.resume=true"
    )
