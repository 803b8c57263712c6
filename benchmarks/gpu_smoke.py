"""Every loss against fp64 on the GPU, in bf16, fp32 and fp16: is anything wrong at all?

    python benchmarks/gpu_smoke.py

Losses and gradients of 8,192 unit rows against the B x B reference at the same numbers in fp64.
Writes gpu_smoke.csv into benchmarks/results (or --results); status 1 if an error is too large.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from gpu_card import Card, Point, section, unit_rows
from loss_pairs import relative_error
from torch import Tensor, nn

from gradcache_clip import (
    ClipLoss,
    InfoNCELoss,
    LateInteractionLoss,
    MatryoshkaLoss,
    NTXentLoss,
    SigLipLoss,
    SupConLoss,
)

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
_SCALE = 50.0
_MOST_PROCESSES = 10
# Rounding of the inputs cancels, that of the gradients does not; the sums are in fp32.
_ROUNDINGS, _FP32_ERROR = 8, 2e-5


@dataclass(frozen=True)
class Smoke:
    """Largest difference of an output from fp64, over the output's largest number."""

    loss: str
    dtype: str
    batch_size: int
    width: int
    allowed_error: float
    status: str = ""
    loss_error: float = 0.0
    gradient_error: float = 0.0
    """The worst of all inputs and of the loss's own parameters."""


@dataclass(frozen=True)
class Case:
    """A loss, and the features that it takes."""

    name: str
    build: Callable[..., nn.Module]
    """With the implementation by name."""
    features: int = 2
    tokens: int = 0
    """Tokens a row; 0 for pooled features."""
    keywords: tuple[str, ...] = ()
    """Names under which it takes classes of the rows."""


def _matryoshka(width: int, **options: Any) -> nn.Module:
    return MatryoshkaLoss(ClipLoss(init_logit_scale=_SCALE, **options), [width // 4, width])


def cases(width: int) -> list[Case]:
    """One for each kernel, and for each rule of who competes."""
    # The rows have length one already: normalised again in bf16, tokens would find other matches.
    scale = {"init_logit_scale": _SCALE, "normalize": False}
    clip, info_nce = partial(ClipLoss, **scale), partial(InfoNCELoss, **scale)
    siglip = partial(SigLipLoss, normalize=False)
    return [
        Case("clip", clip),
        Case("siglip", siglip),
        Case("nt_xent", partial(NTXentLoss, **scale)),
        Case("clip, prefixes", partial(_matryoshka, width)),
        Case("info_nce, hard negatives", info_nce, features=3),
        Case("late interaction", partial(LateInteractionLoss, **scale), tokens=32),
        Case("clip, labels", clip, keywords=("labels",)),
        Case("clip, ids", clip, keywords=("ids",)),
        Case("siglip, labels", siglip, keywords=("labels",)),
        Case("sup_con", partial(SupConLoss, **scale), features=1, keywords=("labels",)),
    ]


def points(card: Card, results: Path) -> Iterator[Point]:
    """Each loss in bf16 first, which people train in."""
    batch, width = (256, 64) if card.small else (8192, 512)
    # Most of the time goes into compiling, of which every process does a part.
    with ProcessPoolExecutor(_processes(card), get_context("spawn")) as pool:
        planned = []
        for dtype in _DTYPES:
            for number, case in enumerate(cases(width)):
                rows, columns = (batch // 32, width // 4) if case.tokens else (batch, width)
                head = Smoke(case.name, dtype, rows, columns, _allowed(dtype))
                planned.append((head, pool.submit(_errors, type(card), number, width, head)))
        for head, running in planned:
            yield Point(head, running.result)
        pool.shutdown(wait=False, cancel_futures=True)


def _processes(card: Card) -> int:
    """As many as have room for a few fp64 matrices each."""
    each = 2**20 if card.small else 4 * 2**30
    return max(1, min(_MOST_PROCESSES, os.cpu_count() or 1, card.memory_bytes // each))


def _allowed(dtype: str) -> float:
    return _ROUNDINGS * torch.finfo(_DTYPES[dtype]).eps + _FP32_ERROR


_card = cache(lambda kind: kind())


def _errors(kind: type[Card], number: int, width: int, head: Smoke) -> dict[str, float]:
    """The errors of a case by its number, in a process of the pool."""
    card, case, dtype = _card(kind), cases(width)[number], _DTYPES[head.dtype]
    torch.manual_seed(0)
    features = [
        unit_rows(card, head.batch_size * (case.tokens or 1), head.width, dtype).detach()
        for _ in range(case.features)
    ]
    if case.tokens:
        features = [each.unflatten(0, (head.batch_size, case.tokens)) for each in features]
    classes = torch.arange(head.batch_size, device=card.device) // 2
    keywords = dict.fromkeys(case.keywords, classes)
    got = _outputs(case.build(impl=card.impl).to(card.device), features, keywords)
    exact = case.build(impl="reference").double().to(card.device)
    wanted = _outputs(exact, [each.double() for each in features], keywords)
    loss, *gradients = (relative_error(a, b) for a, b in zip(got, wanted, strict=True))
    errors = {"loss_error": loss, "gradient_error": max(gradients)}
    if max(errors.values()) > head.allowed_error:
        raise ArithmeticError(f"expected errors up to {head.allowed_error:.1e}, got {errors}")
    return errors


def _outputs(loss: nn.Module, features: Sequence[Tensor], keywords: dict[str, Tensor]) -> list:
    leaves = [each.clone().requires_grad_() for each in features]
    value = loss(*leaves, **keywords).loss
    return [value.detach(), *torch.autograd.grad(value, [*leaves, *loss.parameters()])]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; 1 if something is wrong, 2 if there is no GPU."""
    return section(__doc__, "gpu_smoke.csv", points, arguments)


if __name__ == "__main__":
    sys.exit(main())
