"""Types that have rows of their own: jagged NestedTensors and batches of PyTorch Geometric."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradcache_clip.cache.nests import children_of, is_graph_batch, with_children
from gradcache_clip.cache.rows import Rows, Spans


def own_rows(part: Any, path: str = "input") -> Rows | None:
    """Return the rows of a part that knows them by itself.

    Raises:
        TypeError, ValueError: its type does, but this one cannot be cut.
    """
    if isinstance(part, Tensor):
        return _jagged(part, path) if part.is_nested else None
    if isinstance(part, Rows):
        return part
    return _graphs(part, path) if is_graph_batch(part) else None


def with_own_rows(inputs: Any, path: str) -> Any:
    """Replace every part that knows its rows, so that they are looked up once."""
    if isinstance(inputs, list) or type(inputs) is Tensor:
        return inputs
    if (own := own_rows(inputs, path)) is not None:
        return own
    children = children_of(inputs)
    parts = [with_own_rows(child, f"{path}[{key!r}]") for key, child in children]
    same = all(part is child for part, (_, child) in zip(parts, children, strict=True))
    return inputs if same else with_children(inputs, parts)


@dataclass(frozen=True, eq=False)
class Jagged(Rows):
    """A NestedTensor of jagged layout, (B, j, ...)."""

    nested: Tensor
    spans: Spans

    def __len__(self) -> int:
        return len(self.spans)

    def take(self, rows: slice | Sequence[int]) -> Jagged:
        values, spans = self.nested.values(), self.spans.take(rows)
        bounds = torch.tensor(spans.bounds, device=values.device)
        cut = torch.nested.nested_tensor_from_jagged(self.spans.cut(values, rows), bounds)
        return Jagged(cut, spans)

    @property
    def value(self) -> Tensor:
        return self.nested

    @property
    def lengths(self) -> list[int]:
        return self.spans.lengths


def _jagged(nested: Any, path: str) -> Jagged:
    if nested.layout is not torch.jagged:
        raise TypeError(
            f"{path}: expected a NestedTensor with layout=torch.jagged, got {nested.layout}; pass "
            "list(x.unbind()), one sample an element, or "
            "torch.nested.as_nested_tensor(x.unbind(), layout=torch.jagged)"
        )
    values = nested.values()
    if nested.lengths() is not None or values.shape[1:] != nested.shape[2:]:
        raise TypeError(
            f"{path}: expected a NestedTensor that is ragged in dimension 1 and without holes, got "
            f"shape {tuple(nested.shape)}; pass x.contiguous(), untransposed"
        )
    if nested.requires_grad:
        # torch adds no second gradient to a NestedTensor: there is none for the next chunk.
        raise ValueError(
            f"{path}: expected a NestedTensor that needs no gradient, got requires_grad=True, but "
            "torch cannot accumulate its gradient; pass its values(), and its offsets() as "
            "cu_seqlens, to an encoder that nests them, with rows=PackedTokens()"
        )
    return Jagged(nested, Spans(nested.offsets().diff().tolist()))


@dataclass(frozen=True, eq=False)
class Graphs(Rows):
    """A `Batch` of PyTorch Geometric, taken apart once."""

    batch: Any
    graphs: list[Any]
    follow: list[str]
    """Attributes of which the batch says, in `<name>_batch`, where each graph's begins."""

    def __len__(self) -> int:
        return len(self.graphs)

    def take(self, rows: slice | Sequence[int]) -> Graphs:
        graphs = self.graphs[rows] if isinstance(rows, slice) else [self.graphs[i] for i in rows]
        collate = type(self.batch).from_data_list
        return Graphs(collate(graphs, follow_batch=self.follow), graphs, self.follow)

    @property
    def value(self) -> Any:
        return self.batch

    @property
    def lengths(self) -> list[int]:
        return [graph.num_nodes for graph in self.graphs]


def _graphs(batch: Any, path: str) -> Graphs:
    try:
        graphs = batch.to_data_list()
    except RuntimeError as error:
        raise ValueError(
            f"{path}: expected a Batch that can be taken apart, got one that was not made from "
            "graphs; make it with Batch.from_data_list, or pass the list of graphs"
        ) from error
    known = {"batch", "ptr", *graphs[0].keys()}
    follow = [key for key in known if f"{key}_batch" in batch and f"{key}_ptr" in batch]
    known |= {f"{key}{end}" for key in follow for end in ("_batch", "_ptr")}
    if added := sorted(set(batch.keys()) - known):
        raise ValueError(
            f"{path}: expected a Batch with attributes that its graphs have, got {added}, added "
            "to it afterwards, which a chunk would lack; give them to each graph before "
            "Batch.from_data_list"
        )
    return Graphs(batch, graphs, follow)


def map_graphs(function: Callable[[Tensor], Tensor], batch: Any) -> Any:
    """Apply a function to every tensor of a `Batch`."""
    return copy.copy(batch).apply(function)
