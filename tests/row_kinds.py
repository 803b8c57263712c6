"""Inputs whose rows are not dimension 0, from counts of entries per row, and encoders of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from packed_inputs import IMAGE, PATCH, graph_library
from torch import Tensor, nn

from gradcache_clip import PackedPatches, PackedTokens, Ragged

WIDTH = 4

Counts = Sequence[int]


class Kind(NamedTuple):
    """An input as it is passed, and what the encoder is given of the whole batch."""

    inputs: Any
    whole: Any
    rows: Callable[[Any], Any] | None = None


class Sums(nn.Module):
    """Adds up the entries of each row, each embedded by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.row, self.entry = nn.Linear(WIDTH, 5), nn.Linear(WIDTH, 5)

    def sums(self, rows: Tensor, counts: Tensor, entries: Any) -> Tensor:
        added = self.row(rows)
        if entries is None or not len(entries):
            return added
        values = torch.stack(list(map(torch.as_tensor, entries)))
        row = torch.arange(len(counts)).repeat_interleave(torch.as_tensor(counts))
        # An entry has a weight of its own, so that exchanged ones are seen.
        return added.index_add(0, row, self.entry(values).tanh() * values[:, :1])


class Posts(Sums):
    def forward(
        self, title: Tensor, counts: Tensor, images: Any = None, scale: float = 1
    ) -> Tensor:
        return self.sums(title, counts, images) * scale


class NestedPosts(Sums):
    def forward(self, title: Tensor, vision: Any) -> Tensor:
        return self.sums(title, vision.counts, vision.images)


@dataclass(frozen=True)
class Vision:
    counts: Tensor
    images: Tensor


class Patches(Sums):
    """Reads patches as a vision-language model does: tokens, pixels and grids have to agree."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Linear(PATCH, WIDTH)

    def forward(
        self, input_ids: Tensor, pixel_values: Any = None, image_grid_thw: Any = None
    ) -> Tensor:
        is_image = input_ids == IMAGE
        words = (input_ids * ~is_image).double()[:, :WIDTH]
        if pixel_values is None:
            assert image_grid_thw is None and not is_image.any()
            return self.sums(words, is_image.sum(1), None)
        assert image_grid_thw.prod(1).sum() == len(pixel_values) == 4 * is_image.sum()
        merged = self.patch(pixel_values).view(-1, 4, WIDTH).mean(1)
        return self.sums(words, is_image.sum(1), merged)


class Tokens(Sums):
    def forward(self, x: Tensor, cu_seqlens: Tensor, position_ids: Any = None) -> Tensor:
        lengths = cu_seqlens.diff()
        return self.sums(x.new_zeros(len(lengths), WIDTH), lengths, x.view(-1, WIDTH))


class Jagged(Sums):
    def forward(self, x: Tensor) -> Tensor:
        return self.sums(x.values().new_zeros(len(x), WIDTH), x.offsets().diff(), x.values())


class Graph(Sums):
    def forward(self, batch: Any) -> Tensor:
        sources, targets = batch.edge_index
        nodes = batch.x.index_add(0, targets, batch.x[sources])
        rows = batch.ptr.diff()
        return self.sums(batch.x.new_zeros(len(rows), WIDTH), rows, nodes)


def numbers(count: int, width: int = WIDTH, *, leaf: bool = False) -> Tensor:
    return torch.randn(count, width, dtype=torch.float64).requires_grad_(leaf)


def posts(counts: Counts) -> dict[str, Any]:
    images = numbers(sum(counts), leaf=True)
    return {"title": numbers(len(counts)), "counts": torch.tensor(counts), "images": images}


def as_array(images: Tensor) -> Any:
    return images.detach().numpy()


def as_list(images: Tensor) -> list[Tensor]:
    return [image.detach().requires_grad_() for image in images]


def mapping(counts: Counts, pack: Callable[[Tensor], Any] = lambda x: x) -> Kind:
    whole = {**posts(counts), "scale": 2.0}
    whole["images"] = pack(whole["images"])
    return Kind(Ragged(whole, {"images": counts}), whole)


def pair(counts: Counts) -> Kind:
    whole = tuple(posts(counts).values())
    return Kind(Ragged(whole, {2: torch.tensor(counts)}), whole)


def nested(counts: Counts) -> Kind:
    given = posts(counts)
    vision = Vision(given["counts"], given["images"])
    inputs = {"title": given["title"], "vision": Ragged(vision, {"images": counts})}
    return Kind(inputs, {"title": given["title"], "vision": vision})


def patches(counts: Counts) -> Kind:
    """An image of `n` tokens for each count above 0, two of them for 2 or more."""
    grids = [
        (1, 2, 2 * n) for count in counts for n in ([1, count - 1] if count > 1 else [count]) if n
    ]
    longest = WIDTH + max(counts)
    ids = torch.randint(1, 100, (len(counts), longest))
    for row, count in enumerate(counts):
        ids[row, WIDTH : WIDTH + count] = IMAGE
    whole: dict[str, Any] = {"input_ids": ids}
    if grids:
        grid = torch.tensor(grids)
        pixels = numbers(int(grid.prod(1).sum()), PATCH, leaf=True)
        whole |= {"pixel_values": pixels, "image_grid_thw": grid}
    return Kind(whole, whole, PackedPatches(image_token_id=IMAGE))


def tokens(counts: Counts, *, flat: bool = True) -> Kind:
    x = numbers(sum(counts), leaf=True)
    bounds = torch.tensor([0, *counts]).cumsum(0).int()
    whole = {"x": x if flat else x[None].detach().requires_grad_(), "cu_seqlens": bounds}
    positions = torch.cat([torch.arange(count) for count in counts])
    whole["position_ids"] = positions if flat else positions[None]
    return Kind(whole, whole, PackedTokens())


def jagged(counts: Counts) -> Kind:
    whole = torch.nested.nested_tensor(list(map(numbers, counts)), layout=torch.jagged)
    return Kind(whole, whole)


def graphs(counts: Counts) -> Kind:
    pyg = graph_library()
    one = [
        pyg.data.Data(x=numbers(nodes), edge_index=torch.randint(nodes, (2, 2 * nodes)))
        for nodes in counts
    ]
    batch = pyg.data.Batch.from_data_list(one)
    batch.x.requires_grad_()
    return Kind(batch, batch)


KINDS: dict[str, tuple[Callable[[Counts], Kind], type[nn.Module], int]] = {
    "mapping": (mapping, Posts, 0),
    "list of entries": (lambda counts: mapping(counts, as_list), Posts, 0),
    "array of entries": (lambda counts: mapping(counts, as_array), Posts, 0),
    "tuple": (pair, Posts, 0),
    "dataclass in a mapping": (nested, NestedPosts, 0),
    "patches": (patches, Patches, 0),
    "tokens": (tokens, Tokens, 0),
    "one row of tokens": (lambda counts: tokens(counts, flat=False), Tokens, 0),
    "jagged": (jagged, Jagged, 0),
    "graphs": (graphs, Graph, 1),
}
"""By name: from counts to an input, its encoder, and the fewest entries that a row may have."""
