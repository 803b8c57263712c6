"""The CLIP, sigmoid and NT-Xent losses: what is measured of their contestants, and the rows."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

import loss_peers
import torch
from contestants import DTYPES, Contestant, Step, Task
from contests import Contest, Found, Turns
from loss_peers import CASES, OUTPUTS, PLAIN, Leaves, make_leaves, ours
from loss_rows import (
    TITLES,
    VIEWS,
    ErrorRow,
    MemoryRow,
    Results,
    TimeRow,
    stem,
    write_results,
)
from torch import Tensor
from torch.nn.functional import normalize

NAMES = tuple(TITLES)
"""The losses, as --losses calls them."""
OPERATIONS = {"clip": 8, "siglip": 6, "nt_xent": 16}
"""Multiply-adds count twice; in units of B^2 D for B pairs. Similarities and the two products with
their gradient are 6, computing the similarities again in the backward of a softmax 2 more; the 2 B
views of the NT-Xent loss have a symmetric matrix, of which one half is enough."""
MATMUL_EDGE = 4096


@dataclass(frozen=True)
class PairLoss(Task):
    """A loss of q and k (B, D)."""

    width: int
    error_batch: int

    small: ClassVar[int] = 128
    cases: ClassVar[tuple[str, ...]] = tuple(CASES)

    def contestants(self) -> list[Contestant]:
        return [one for one in loss_peers.CONTESTANTS if one.loss == self.title]

    def step(self, contestant: Contestant) -> Step:
        return partial(outputs, contestant.build(CASES["random"].scale))

    def inputs(self, size: int) -> Leaves:
        return make_leaves(self.title, CASES["random"], size, self.width, self.dtype, self.device)

    def errors(self, contestant: Contestant, case: str) -> dict[str, float]:
        """Relative errors of loss and gradients, by name of the output."""
        shape = self.error_size(contestant), self.width, self.dtype, self.device
        leaves = make_leaves(self.title, CASES[case], *shape)
        got = outputs(contestant.build(CASES[case].scale), leaves)
        exact = truth(self.title, leaves, normalised=contestant.normalises)
        return relative_errors(self.title, got, exact)

    def error_size(self, contestant: Contestant) -> int:
        return min(self.error_batch, contestant.largest)

    def product(self, times: int) -> Callable[[], object]:
        """The yardstick: 4096 x D x 4096."""
        shape = MATMUL_EDGE, self.width
        a, b = (torch.randn(shape).to(self.device, DTYPES[self.dtype]) for _ in range(2))
        out = torch.empty(MATMUL_EDGE, MATMUL_EDGE, dtype=a.dtype, device=self.device)

        def product() -> None:
            for _ in range(times):
                torch.mm(a, b.T, out=out)
            if self.device == "cuda":
                torch.cuda.synchronize()

        return product


def contests(options: argparse.Namespace) -> list[Contest]:
    """Those of --losses."""
    return [_contest(name, options) for name in NAMES if name in options.losses]


def _contest(loss: str, options: argparse.Namespace) -> Contest:
    task = PairLoss(loss, options.dtype, options.device, options.width, options.error_batch)
    return Contest(
        task,
        sizes=tuple(batch // VIEWS[loss] for batch in options.batches),
        ours=ours(options.device),
        timed=replace(task, width=options.time_width),
        time_size=options.time_batch // VIEWS[loss],
        widening=max(options.time_width / options.width, 1),
    )


# Errors against fp64


def truth(loss: str, leaves: Leaves, *, normalised: bool) -> list[Tensor]:
    """Loss and gradients in fp64 at these very numbers, through a normalisation if asked."""
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    features = [normalize(x, dim=1) if normalised else x for x in exact[:2]]
    value = PLAIN[loss](*features, *exact[2:])
    return [value.detach(), *torch.autograd.grad(value, exact)]


def outputs(function: Callable[..., Tensor], leaves: Leaves) -> list[Tensor | None]:
    """Loss and gradients; None where a gradient does not exist."""
    value = function(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves, allow_unused=True)]


def relative_error(got: Tensor, exact: Tensor) -> float:
    """Largest difference over the largest exact entry; infinite where something is not finite."""
    if not got.isfinite().all():
        return float("inf")
    difference = (got.double() - exact).abs().max()
    return float(difference / exact.abs().max().clamp_min(1e-30))


def relative_errors(
    loss: str, got: Sequence[Tensor | None], exact: Sequence[Tensor]
) -> dict[str, float]:
    """The error of each output by name; a scalar without a gradient is left out."""
    named = dict(zip(OUTPUTS[loss], zip(got, exact, strict=True), strict=True))
    missing = [name for name in ("dq", "dk") if named[name][0] is None]
    if missing:
        raise ValueError(f"{missing[0]}: expected a gradient, got none")
    return {name: relative_error(a, b) for name, (a, b) in named.items() if a is not None}


# Rows and files


def write(
    found: Iterable[Found], options: argparse.Namespace, origin: Mapping[str, str]
) -> list[Path]:
    results = Results([], [], [])
    for each in found:
        results.memory += _memory_rows(each)
        results.errors += _error_rows(each)
        results.times += _time_rows(each)
    return write_results(results, origin, stem(options.results, options.device, options.dtype))


def _memory_rows(found: Found) -> list[MemoryRow]:
    head = partial(_head, found.contestant, found.contest.task)
    return [MemoryRow(*head(size), status, held) for size, (status, held) in found.memory.items()]


def _error_rows(found: Found) -> Iterator[ErrorRow]:
    task: Any = found.contest.task
    head = _head(found.contestant, task, task.error_size(found.contestant))[:-1]
    for case, (status, errors) in found.errors.items():
        named = {f"{output}_error": error for output, error in errors.items()}
        yield ErrorRow(*head, CASES[case].dtype or task.dtype, status, case=case, **named)


def _time_rows(found: Found) -> Iterator[TimeRow]:
    task: Any = found.contest.timed
    for size, turns in found.turns.items():
        head = *_head(found.contestant, task, size), turns.status
        values = time_values(task.title, size, task.width, turns) if turns.steps else {}
        yield TimeRow(*head, **values)


def _head(contestant: Contestant, task: Any, size: int) -> tuple[Any, ...]:
    """The first fields of every row, up to its status."""
    names = contestant.loss, contestant.name, contestant.version()
    return *names, size, task.width, task.dtype


def time_values(loss: str, batch_size: int, width: int, turns: Turns) -> dict[str, Any]:
    """Medians over the rounds, and the range of the ratios."""
    shares = [
        share_of_matmul(loss, batch_size, width, *pair)
        for pair in zip(turns.products, turns.steps, strict=True)
    ]
    ratios = turns.ratios() or [math.nan]
    return {
        "milliseconds": turns.milliseconds(),
        "time_over_ours": median(ratios),
        "lowest_ratio": min(ratios),
        "highest_ratio": max(ratios),
        "share_of_matmul": median(shares),
        "rounds": len(turns.steps),
    }


def share_of_matmul(
    loss: str, batch_size: int, width: int, product_ms: float, step_ms: float
) -> float:
    """Rate of a step over that of the product, counting OPERATIONS whatever it really does."""
    operations = OPERATIONS[loss] * batch_size**2 * width
    return (operations / step_ms) / (2 * MATMUL_EDGE**2 * width / product_ms)
