"""Late interaction in plain PyTorch, on any device: tiles from matrix products.

P image tokens, R text tokens, D feature width; I images and J texts of a tile.

The gradient of a tile has one entry for each maximum: a list of (image token, text token, weight)
is sorted, and each token sums its partners in that order, 4 I J (P + R) D flops. Two dense products
with a matrix of mostly zeros would take 4 I J P R D; at P = 49, R = 32, D = 256 the backward then
took twice as long.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from gradcache_clip.ops.late_interaction_passes import Maxima, Tokens
from gradcache_clip.ops.tiles import slices

# Tokens along the image side of a tile, and all its similarities: 4 MB in fp32.
_SIDE, _ELEMENTS = 1024, 2**20


class TorchTiles:
    """Tiles from matrix products, in buffers that stay in the cache."""

    gradient_scale = 1.0

    def __init__(self, images: Tokens, texts: Tokens, *, one_way: bool) -> None:
        self.images, self.texts, self.one_way = images, texts, one_way
        (I, P), (J, R) = images.weight.shape, texts.weight.shape
        self._rows = min(I, max(1, _SIDE // P))
        self._columns = min(J, max(1, _ELEMENTS // (self._rows * P * R)))
        self._buffers: dict[str, Tensor] = {}

    def stripes(self) -> Iterator[slice]:
        return slices(0, len(self.images.weight), self._rows)

    def panels(self) -> Iterator[slice]:
        return slices(0, len(self.texts.weight), self._columns)

    def maxima(self, stripe: slice, panel: slice, *, winners: bool) -> Maxima:
        image_weight, text_weight = self.images.weight[stripe], self.texts.weight[panel]
        shape = *image_weight.shape, *text_weight.shape
        tile = self._buffer("similarity", shape)
        images, texts = self._rows_of(self.images, stripe), self._rows_of(self.texts, panel)
        torch.mm(images, texts.T, out=tile.view(len(images), len(texts)))
        best_image = tile.amax(1)
        text_to_image = (best_image * text_weight).sum(2)
        image_token = self._winners(tile, best_image, 1) if winners else None
        if self.one_way:
            return Maxima(None, text_to_image, None, image_token)
        best_text = tile.amax(3)
        image_to_text = (best_text * image_weight[:, :, None]).sum(1)
        text_token = self._winners(tile, best_text, 3) if winners else None
        return Maxima(image_to_text, text_to_image, text_token, image_token)

    def _winners(self, tile: Tensor, best: Tensor, dim: int) -> Tensor:
        """Return the first index of each maximum, several times as fast as torch.max does."""
        size = tile.shape[dim]
        index = torch.arange(size, dtype=tile.dtype, device=tile.device)
        index = index.view(size, *[1] * (3 - dim))
        # index + size where an entry is below its maximum; the least is the first winner.
        scratch = self._buffer("scratch", tile.shape)
        torch.ne(tile, best.unsqueeze(dim), out=scratch)
        torch.add(index, scratch, alpha=size, out=scratch)
        # NaN equals nothing: any token may win, the gradient is NaN all the same.
        return scratch.amin(dim).to(torch.int32).clamp_max_(size - 1)

    def add_gradients(
        self,
        pair: tuple[slice, slice],
        maxima: Maxima,
        dscores: tuple[Tensor | None, Tensor],
        dtokens: tuple[Tensor | None, Tensor | None],
    ) -> None:
        entries = self._entries(pair, maxima, dscores)
        dimages, dtexts = dtokens
        if dimages is not None:
            _add_sums(dimages, *entries, self._rows_of(self.texts, pair[1]))
        if dtexts is not None:
            text, image, weight = entries[1], entries[0], entries[2]
            _add_sums(dtexts, text, image, weight, self._rows_of(self.images, pair[0]))

    def _entries(
        self,
        pair: tuple[slice, slice],
        maxima: Maxima,
        dscores: tuple[Tensor | None, Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return (image token, text token, weight) of each maximum, numbered within the tile."""
        image_weight, text_weight = self.images.weight[pair[0]], self.texts.weight[pair[1]]
        (I, P), (J, R) = image_weight.shape, text_weight.shape
        image, text = (
            torch.arange(size, dtype=torch.int32, device=image_weight.device).view(shape)
            for size, shape in ((I * P, (I, P, 1)), (J * R, (1, J, R)))
        )
        row, column = dscores
        assert maxima.best_image_token is not None
        found = [(image[:, :1] + maxima.best_image_token, text, text_weight * column[:, :, None])]
        if row is not None and maxima.best_text_token is not None:
            best = text[:, :, 0] + maxima.best_text_token
            found.append((image, best, image_weight[:, :, None] * row[:, None]))
        flat = [[x.flatten() for x in torch.broadcast_tensors(*entry)] for entry in found]
        image, text, weight = (torch.cat(each) for each in zip(*flat, strict=True))
        return image, text, weight

    def _rows_of(self, side: Tokens, where: slice) -> Tensor:
        """Return the tokens of these samples, one per row, in the dtype of the similarities."""
        return side.values[where].flatten(0, 1).to(side.weight.dtype)

    def _buffer(self, name: str, shape: tuple[int, ...]) -> Tensor:
        I, P, J, R = shape
        if name not in self._buffers:
            size = self._rows * P * self._columns * R
            self._buffers[name] = self.images.weight.new_empty(size)
        return self._buffers[name][: I * P * J * R].view(shape)


def _add_sums(out: Tensor, to: Tensor, source: Tensor, weight: Tensor, tokens: Tensor) -> None:
    """out[to] += weight * tokens[source], in the order of entries: deterministic."""
    rows = out.flatten(0, 1)
    to, order = to.sort(stable=True)
    first = torch.arange(len(rows), dtype=to.dtype, device=to.device)
    offsets = torch.searchsorted(to, first, out_int32=True)
    source, weight = source[order], weight[order]
    rows += embedding_bag(source, tokens, offsets, per_sample_weights=weight, mode="sum")
