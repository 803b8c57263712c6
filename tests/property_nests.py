"""Nests of inputs that a description builds and an encoder reads.

A leaf with rows holds WIDTH numbers per row, however it is stored: which branch of the encoder the
row uses, the number of the row, and four values. `read` adds up all leaves, each times a number of
its own, so that a leaf whose rows are exchanged or missing changes the result.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradcache_clip import Shared

WIDTH, VALUES, LONGEST = 6, 4, 5
WITH_ROWS = ("tensor", "array", "list", "texts", "samples", "tokens", "tokens and columns")
FLAGS = (None, True, 2.5, "mean", torch.float32, (3, 4))


@dataclass(frozen=True)
class Nest:
    """A leaf, or a container of others."""

    kind: str
    """One of WITH_ROWS, "shared", "flag 0" to "flag 5", "dict", "tuple", "named", "dataclass"."""
    children: tuple[Nest, ...] = ()


class Named(NamedTuple):
    first: Any
    second: Any


@dataclass(frozen=True)
class Pair:
    first: Any
    second: Any


class Rows(NamedTuple):
    """Rows of the global batch that a nest is built for."""

    seed: int
    numbers: Sequence[int]
    branches: Sequence[int]
    """By row of the global batch."""
    tower: int

    def random(self, path: str, *shape: int) -> Tensor:
        """Numbers of all rows that belong to a place in the nest."""
        seed = zlib.crc32(f"{self.seed} {self.tower} {path}".encode())
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def values(self, path: str) -> Tensor:
        """(rows, WIDTH): branch, number, values."""
        values = self.random(path, len(self.branches), WIDTH)
        values[:, 0] = torch.tensor(self.branches)
        values[:, 1] = 1000 * self.tower + torch.arange(len(self.branches))
        return values[list(self.numbers)]


def build(nest: Nest, rows: Rows, *, shared: bool, path: str = "") -> Any:
    """Inputs for these rows; with `shared` marked as the engine wants it."""
    if nest.kind == "shared":
        value = {"table": rows.random(path, len(rows.branches), VALUES)}
        return Shared(value) if shared else value
    if nest.kind.startswith("flag"):
        return FLAGS[int(nest.kind[-1])]
    if nest.kind in WITH_ROWS:
        return _leaf(nest.kind, rows, path)
    parts = [
        build(child, rows, shared=shared, path=f"{path}/{index}")
        for index, child in enumerate(nest.children)
    ]
    if nest.kind == "dict":
        return {f"k{index}": part for index, part in enumerate(parts)}
    kinds = {"named": Named, "dataclass": Pair}
    return kinds[nest.kind](*parts) if nest.kind in kinds else tuple(parts)


def _leaf(kind: str, rows: Rows, path: str) -> Any:
    values = rows.values(path)
    if kind == "array":
        return values.numpy()
    if kind == "list":
        return list(values)
    if kind == "texts":
        # Of unequal length, which a sorting goes by.
        return [" ".join(map(repr, row)) for row in values.tolist()]
    if kind == "samples":
        return [_sample(row, rows, path) for row in values]
    return values if kind == "tensor" else _tokens(values, rows, path, kind != "tokens")


def _sample(row: Tensor, rows: Rows, path: str) -> dict[str, Tensor]:
    """As a batch of images is, with any number of patches each."""
    number = int(row[1])
    return {"row": row, "patches": rows.random(f"{path}/{number}", number % 3, VALUES)}


def _tokens(values: Tensor, rows: Rows, path: str, columns: bool) -> dict[str, Tensor]:
    lengths = 1 + (values[:, 1] * 7 % LONGEST).long()
    mask = (torch.arange(LONGEST) < lengths[:, None]).long()
    ids = rows.random(f"{path}/ids", len(rows.branches), LONGEST)[list(rows.numbers)]
    tokens = {"row": values, "input_ids": (ids * 100).long() * mask, "attention_mask": mask}
    if columns:
        wide = rows.random(f"{path}/wide", len(rows.branches), LONGEST)
        tokens["wide"] = wide[list(rows.numbers)]
    return tokens


def float_tensors(inputs: Any) -> list[Tensor]:
    """Tensors of floats in an input, also those that are shared, in one order."""
    if isinstance(inputs, Tensor):
        return [inputs] if inputs.is_floating_point() else []
    parts: Any = inputs if isinstance(inputs, (tuple, list)) else ()
    if isinstance(inputs, Shared):
        parts = [inputs.value]
    elif isinstance(inputs, Mapping):
        parts = inputs.values()
    elif isinstance(inputs, Pair):
        parts = (inputs.first, inputs.second)
    return [tensor for part in parts for tensor in float_tensors(part)]


def read(nest: Nest, inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Values (rows, VALUES), branches (rows,) and numbers (rows,), each from all leaves."""
    leaves = list(_leaves(nest, inputs))
    rows = [_rows_in(kind, leaf) for kind, leaf in leaves if kind in WITH_ROWS]
    values = torch.zeros(())
    for place, row in enumerate(rows):
        values = values + (1 + 0.3 * place) * row[:, 2:]
    for kind, leaf in leaves:
        if kind == "shared":
            values = values + leaf["table"].cos().mean(0)
    return values, rows[0][:, 0].detach(), rows[0][:, 1].detach()


def _leaves(nest: Nest, inputs: Any) -> Iterator[tuple[str, Any]]:
    if not nest.children:
        if nest.kind.startswith("flag"):
            assert inputs == FLAGS[int(nest.kind[-1])], (nest, inputs)
        yield nest.kind, inputs
        return
    if isinstance(inputs, Mapping):
        parts: Sequence[Any] = [inputs[f"k{index}"] for index in range(len(nest.children))]
    else:
        parts = inputs if isinstance(inputs, tuple) else (inputs.first, inputs.second)
    for child, part in zip(nest.children, parts, strict=True):
        yield from _leaves(child, part)


def _rows_in(kind: str, leaf: Any) -> Tensor:
    if kind == "tensor":
        return leaf
    if kind == "array":
        return torch.from_numpy(leaf)
    if kind == "list":
        return torch.stack(leaf)
    if kind == "texts":
        rows = [[float(number) for number in text.split()] for text in leaf]
        return torch.tensor(rows, dtype=torch.float64)
    if kind == "samples":
        rows, sums = (torch.stack(parts) for parts in zip(*map(_collated, leaf), strict=True))
        return rows + sums
    kept = leaf["attention_mask"]
    summed = ((leaf["input_ids"] * 0.01).sin() * kept).sum(1)
    if "wide" in leaf:
        summed = summed + leaf["wide"].sum(1)
    return leaf["row"] + torch.nn.functional.pad(summed[:, None], (2, VALUES - 1))


def _collated(sample: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    patches = sample["patches"].sum(0)
    return sample["row"], torch.cat([patches.new_zeros(WIDTH - VALUES), patches])
