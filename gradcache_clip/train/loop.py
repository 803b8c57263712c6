"""The training loop, top to bottom."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console

from gradcache_clip.train.config import Config
from gradcache_clip.train.data import Batch
from gradcache_clip.train.evaluation.held_out import HeldOut, embed_batch, embed_held_out
from gradcache_clip.train.optimizer import apply_learning_rate, learning_rate_at
from gradcache_clip.train.progress import TrainingBar, peak_memory_bytes, stop_on_interrupt
from gradcache_clip.train.report.metrics_log import MetricsLog
from gradcache_clip.train.report.pictures import SIMILARITY_PAIRS, draw_run
from gradcache_clip.train.run_folder import check_run
from gradcache_clip.train.session import Session, saved_at_the_end, start_session
from gradcache_clip.train.step import Backward, StepResult, make_backward, take_step

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
    """Held-out retrieval after the last step, if there is a validation set."""


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
    checkpoint, and so does an error.

    Raises:
        ConfigError, ValueError, OSError: before anything is written, when the configuration cannot
            be run here; while training, for data that cannot be read and features that are not
            finite.
    """
    console = console or Console(stderr=True)
    run = check_run(config)
    session = start_session(config, run)
    run.begin(config, session.tokenizer)
    before, first_step = run.read_summary(), session.step
    if first_step:
        console.print(f"going on from step {first_step} of {run.path}", **_PLAIN)
    if config.train.compile:
        session.encoder.compile()
    backward = make_backward(session.encoder, session.loss, config.train, session.scaler)
    with MetricsLog(run.path, resume_step=first_step) as log:
        row, meter, held_out = _run_steps(session, backward, log, console)
    finished = session.step >= config.train.steps
    if finished and held_out is None and config.data.validation:
        # Nothing was left to train: the log has this evaluation already.
        held_out = _embed(session)
    if session.step == first_step and before is not None:
        summary = RunSummary(**{**before, "finished": finished})
    else:
        summary = _summary(session, row, meter, held_out)
    run.write_summary(summary)
    if finished:
        draw_run(run, config, _embed_batch(session), held_out)
    else:
        console.print(_how_to_resume(summary), **_PLAIN)
    return summary


def _run_steps(
    session: Session, backward: Backward, log: MetricsLog, console: Console
) -> tuple[dict[str, float], Meter, HeldOut | None]:
    """Steps until the last or until Ctrl-C; the last log row and the last evaluation."""
    config, meter = session.config.train, Meter()
    row: dict[str, float] = {}
    held_out = None
    with (
        stop_on_interrupt() as stop,
        TrainingBar(config.steps, session.step, console) as bar,
        saved_at_the_end(session),
        closing(session.batches()) as batches,
    ):
        while session.step < config.steps and not stop:
            result, held_out = _train_one(session, backward, next(batches)), None
            meter.count(config.batch_size)
            bar.advance()
            last = session.step == config.steps
            if last or stop or session.step % config.log_every == 0:
                row = _log_row(session, result, meter)
                log.write(session.step, row)
                bar.show({"step": session.step, **row})
            if last or _due(session, config.checkpoint_every):
                with meter.held():
                    session.save()
            due = last or (not stop and _due(session, config.evaluate_every))
            if due and session.config.data.validation:
                with meter.held():
                    held_out = _embed(session)
                    metrics = held_out.metrics(session.config.evaluation.recall_at)
                    log.write(session.step, metrics.to_scalars())
    return row, meter, held_out


def _train_one(session: Session, backward: Backward, batch: Batch) -> StepResult:
    config = session.config
    rate = learning_rate_at(session.step, config.optimizer, config.train.steps)
    apply_learning_rate(session.optimizer, rate)
    texts = session.tokenizer(batch.captions, pad_to_context=config.train.compile)
    result = take_step(
        backward,
        batch.images.to(session.device, non_blocking=True),
        {name: tensor.to(session.device, non_blocking=True) for name, tensor in texts.items()},
        session.optimizer,
        session.scaler,
        config.train,
        config.optimizer.max_grad_norm,
    )
    if session.ema is not None:
        session.ema.update(session.encoder)
    session.step += 1
    return result


def _due(session: Session, every: int) -> bool:
    return bool(every) and session.step % every == 0


def _log_row(session: Session, result: StepResult, meter: Meter) -> dict[str, float]:
    """Figures of the step that was just taken: the one place that waits for the device."""
    values = torch.stack([*result, session.loss.logit_scale.detach()]).tolist()
    names = ("loss", "accuracy", "grad_norm", "logit_scale")
    return {
        **dict(zip(names, values, strict=True)),
        "learning_rate": session.optimizer.param_groups[0]["lr"],
        **meter.rates(),
        "peak_memory_bytes": peak_memory_bytes(session.device),
    }


def _embed(session: Session) -> HeldOut:
    with session.averaged_weights():
        return embed_held_out(session.encoder, session.tokenizer, session.config)


def _embed_batch(session: Session) -> HeldOut:
    """Some pairs of the batch that would come next, for a picture."""
    with closing(session.batches()) as batches, session.averaged_weights():
        return embed_batch(
            session.encoder, session.tokenizer, session.config, next(batches), SIMILARITY_PAIRS
        )


def _summary(
    session: Session, row: dict[str, float], meter: Meter, held_out: HeldOut | None
) -> RunSummary:
    recall_at = session.config.evaluation.recall_at
    return RunSummary(
        output=str(session.run.path),
        step=session.step,
        finished=session.step >= session.config.train.steps,
        loss=row.get("loss"),
        pairs_per_s=meter.pairs / meter.seconds if meter.seconds else 0.0,
        peak_memory_bytes=peak_memory_bytes(session.device),
        skipped=dict(session.loader.broken.counts),
        metrics=held_out.metrics(recall_at).to_scalars() if held_out else {},
    )


def _how_to_resume(summary: RunSummary) -> str:
    if not summary.step:
        return "stopped before the first step"
    config = shlex.quote(f"{summary.output}/config.yaml")
    return (
        f"stopped after step {summary.step} with a checkpoint; go on with\n"
        f"    gradcache-clip train {config} train.resume=true"
    )
