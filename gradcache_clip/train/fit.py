"""The training loop. It knows batches, steps and checkpoints, but no objective or kind of data."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console

from gradcache_clip.train.config import TrainConfig
from gradcache_clip.train.ema import update_average
from gradcache_clip.train.progress import TrainingBar, peak_memory_bytes, stop_on_interrupt
from gradcache_clip.train.report.metrics_log import MetricsLog
from gradcache_clip.train.state import TrainState, save_on_exit
from gradcache_clip.train.step import StepResult

Step = Callable[[Any], StepResult]
"""Takes one optimizer step on a batch."""

Evaluate = Callable[[], Any]
"""Evaluates the current state; rank 0 logs the result's `scalars()`, other ranks return None."""


class Meter:
    """Measures training time and samples, since the last log row and in total."""

    def __init__(self) -> None:
        self.seconds = self.samples = self._seconds = self._samples = self._steps = 0.0
        self._start = time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time spent in this context, such as evaluating or saving."""
        self._seconds += time.perf_counter() - self._start
        try:
            yield
        finally:
            self._start = time.perf_counter()

    def count(self, samples: int) -> None:
        self._samples += samples
        self._steps += 1

    def rates(self) -> dict[str, float]:
        """Return samples per second and milliseconds per step since the last call."""
        now = time.perf_counter()
        self._seconds, self._start = self._seconds + now - self._start, now
        rates = {
            "pairs_per_s": self._samples / self._seconds,
            "step_ms": 1000 * self._seconds / self._steps,
        }
        self.seconds += self._seconds
        self.samples += self._samples
        self._seconds = self._samples = self._steps = 0.0
        return rates


@dataclass
class FitResult:
    """Outcome of `fit`."""

    meter: Meter = field(default_factory=Meter)
    row: dict[str, float] = field(default_factory=dict)
    """Last log row."""
    evaluated: Any = None
    """Evaluation after the last step; None if that step was not evaluated."""


def fit(
    state: TrainState,
    step: Step,
    config: TrainConfig,
    *,
    evaluate: Evaluate | None = None,
    at_start: bool = False,
    log: MetricsLog | None = None,
    console: Console | None = None,
) -> FitResult:
    """Take steps until `config.steps` or Ctrl-C; log, evaluate and save on the way.

    Args:
        state: modified in place.
        step: takes one optimizer step.
        config: number of steps, and intervals for logging, evaluating and saving.
        evaluate: called every `config.evaluate_every` steps and after the last one.
        at_start: also evaluate before the first step.
        log: receives the metrics; None except on rank 0.
        console: shows the progress bar; stderr when None.
    """
    fitted, peers = FitResult(), state.peers

    def evaluated() -> Any:
        with fitted.meter.paused():
            found = evaluate() if evaluate is not None else None
            if log is not None and found is not None:
                log.write(state.step, found.scalars())
            return found

    with (
        stop_on_interrupt() as stop,
        TrainingBar(config.steps, state.step, console) as bar,
        save_on_exit(state, config.keep_checkpoints),
        closing(state.batches()) as batches,
    ):
        if not state.step and at_start:
            evaluated()
        # All ranks must agree to stop: one that left alone would hang the others in a collective.
        while state.step < config.steps and not peers.any(bool(stop)):
            fitted.evaluated = None
            result = _take(state, step, batches)
            fitted.meter.count(config.batch_size)
            bar.advance()
            last = state.step == config.steps
            if log is not None and (last or stop or state.step % config.log_every == 0):
                fitted.row = _log_row(state, result, fitted.meter)
                log.write(state.step, fitted.row)
                bar.show({"step": state.step, **fitted.row})
            # Save first: an evaluation may fail, or take long.
            if last or _due(state, config.checkpoint_every):
                with fitted.meter.paused():
                    state.save(config.keep_checkpoints)
            if last or (_due(state, config.evaluate_every) and not peers.any(bool(stop))):
                fitted.evaluated = evaluated()
    return fitted


def _take(state: TrainState, step: Step, batches: Iterator[Any]) -> StepResult:
    state.peers.set_phase(f"reading the batch of step {state.step + 1}")
    batch = next(batches)
    state.peers.set_phase(f"taking step {state.step + 1}")
    result = step(batch)
    state.step += 1
    if state.ema is not None:
        update_average(state.ema, state.encoder, state.step)
    return result


def _due(state: TrainState, every: int) -> bool:
    return bool(every) and state.step % every == 0


def _log_row(state: TrainState, result: StepResult, meter: Meter) -> dict[str, float]:
    """Metrics of the step just taken. Only this function synchronises with the device."""
    loss: Any = state.loss
    values = torch.stack([*result, loss.logit_scale.detach()]).tolist()
    names = ("loss", "accuracy", "grad_norm", "logit_scale")
    return {
        **dict(zip(names, values, strict=True)),
        "learning_rate": state.engine.param_groups[0]["lr"],
        **meter.rates(),
        "peak_memory_bytes": peak_memory_bytes(result.loss.device),
    }
