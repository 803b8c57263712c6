"""One batch on several processes: what is exchanged, how long it takes, and how exact it is.

    python benchmarks/distributed.py                 # 2 and 4 processes over gloo on this machine
    python benchmarks/distributed.py --quick         # 2 processes, small; under a minute

1. loss: the CLIP loss shared by all ranks ("gather", "ring") beside every rank computing all of it.
2. engine: a cached step under each strategy, beside plain DDP without gradient caching.

Collectives and bytes are counted in one step, times are medians of ratios of neighbouring steps,
gradients are compared with one process that has the whole batch. Processes share the cores, so
times tell of work that is saved, not of a network. Writes distributed.csv into
benchmarks/results (or --results). W processes, b pairs on each.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from collectives import CountedCollectives
from engine_steps import encode, image_text
from fresh_process import distance
from results import (
    bytes_text,
    paragraph,
    parser,
    power,
    provenance,
    read_rows,
    show,
    table,
    write_rows,
)
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from gradcache_clip import ClipLoss, GradCache
from gradcache_clip.distributed import (
    AllReduceStrategy,
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    gather_rows,
)
from gradcache_clip.ops import clip_loss

_FILE = "distributed.csv"
_TEMPERATURE = 0.07
Step = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """One way to share a batch."""

    part: str
    """"loss" or "engine"."""
    world: int
    contestant: str
    collectives: int
    """Calls in a step."""
    bytes_received: int
    """Per process and step."""
    time_ratio: float
    """To the first way of its part."""
    error: float
    """Relative, of all gradients."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure each number of processes, write the CSV and print its table."""
    options = _parser().parse_args(arguments)
    if options.quick:
        options.world, options.rounds = [2], 2
        options.loss_rows, options.width, options.engine_rows, options.chunk = 512, 64, 8, 4
    path = write_rows(Row, _measured(options), options.results / _FILE, provenance())
    show(section(options.results))
    print(path)


def _measured(options: argparse.Namespace) -> Iterator[Row]:
    with Progress(console=Console(stderr=True)) as progress:
        for world in progress.track(options.world, description="numbers of processes"):
            with tempfile.TemporaryDirectory() as folder:
                mp.spawn(measure, (world, folder, vars(options)), nprocs=world)
                found = json.loads((Path(folder) / "found.json").read_text())
            yield from (Row(world=world, **row) for row in found)


# The work of each process


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


# The loss alone


def _losses(options: dict[str, Any]) -> list[_Contestant]:
    b, D = options["loss_rows"], options["width"]
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(dist.get_world_size() * b, D, generator=generator) for _ in range(2)]
    truth = [nn.functional.normalize(each, dim=1).requires_grad_() for each in whole]
    clip_loss(*truth, 1 / _TEMPERATURE).backward()
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
    return clip_loss(gather_rows(images), gather_rows(texts), 1 / _TEMPERATURE)


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


# A cached step of two towers under every strategy


class Ready(NamedTuple):
    """A step that leaves gradients, and where they are."""

    step: Callable[[], object]
    gradients: Callable[[], list[Tensor]]


def _engines(options: dict[str, Any]) -> list[_Contestant]:
    truth = one_process(options)
    found = []
    for name, build in ENGINES.items():
        if available(name):
            ready: Ready = build(options)
            ready.step()
            found.append(_Contestant(name, ready.step, distance(ready.gradients(), truth)))
    return found


def one_process(options: dict[str, Any]) -> list[Tensor]:
    """Gradients of the whole batch on one process, without gradient caching."""
    b, world = options["engine_rows"], dist.get_world_size()
    encoders, inputs = image_text(world * b, small=True)
    features = [encode(each, given) for each, given in zip(encoders, inputs, strict=True)]
    alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    ClipLoss(group=alone)(*features).loss.backward()
    return _gradients(encoders)


def available(name: str) -> bool:
    """Whether the packages that an engine needs are installed."""
    return "ZeRO" not in name or find_spec("deepspeed") is not None


class _TwoTowers(nn.Module):
    """Both encoders behind one forward, as DeepSpeed wants it."""

    def __init__(self, encoders: Sequence[nn.Module]) -> None:
        super().__init__()
        self.towers = nn.ModuleList(encoders)

    def forward(self, tower: int, inputs: Any) -> Tensor:
        return encode(self.towers[tower], inputs)


