"""The launch table beside other tiles, warps, stages, registers and workspaces, on the GPU here.

    python benchmarks/tune_kernels.py
    python benchmarks/tune_kernels.py --seconds 600

Forward and backward in bf16 at a batch of 32,768: the CLIP loss at D = 512, 768 and 1,024, of which
either the statistics or the gradient change, the sigmoid loss at 768 and prefixes at 512. Features
come through pointers or TMA descriptors. The table's entry is first, then what differs from it in
one choice, then in two of them. Every configuration is compiled by another process before it is
timed; one that does not compile says so. Quotes 8 B^2 D operations, 6 for the sigmoid loss.

Writes tune_kernels.csv into benchmarks/results (or --results). The table is
kernels/launch_config.py.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from importlib import import_module
from itertools import combinations, product, zip_longest
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from gpu_card import Card, Point, section, unit_rows

from gradcache_clip import ClipLoss, MatryoshkaLoss, SigLipLoss

if TYPE_CHECKING:
    from gradcache_clip.kernels.launch_config import Described, LaunchConfig

FILE = "tune_kernels.csv"
_CHOICES: dict[str, tuple[Any, ...]] = {
    "tile": ((128, 128), (256, 128), (128, 256), (64, 128), (128, 64)),
    "BLOCK_D": (32, 64, 128),
    "num_warps": (4, 8, 16),
    "num_stages": (2, 3, 4),
    "max_registers": (None, 128, 168),
    "GROUP_M": (4, 8, 16),
    "workspace_bytes": (64 * 2**20, 256 * 2**20, 2**30),
}
_MOST_PROCESSES = 8
_COMPILED_ROWS = 512


@dataclass(frozen=True)
class Work:
    """A loss whose kernels are tuned.

    Attributes:
        kernels: modules whose function `finder` says how they are launched.
        kernel: whose entry of the table comes first.
        operations: of one pair and number of a feature.
    """

    name: str
    width: int
    build: Callable[..., torch.nn.Module]
    kernels: tuple[str, ...]
    finder: str = "launch_config"
    operations: int = 8
    kernel: Described = "gradient"


def _prefixes(width: int, **options: Any) -> torch.nn.Module:
    return MatryoshkaLoss(ClipLoss(**options), [width // 4, width // 2, width])


def _clip(kernel: Described, width: int) -> Work:
    return Work(f"clip {kernel}", width, ClipLoss, (f"contrast_{kernel}",), kernel=kernel)


_PREFIX = "prefix_statistics", "prefix_gradient"
WORKS = (
    *(_clip(kernel, 768) for kernel in ("statistics", "gradient")),
    Work("siglip", 768, SigLipLoss, ("sigmoid",), operations=6, kernel="sigmoid"),
    *(_clip(kernel, D) for D in (512, 1024) for kernel in ("statistics", "gradient")),
    Work("prefixes", 512, partial(_prefixes, 512), _PREFIX, "prefix_config"),
)


@dataclass(frozen=True)
class Tuned:
    """One configuration and how fast it is."""

    loss: str
    width: int
    config: str
    from_table: bool
    status: str = ""
    milliseconds: float = 0.0
    tflop_per_s: float = 0.0


def candidates(*entries: LaunchConfig) -> Iterator[LaunchConfig]:
    """The entries, then all that differ from the first in one choice, then in two."""
    entry, seen = entries[0], set(entries)
    yield from dict.fromkeys(entries)
    for count in (1, 2):
        for names in combinations(_CHOICES, count):
            for values in product(*(_CHOICES[name] for name in names)):
                changed = _changed(entry, dict(zip(names, values, strict=True)))
                if changed not in seen:
                    seen.add(changed)
                    yield changed


def _changed(entry: LaunchConfig, change: dict[str, Any]) -> LaunchConfig:
    if tile := change.pop("tile", None):
        change |= {"BLOCK_M": tile[0], "BLOCK_N": tile[1]}
    return replace(entry, **change)


def points(card: Card, results: Path) -> Iterator[Point]:
    """The entry of every loss, then further configurations of all of them in turn."""
    rows = 256 if card.small else 32768
    planned = [
        (number, config, place == 0)
        for place, each in enumerate(zip_longest(*map(partial(_of, card), WORKS)))
        for number, config in enumerate(each)
        if config is not None
    ]
    if card.small:
        planned = planned[: 2 * len(WORKS)]
    processes = max(1, min(_MOST_PROCESSES, (os.cpu_count() or 1) // 2))
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        compiled = [pool.submit(_compile, type(card), each[0], each[1]) for each in planned]
        for (number, config, from_table), ready in zip(planned, compiled, strict=True):
            work = WORKS[number]
            head = Tuned(work.name, work.width, _name(config), from_table)
            yield Point(head, partial(_measure, card, work, config, rows, ready.result))
        pool.shutdown(wait=False, cancel_futures=True)


def _of(card: Card, work: Work) -> Iterator[LaunchConfig]:
    from gradcache_clip.kernels.launch_config import prefix_entry, table_entry

    dtype = torch.bfloat16
    if work.finder == "prefix_config":
        return candidates(prefix_entry(card.architecture, dtype, gradient=True))
    plain = table_entry(card.architecture, dtype)
    entry = table_entry(card.architecture, dtype, kernel=work.kernel)
    # Also the tile of the other loop, and on consumer cards descriptors that no entry has yet.
    wide = replace(plain, BLOCK_N=256, max_registers=None, parts=4)
    narrow = replace(plain, max_registers=None, parts=2)
    return candidates(entry, plain, *([wide, narrow] if card.architecture >= 90 else []))


_card = cache(lambda kind: kind())


def _compile(kind: type[Card], number: int, config: LaunchConfig) -> None:
    """Take one small step, in a process of the pool: its kernels are then on the disk."""
    card = _card(kind)
    _with(config, WORKS[number], _step(card, WORKS[number], _COMPILED_ROWS))


def _measure(
    card: Card, work: Work, config: LaunchConfig, rows: int, compiled: Callable[[], None]
) -> dict[str, float]:
    compiled()
    step = _step(card, work, rows)
    milliseconds = _with(config, work, lambda: card.time_ms(step, rounds=3))
    operations = work.operations * rows**2 * work.width
    return {"milliseconds": milliseconds, "tflop_per_s": operations / milliseconds / 1e9}


def _step(card: Card, work: Work, rows: int) -> Callable[[], object]:
    loss = work.build(impl=card.impl).to(card.device)
    features = [unit_rows(card, rows, work.width, torch.bfloat16) for _ in range(2)]
    return lambda: torch.autograd.grad(loss(*features).loss, features)


def _with(config: LaunchConfig, work: Work, call: Callable[[], Any]) -> Any:
    """Call with this configuration in the place of the table's."""
    with ExitStack() as stack:
        for name in work.kernels:
            module = import_module(f"gradcache_clip.kernels.{name}")
            stack.enter_context(patch.object(module, work.finder, lambda *_, **__: config))
        return call()


def _name(config: LaunchConfig) -> str:
    values = asdict(config)
    tile = " x ".join(str(values.pop(edge)) for edge in ("BLOCK_M", "BLOCK_N", "BLOCK_D"))
    del values["precision"]
    return ", ".join([tile, *(f"{name} {value}" for name, value in values.items())])


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure until the time is up; 1 if nothing could be, 2 if there is no GPU."""
    return section(__doc__, FILE, points, arguments, may_fail=True)


if __name__ == "__main__":
    sys.exit(main())
