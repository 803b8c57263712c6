"""Late interaction in plain PyTorch, on any device: tiles from matrix products.

P image tokens, R text tokens, D feature width; I images and J texts of a tile. Samples may have any
number of tokens, which lie one after the other: no tile holds padding.

The gradient of a tile has one entry for each maximum: a list of (image token, text token, weight)
is sorted, and each token sums its partners in that order, 4 I J (P + R) D flops. Two dense products
with a matrix of mostly zeros would take 4 I J P R D; at P = 49, R = 32, D = 256 the backward then
took twice as long.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from gradcache_clip.ops.late_interaction_passes import Maxima
from gradcache_clip.ops.token_sides import PackedSide

if TYPE_CHECKING:
    from jaxtyping import Float, Int

# Tokens along the image side of a tile, and all its similarities: 4 MB in fp32.
_SIDE, _ELEMENTS = 1024, 2**20


class TorchTiles:
    """Tiles from matrix products, in buffers that stay in the cache."""

    gradient_scale = 1.0

    def __init__(self, images: PackedSide, texts: PackedSide, *, one_way: bool) -> None:
        self.images, self.texts, self.one_way = images, texts, one_way
        own = (images.at(stripe) for stripe in self.stripes())
        self._columns = _ELEMENTS // max(tokens.stop - tokens.start for tokens in own)
        self._buffers: dict[str, Tensor] = {}

    def stripes(self) -> Iterator[slice]:
        return self.images.cut(slice(0, self.images.samples), _SIDE)

    def panels(self) -> Iterator[slice]:
        return self.texts.cut(slice(0, self.texts.samples), self._columns)

    def pairs(self) -> Iterator[tuple[slice, slice]]:
        """Yield each text and, as many as fit a tile, the images that are its own."""
        each = self.images.samples // self.texts.samples
        for text in range(self.texts.samples):
            for own in self.images.cut(slice(text * each, (text + 1) * each), _SIDE):
                yield own, slice(text, text + 1)

    def maxima(self, stripe: slice, panel: slice, *, winners: bool) -> Maxima:
        rows, columns = self.images.rows(stripe), self.texts.rows(panel)
        shape = len(rows), len(columns)
        tile = torch.mm(rows, columns.T, out=self._buffer("similarity", *shape))
        scratch = self._buffer("scratch", *shape) if winners else None
        best_image, image_token = _best(tile, scratch, self.images, stripe)
        text_to_image = self.texts.total(best_image, panel)
        if self.one_way:
            return Maxima(None, text_to_image, None, image_token)
        turned = None if scratch is None else scratch.T
        best_text, text_token = _best(tile.T, turned, self.texts, panel)
        image_to_text = self.images.total(best_text, stripe).T
        return Maxima(image_to_text, text_to_image, text_token, image_token)

    def add_gradients(
        self,
        pair: tuple[slice, slice],
        maxima: Maxima,
        dscores: tuple[Tensor | None, Tensor],
        dtokens: tuple[Tensor | None, Tensor | None],
    ) -> None:
        image, text, weight = self._entries(pair, maxima, dscores)
        dimages, dtexts = dtokens
        if dimages is not None:
            _add_sums(dimages, image, text, weight, self.texts.rows(pair[1]))
        if dtexts is not None:
            _add_sums(dtexts, text, image, weight, self.images.rows(pair[0]))

    def _entries(
        self,
        pair: tuple[slice, slice],
        maxima: Maxima,
        dscores: tuple[Tensor | None, Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return (image token, text token, weight) of each maximum, numbered within the tile."""
        (stripe, panel), (row, column), won = pair, dscores, maxima.best_image_token
        assert won is not None
        image, text = (
            torch.arange(where.stop - where.start, dtype=won.dtype, device=won.device)
            for where in (self.images.at(stripe), self.texts.at(panel))
        )
        found = [(won, text.expand_as(won), self.texts.spread(column, panel))]
        if row is not None and (won := maxima.best_text_token) is not None:
            found.append((image.expand_as(won), won, self.images.spread(row.T, stripe)))
        flat = [[each.flatten() for each in entry] for entry in found]
        image, text, weight = (torch.cat(each) for each in zip(*flat, strict=True))
        return image, text, weight

    def _buffer(self, name: str, rows: int, columns: int) -> Tensor:
        if name not in self._buffers or self._buffers[name].numel() < rows * columns:
            self._buffers[name] = self.images.weight.new_empty(rows * columns)
        return self._buffers[name][: rows * columns].view(rows, columns)


def _best(
    tile: Float[Tensor, "t o"], scratch: Tensor | None, side: PackedSide, samples: slice
) -> tuple[Float[Tensor, "s o"], Int[Tensor, "s o"] | None]:
    """Return the maxima over the tokens of each sample and, with scratch, the rows that won."""
    shape = samples.stop - samples.start, tile.shape[1]
    best, token = tile.new_empty(shape), None
    if scratch is not None:
        token = tile.new_empty(shape, dtype=torch.int32)
    for own, rows in side.blocks(samples):
        many = own.stop - own.start
        block = tile[rows].unflatten(0, (many, -1))
        torch.amax(block, 1, out=best[own])
        if scratch is not None and token is not None:
            winner = _winners(block, best[own], scratch[rows].unflatten(0, (many, -1)))
            first = torch.arange(many, dtype=token.dtype, device=token.device)[:, None]
            token[own] = winner + (first * block.shape[1] + rows.start)
    return best, token


def _winners(block: Tensor, best: Tensor, scratch: Tensor) -> Tensor:
    """Return the first index of each maximum, several times as fast as torch.max does."""
    size = block.shape[1]
    index = torch.arange(size, dtype=block.dtype, device=block.device)[:, None]
    # index + size where an entry is below its maximum; the least is the first winner.
    torch.ne(block, best.unsqueeze(1), out=scratch)
    torch.add(index, scratch, alpha=size, out=scratch)
    # NaN equals nothing: any token may win, the gradient is NaN all the same.
    return scratch.amin(1).to(torch.int32).clamp_max_(size - 1)


def _add_sums(out: Tensor, to: Tensor, source: Tensor, weight: Tensor, tokens: Tensor) -> None:
    """out[to] += weight * tokens[source], in the order of entries: deterministic."""
    to, order = to.sort(stable=True)
    first = torch.arange(len(out), dtype=to.dtype, device=to.device)
    offsets = torch.searchsorted(to, first, out_int32=True)
    source, weight = source[order], weight[order]
    out += embedding_bag(source, tokens, offsets, per_sample_weights=weight, mode="sum")
