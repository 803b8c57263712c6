"""Encoders with losses of their own, and the one-shot step of all rows beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradcache_clip.distributed import gather_rows

ROWS, WEIGHT = 22, 0.3
WIDTHS = (6, 9)


class WithRouter(nn.Module):
    """Features, and the mean over rows of what a second layer makes of them."""

    def __init__(self, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, 12), nn.Tanh(), nn.Dropout(dropout))
        self.head, self.router = nn.Linear(12, 8), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = self.layers(x)
        router = self.router(hidden).logsumexp(1).square().mean()
        return {"embedding": self.head(hidden), "router": router}


class Balanced(WithRouter):
    """A product of means over the batch: not a mean over rows."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = self.layers(x)
        shares = self.router(hidden).softmax(1).mean(0)
        return {"embedding": self.head(hidden), "router": shares.square().sum()}


class Contrast(nn.Module):
    """Over the rows of all ranks, with parts for the log."""

    def __init__(self, gather: Callable[[Tensor], Tensor] = gather_rows) -> None:
        super().__init__()
        self.scale, self.gather = nn.Parameter(torch.tensor(1.5)), gather

    def forward(self, q: dict[str, Tensor], k: dict[str, Tensor]) -> dict[str, Tensor]:
        a, b = (self.gather(F.normalize(side["embedding"])) for side in (q, k))
        logits = self.scale.exp() * a @ b.T
        labels = torch.arange(len(logits))
        accuracy = (logits.argmax(1) == labels).double().mean()
        return {"loss": F.cross_entropy(logits, labels), "accuracy": accuracy}


def two_encoders(kind: Callable[..., nn.Module] = WithRouter, **options: Any) -> list[nn.Module]:
    torch.manual_seed(3)
    return [kind(width, **options).double() for width in WIDTHS]


def batch(rows: int = ROWS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(rows, width, generator=generator, dtype=torch.float64) for width in WIDTHS]


def one_shot(
    encoders: Sequence[nn.Module], loss: nn.Module, inputs: Sequence[Tensor], chunk: int = ROWS
) -> Tensor:
    """The step in one graph; with `chunk`, auxiliary losses are means of those of the chunks."""
    sides, total = [], torch.zeros((), dtype=torch.float64)
    for encoder, given in zip(encoders, inputs, strict=True):
        parts = [encoder(rows) for rows in given.split(chunk)]
        sides.append({"embedding": torch.cat([part["embedding"] for part in parts])})
        shares = [len(part["embedding"]) / len(given) for part in parts]
        pairs = zip(shares, parts, strict=True)
        total = total + WEIGHT * sum(share * part["router"] for share, part in pairs)
    whole = loss(*sides)["loss"] + total
    whole.backward()
    return whole.detach()