def _local(options: dict[str, Any]) -> tuple[tuple[nn.Module, nn.Module], list[Any]]:
    """Encoders with the weights of all ranks, and the rows of this one."""
    b, world, rank = options["engine_rows"], dist.get_world_size(), dist.get_rank()
    encoders, inputs = image_text(world * b, small=True)
    own = slice(rank * b, (rank + 1) * b)
    texts = {name: each[own] for name, each in inputs[1].items()}
    return encoders, [inputs[0][own], texts]


def _gradients(modules: Sequence[nn.Module]) -> list[Tensor]:
    return [_full(p.grad) for each in modules for p in each.parameters() if p.grad is not None]


def _full(gradient: Tensor) -> Tensor:
    return (gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient).clone()


def _plain_ddp(options: dict[str, Any]) -> Ready:
    encoders, inputs = _local(options)
    wrapped, loss = [DistributedDataParallel(each) for each in encoders], ClipLoss()

    def step() -> None:
        _forget(encoders)
        features = [encode(each, given) for each, given in zip(wrapped, inputs, strict=True)]
        (dist.get_world_size() * loss(*features).loss).backward()

    return Ready(step, partial(_gradients, encoders))


def _cached(
    wrap: Callable[[nn.Module], nn.Module], strategy: Callable[[], Any], options: dict[str, Any]
) -> Ready:
    encoders, inputs = _local(options)
    wrapped = [wrap(each) for each in encoders]
    cache = GradCache(wrapped, ClipLoss(), chunk_size=options["chunk"], strategy=strategy())

    def step() -> None:
        _forget(encoders)
        cache(*inputs)

    return Ready(step, partial(_gradients, encoders))


def _deepspeed(stage: int, options: dict[str, Any]) -> Ready:
    os.environ.setdefault("DS_ACCELERATOR", "cpu" if not torch.cuda.is_available() else "cuda")
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    encoders, inputs = _local(options)
    model = _TwoTowers(encoders)
    config = {
        "train_micro_batch_size_per_gpu": options["engine_rows"],
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.0)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=config, dist_init_required=False
    )
    cache = GradCache(
        engine, ClipLoss(), chunk_size=options["chunk"], strategy=DeepSpeedStrategy(engine)
    )
    last: list[Tensor] = []

    def step() -> None:
        cache(*inputs)
        if not last:
            found = (safe_get_full_grad(each) for each in parameters)
            last.extend(each.clone() for each in found if each is not None)
        engine.step()

    return Ready(step, lambda: last)


def _forget(encoders: Sequence[nn.Module]) -> None:
    for each in encoders:
        each.zero_grad()


ENGINES: dict[str, Callable[[dict[str, Any]], Ready]] = {
    "DDP without gradient caching": _plain_ddp,
    "DDPStrategy": partial(_cached, DistributedDataParallel, DDPStrategy),
    "AllReduceStrategy": partial(_cached, lambda each: each, AllReduceStrategy),
    "FSDPStrategy": partial(_cached, fully_shard, FSDPStrategy),
    "FSDPStrategy(keep_gathered=True)": partial(
        _cached, fully_shard, partial(FSDPStrategy, keep_gathered=True)
    ),
    **{f"DeepSpeedStrategy, ZeRO {stage}": partial(_deepspeed, stage) for stage in range(4)},
}


# The section of docs/benchmarks.md


def section(results: Path) -> str:
    """Collectives, bytes, time and gradient error of each way."""
    head = ("", "", "processes", "collectives", "received", "time", "gradient error")
    text = (
        "Collectives and bytes are counted in one step. Times are median ratios to the first way "
        "of a part, over gloo on cores that all processes share: they tell of work, not of a "
        "network. Gradients are compared with one process that has the whole batch."
    )
    lines = [
        [
            *(row.part, row.contestant, str(row.world), str(row.collectives)),
            *(bytes_text(row.bytes_received), f"{row.time_ratio:.2f}", power(row.error)),
        ]
        for row in read_rows(Row, results / _FILE)
    ]
    return f"{paragraph(text)}\n\n{table(head, lines, 'llrrrrr')}"


def _parser() -> argparse.ArgumentParser:
    made = parser(__doc__)
    add = made.add_argument
    add("--world", type=int, nargs="+", default=[2, 4], help="numbers of processes")
    add("--quick", action="store_true", help="small, two processes")
    add("--loss-rows", type=int, default=2048, help="pairs on each process, of the loss")
    add("--width", type=int, default=512, help="feature width, of the loss")
    add("--engine-rows", type=int, default=64, help="pairs on each process, of the engine")
    add("--chunk", type=int, default=16, help="chunk size")
    add("--rounds", type=int, default=5, help="timed rounds")
    return made


if __name__ == "__main__":
    main()
