"""Encoders whose rows say which parameters they use, and a loss over the rows of all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from property_nests import VALUES, Nest, read
from torch import Tensor, nn

from gradcache_clip import FrozenTrunk
from gradcache_clip.distributed import gather_rows

FEATURES = 6


class Noise(nn.Module):
    """Dropout that notes what it drew last for each row in training, or repeats what it is given.

    The first step checks rows before it embeds them, and padding in eval mode.
    """

    def __init__(self) -> None:
        super().__init__()
        self.drawn: dict[int, Tensor] = {}
        self.given: dict[int, Tensor] | None = None

    def forward(self, features: Tensor, numbers: Tensor) -> Tensor:
        rows = [int(number) for number in numbers]
        if self.given is not None:
            # The output of a branch is dropped for rows that no chunk ran it for.
            masks = [self.given.get(row, torch.zeros(FEATURES)) for row in rows]
            return features * torch.stack(masks).to(features.dtype)
        kept = (torch.rand(features.shape, dtype=torch.float64) < 0.7) / 0.7
        if self.training:
            self.drawn.update(zip(rows, kept, strict=True))
        return features * kept.to(features.dtype)


class Body(nn.Module):
    """A layer for all rows and two branches, each for the rows that ask for it.

    Args:
        always: run both branches for every chunk; their outputs are used where a row asks for them.
        noise: "no", "all" rows, or the "branch": then only chunks that run it draw numbers.
    """

    def __init__(self, *, always: bool, noise: str, frozen: str, parts: int) -> None:
        super().__init__()
        self.base = nn.Linear(VALUES, FEATURES)
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Linear(VALUES, 5), nn.GELU(), nn.Linear(5, FEATURES)) for _ in range(2)
        )
        self.never, self.noise = nn.Parameter(torch.ones(3)), Noise()
        self.always, self.where, self.parts = always, noise, parts
        if frozen in ("base", "all"):
            self.base.requires_grad_(False)
        if frozen in ("branches", "all"):
            self.branches.requires_grad_(False)
        if frozen == "all":
            self.never.requires_grad_(False)

    def forward(self, given: tuple[Tensor, Tensor, Tensor]) -> Any:
        values, branches, numbers = given
        values = values.to(self.base.weight.dtype)
        features = self.base(values)
        for index, branch in enumerate(self.branches, 1):
            asked = (branches == index)[:, None]
            found = branch(values) if self.always or bool(asked.any()) else None
            if found is not None and bool(asked.any()):
                noisy = self.where == "branch" and index == 2
                features = features + asked * (self.noise(found, numbers) if noisy else found)
        if self.where == "all":
            features = self.noise(features, numbers)
        if self.parts == 1:
            return features
        return features[:, : FEATURES // 2], {"rest": features[:, FEATURES // 2 :]}


class Reader(nn.Module):
    """Takes a nest apart; mappings arrive as keyword arguments, tuples as positional ones."""

    def __init__(self, nest: Nest) -> None:
        super().__init__()
        self.nest = nest

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        several = self.nest.kind in ("tuple", "named")
        return read(self.nest, kwargs or (args if several else args[0]))


class Encoder(nn.Module):
    def __init__(self, nest: Nest, body: Body) -> None:
        super().__init__()
        self.reader, self.body = Reader(nest), body

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.body(self.reader(*args, **kwargs))


class Trunk(nn.Module):
    """A reader and a frozen layer."""

    def __init__(self, nest: Nest) -> None:
        super().__init__()
        self.reader = Reader(nest)
        self.layer = nn.Linear(VALUES, VALUES).requires_grad_(False)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        values, *rest = self.reader(*args, **kwargs)
        return self.layer(values.to(self.layer.weight.dtype)), *rest


class OneForAll(nn.Module):
    """All encoders behind one forward."""

    def __init__(self, nests: Sequence[Nest], bodies: Sequence[Body]) -> None:
        super().__init__()
        self.nests, self.bodies = tuple(nests), nn.ModuleList(bodies)

    def forward(self, tower: int, inputs: Any) -> Any:
        return self.bodies[tower](read(self.nests[tower], inputs))


class Pairs(nn.Module):
    """Each row of an input finds itself in every other input; over the rows of all ranks."""

    def __init__(self, *, gathers: bool) -> None:
        super().__init__()
        self.log_scale, self.gathers = nn.Parameter(torch.tensor(0.5)), gathers

    def forward(self, *features: Any, shift: int) -> Tensor:
        whole = [self._whole(each) for each in features]
        pairs = [(i, j) for j in range(len(whole)) for i in range(j)] or [(0, 0)]
        return torch.stack([self._pair(whole[i], whole[j], shift) for i, j in pairs]).mean()

    def _whole(self, features: Any) -> Tensor:
        if isinstance(features, tuple):
            features = torch.cat([features[0], features[1]["rest"]], 1)
        if self.gathers:
            features = gather_rows(features)
        return features / (1 + features.norm(dim=1, keepdim=True))

    def _pair(self, one: Tensor, other: Tensor, shift: int) -> Tensor:
        logits = self.log_scale.exp() * one @ other.T
        return F.cross_entropy(logits, (torch.arange(len(logits)) + shift) % len(logits))


def encoder_with_trunk(nest: Nest, body: Body) -> FrozenTrunk:
    return FrozenTrunk(Trunk(nest), body)
