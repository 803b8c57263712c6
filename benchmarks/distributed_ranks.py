"""What each process of distributed.py does. W processes, b pairs on each."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from collectives import CountedCollectives
from distributed_engines import ENGINES, Ready, available, error_against, one_process
from torch import Tensor, nn

from gradcache_clip import ClipLoss
from gradcache_clip.distributed import gather_rows
from gradcache_clip.ops import clip_loss

Step = Callable[[], object]


class _Contestant(NamedTuple):
    name: str
    step: Step
    error: float


def measure(rank: int, world: int, folder: str, options: dict[str, Any]) -> None:
    """Run on every rank; rank 0 writes what was found into the folder."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world
    )
    rows = _rows("loss", _losses(options), options["rounds"])
    rows += _rows("engine", _engines(options), options["rounds"])
    if rank == 0:
        (Path(folder) / "found.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


def _rows(part: str, contestants: list[_Contestant], rounds: int) -> list[dict[str, Any]]:
    """Counts of one step each, then rounds in which every contestant takes a step."""
    counts = [_counted(each.step) for each in contestants]
    times = [[_seconds(each.step) for each in contestants] for _ in range(rounds)]
    ratios = [median(each[i] / each[0] for each in times) for i in range(len(contestants))]
    return [
        {
            "part": part,
            "contestant": each.name,
            "collectives": sum(counted.calls.values()) - counted.calls["send"],
            "bytes_received": counted.total_bytes_received,
            "time_ratio": ratio,
            "error": each.error,
        }
        for each, counted, ratio in zip(contestants, counts, ratios, strict=True)
    ]


def _counted(step: Step) -> CountedCollectives:
    with CountedCollectives() as counted:
        step()
    return counted


def _seconds(step: Step) -> float:
    dist.barrier()
    start = perf_counter()
    step()
    dist.barrier()
    return perf_counter() - start


def _losses(options: dict[str, Any]) -> list[_Contestant]:
    b, D = options["loss_rows"], options["width"]
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(dist.get_world_size() * b, D, generator=generator) for _ in range(2)]
    truth = [nn.functional.normalize(each, dim=1).requires_grad_() for each in whole]
    clip_loss(*truth, 1 / 0.07).backward()
    gradients = [_own(each.grad, b) for each in truth]
    local = [_own(each.detach(), b) for each in truth]
    return [
        _loss_contestant("whole loss on every process", _whole, local, gradients),
        _loss_contestant('exchange="gather"', _shared("gather"), local, gradients),
        _loss_contestant('exchange="ring"', _shared("ring"), local, gradients),
    ]


def _own(rows: Tensor, b: int) -> Tensor:
    return rows[dist.get_rank() * b : (dist.get_rank() + 1) * b].clone()


def _whole(images: Tensor, texts: Tensor) -> Tensor:
    return clip_loss(gather_rows(images), gather_rows(texts), 1 / 0.07)


def _shared(exchange: str) -> Callable[[Tensor, Tensor], Tensor]:
    loss = ClipLoss(normalize=False, exchange=exchange)
    return lambda images, texts: loss(images, texts).loss


def _loss_contestant(
    name: str,
    loss: Callable[[Tensor, Tensor], Tensor],
    local: list[Tensor],
    truth: list[Tensor],
) -> _Contestant:
    inputs = [each.clone().requires_grad_() for each in local]

    def step() -> None:
        for each in inputs:
            each.grad = None
        loss(*inputs).backward()

    step()
    pairs = zip(inputs, truth, strict=True)
    errors = [float((each.grad - true).abs().max() / true.abs().max()) for each, true in pairs]
    return _Contestant(name, step, max(errors))


def _engines(options: dict[str, Any]) -> list[_Contestant]:
    truth = one_process(options)
    found = []
    for name, build in ENGINES.items():
        if available(name):
            ready: Ready = build(options)
            ready.step()
            found.append(_Contestant(name, ready.step, error_against(truth, ready)))
    return found
