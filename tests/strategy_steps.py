"""Optimizer steps on several ranks beside the same steps in one process and one graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from one_shot import gradient_errors, worst
from torch import Tensor, nn

from gradcache_clip import ClipLoss, GradCache

ROWS = 20
"""Of the global batch, whatever the world."""
WIDTHS = (6, 9)


def tower(width: int, *, dropout: float = 0.0) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(width, 24), nn.LayerNorm(24), nn.GELU(), nn.Dropout(dropout), nn.Linear(24, 8)
    )


def two_towers(dropout: float = 0.0) -> list[nn.Module]:
    """Unequal in width and depth."""
    torch.manual_seed(7)
    deeper = nn.Sequential(tower(9, dropout=dropout), nn.GELU(), nn.Linear(8, 8))
    return [tower(6, dropout=dropout), deeper]


def tied_towers() -> list[nn.Module]:
    torch.manual_seed(7)
    both = tower(6)
    return [both, both]


def with_frozen_text() -> list[nn.Module]:
    image, text = two_towers()
    return [image, text.requires_grad_(False)]


class OneModule(nn.Module):
    """Both towers behind one forward; also the scale of the loss, if it is given one."""

    def __init__(self, towers: Sequence[nn.Module], log_logit_scale: Tensor | None = None) -> None:
        super().__init__()
        self.towers = nn.ModuleList(towers)
        if log_logit_scale is not None:
            self.log_logit_scale = nn.Parameter(log_logit_scale)

    def forward(self, tower: int, inputs: Tensor) -> Tensor:
        return self.towers[tower](inputs)


class PlainClip(nn.Module):
    """The textbook loss over all rows, which knows nothing of ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.log_logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        logits = self.log_logit_scale.exp() * F.normalize(q) @ F.normalize(k).T
        labels = torch.arange(len(q))
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def global_batch(step: int, widths: Sequence[int] = WIDTHS, rows: int = ROWS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(rows, width, generator=generator, dtype=torch.float64) for width in widths]


def rows_of(rank: int, batch: Sequence[Tensor]) -> list[Tensor]:
    local = ROWS // dist.get_world_size()
    return [inputs[rank * local : (rank + 1) * local] for inputs in batch]


def seed(step: int, rank: int) -> None:
    torch.manual_seed(1000 * step + rank)


def in_one_graph(
    encoders: Sequence[nn.Module], loss: nn.Module, step: int, batch: Sequence[Tensor], chunk: int
) -> Tensor:
    """Every rank's rows with the random numbers that this rank draws, chunk by chunk."""
    parts: list[list[Tensor]] = [[] for _ in encoders]
    for rank in range(dist.get_world_size()):
        seed(step, rank)
        for index, inputs in enumerate(rows_of(rank, batch)):
            parts[index] += [encoders[index](rows) for rows in inputs.split(chunk)]
    value = loss(*(torch.cat(part) for part in parts))
    value.backward()
    return value.detach()


def full(gradient: Tensor | None) -> Tensor | None:
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient


def optimizer_steps(
    build: Callable[[], list[nn.Module]],
    wrap: Callable[[list[nn.Module]], Any],
    strategy: Any,
    *,
    steps: int = 3,
    chunk: int = 3,
    widths: Sequence[int] = WIDTHS,
    keep_gradients: bool = False,
    counted: Any = None,
    **options: Any,
) -> dict[str, Any]:
    """Losses and all gradients of some steps, beside one process with the whole batch.

    `wrap` turns encoders into what `GradCache` takes; `counted` counts reductions.
    """
    ours, truth = [module.double() for module in build()], [m.double() for m in build()]
    loss, true_loss = ClipLoss().double(), PlainClip().double()
    cache = GradCache(wrap(ours), loss, strategy=strategy, chunk_size=chunk, **options)
    sides = [nn.ModuleList([*ours, loss]), nn.ModuleList([*truth, true_loss])]
    optimizers = [torch.optim.SGD(side.parameters(), lr=0.1, momentum=0.9) for side in sides]
    errors, losses, reductions = [], [], []
    for step in range(steps):
        batch = global_batch(step, widths)
        seed(step, dist.get_rank())
        before = counted.calls if counted else 0
        out = cache(*rows_of(dist.get_rank(), batch))
        reductions.append((counted.calls if counted else 0) - before)
        value = in_one_graph(truth, true_loss, step, batch, chunk)
        losses.append(float((out.loss - value).abs() / value))
        errors.append(worst(errors_of(sides[0], sides[1])))
        for optimizer in optimizers:
            optimizer.step()
            if not keep_gradients:
                optimizer.zero_grad()
    name, error = max(errors, key=lambda pair: pair[1])
    return {
        "error": max(error, 0.0),
        "parameter": name,
        "loss": max(losses),
        "reductions": reductions,
    }


def errors_of(ours: nn.Module, truth: nn.Module) -> dict[str, float]:
    """Relative error of each gradient; sharded ones are gathered, so every rank must call this."""
    plain = nn.ModuleList([nn.Module()])
    for name, parameter in ours.named_parameters():
        copy = nn.Parameter(torch.empty(truth.get_parameter(name).shape, dtype=torch.float64))
        copy.grad = None if parameter.grad is None else full(parameter.grad).double().clone()
        plain[0].register_parameter(name.replace(".", "/"), copy)
    expected = nn.ModuleList([nn.Module()])
    for name, parameter in truth.named_parameters():
        expected[0].register_parameter(name.replace(".", "/"), parameter)
    return gradient_errors(plain, expected)
