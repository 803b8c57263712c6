"""Measurements of engine.py, each in a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from engine_contestants import IMAGE_TEXT, LEMMA_GLOSS, Step, ours
from engine_models import Workload, encode, image_text, lemma_gloss, rows_of
from fresh_process import PeakGrowth, interleaved_times_ms
from torch import Tensor, nn

from gradcache_clip import GradCache
from gradcache_clip.cache.retained import SavedBytes

CONTESTANTS = {"image-text": IMAGE_TEXT, "lemma-gloss": LEMMA_GLOSS}
_WARM_ROWS = 2
_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
_LINEAR = (64, 32)


def measure_memory(arguments: dict[str, Any]) -> dict[str, Any]:
    """Peak growth of one contestant's step, after a small step of its own."""
    make = CONTESTANTS[arguments["workload"]][arguments["name"]]
    _forget(make, _workload({**arguments, "batch_size": _WARM_ROWS * arguments["chunk_size"]}))
    work = _workload(arguments)
    step = make(work, arguments["chunk_size"])
    with PeakGrowth() as peak:
        step()
    return {"peak_growth_bytes": peak.bytes}


def measure_times(arguments: dict[str, Any]) -> dict[str, Any]:
    """Interleaved times of the contestants, and how far their gradients are from the first's."""
    contestants, work = CONTESTANTS[arguments["workload"]], _workload(arguments)
    names = arguments["names"]
    steps = [_stepping(work, contestants[name](work, arguments["chunk_size"])) for name in names]
    errors = _errors(work, steps)
    rounds = interleaved_times_ms(steps, arguments["rounds"], arguments["seconds"])
    columns = list(zip(*rounds, strict=True))
    return {
        name: {
            "step_ms": median(times),
            "time_ratio": median(t / first for t, first in zip(times, columns[0], strict=True)),
            "gradient_error": error,
            "rounds": len(rounds),
        }
        for name, times, error in zip(names, columns, errors, strict=True)
    }


def measure_budgets(arguments: dict[str, Any]) -> dict[str, Any]:
    """Time of a cached step against the plain one, for budgets up to all graphs."""
    work, size = _workload(arguments), arguments["chunk_size"]
    whole = _bytes_of_all_graphs(work, size)
    makers = [IMAGE_TEXT["plain step"](work, size)]
    makers += [ours(work, size, memory_budget=int(share * whole * 1.01)) for share in _SHARES]
    steps = [_stepping(work, step) for step in makers]
    rounds = interleaved_times_ms(steps, arguments["rounds"], arguments["seconds"])
    plain, *columns = zip(*rounds, strict=True)
    return {
        str(share): {
            "budget_bytes": int(share * whole),
            "time_ratio": median(t / p for t, p in zip(times, plain, strict=True)),
        }
        for share, times in zip(_SHARES, columns, strict=True)
    }


def measure_overhead(arguments: dict[str, Any]) -> dict[str, Any]:
    """A cached step over linear layers beside a two-pass loop written by hand, one thread.

    The loss, which both evaluate, costs next to nothing: a real one would hide the engine.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    encoders = nn.Linear(*_LINEAR), nn.Linear(*_LINEAR)
    rows = arguments["chunks"] * arguments["chunk_size"]
    work = Workload(encoders, (torch.randn(rows, _LINEAR[0]), torch.randn(rows, _LINEAR[0])))
    cache = GradCache(encoders, _dot, chunk_size=arguments["chunk_size"])
    makers = [two_pass_loop(work, arguments["chunk_size"]), lambda: cache(*work.inputs).loss.item()]
    steps = [_stepping(work, step) for step in makers]
    error = _errors(work, steps)[1]
    times = interleaved_times_ms(steps, arguments["rounds"], arguments["seconds"])
    loop, engine = zip(*times, strict=True)
    return {
        "chunks": arguments["chunks"],
        "chunk_size": arguments["chunk_size"],
        "time_ratio": median(e / by_hand for e, by_hand in zip(engine, loop, strict=True)),
        "loop_us_per_chunk": 1e3 * median(loop) / (2 * arguments["chunks"]),
        "engine_us_per_chunk": 1e3 * median(engine) / (2 * arguments["chunks"]),
        "gradient_error": error,
        "rounds": len(times),
    }


def two_pass_loop(work: Workload, chunk_size: int) -> Step:
    """The least that gives the gradients: no check, no random state, tensors alone."""

    def step() -> float:
        cut = [given.split(chunk_size) for given in work.inputs]
        with torch.no_grad():
            features = [
                torch.cat([encoder(chunk) for chunk in chunks])
                for encoder, chunks in zip(work.encoders, cut, strict=True)
            ]
        loss = _dot(*(each.requires_grad_() for each in features))
        loss.backward()
        for encoder, chunks, each in zip(work.encoders, cut, features, strict=True):
            for chunk, gradient in zip(chunks, each.grad.split(chunk_size), strict=True):
                encoder(chunk).backward(gradient)
        return loss.item()

    return step


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum() / len(a)


def _workload(arguments: dict[str, Any]) -> Workload:
    if arguments["workload"] == "image-text":
        return image_text(arguments["batch_size"], small=arguments["small"])
    folder = Path(arguments["wordnet"])
    return lemma_gloss(arguments["batch_size"], folder, small=arguments["small"])


def _stepping(work: Workload, step: Step) -> Callable[[], float]:
    def stepped() -> float:
        for encoder in work.encoders:
            encoder.zero_grad()
        return step()

    return stepped


def _errors(work: Workload, steps: list[Callable[[], float]]) -> list[float]:
    gradients = []
    for step in steps:
        step()
        parameters = [p for encoder in work.encoders for p in encoder.parameters()]
        gradients.append([p.grad.clone() for p in parameters if p.grad is not None])
    return [_relative_error(each, gradients[0]) for each in gradients]


def _relative_error(got: list[Tensor], expected: list[Tensor]) -> float:
    """Of all gradients as one vector."""
    difference = sum((g - e).double().square().sum() for g, e in zip(got, expected, strict=True))
    return float((difference / sum(e.double().square().sum() for e in expected)).sqrt())


def _forget(make: Callable[[Workload, int], Step], work: Workload) -> None:
    """Load libraries and warm the allocator, outside of what is measured."""
    _stepping(work, make(work, _WARM_ROWS))()


def _bytes_of_all_graphs(work: Workload, chunk_size: int) -> int:
    total = 0
    for encoder, given in zip(work.encoders, work.inputs, strict=True):
        saved = SavedBytes(encoder.parameters())
        with saved.counting(True):
            encode(encoder, rows_of(given, slice(0, chunk_size)))
        rows = len(given["input_ids"] if isinstance(given, dict) else given)
        total += saved.total * -(-rows // chunk_size)
    return total
