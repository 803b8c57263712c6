"""Late interaction in plain PyTorch, on any device: tiles from matrix products.

P image tokens, R text tokens, D feature width; I pieces of images and J of texts of a tile.

The gradient of a tile has one entry for each maximum: a list of (image token, text token, weight)
is sorted, and each token sums its partners in that order, 4 I J (P + R) D flops. Two dense products
with a matrix of mostly zeros would take 4 I J P R D; at P = 49, R = 32, D = 256 the backward then
took twice as long.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from gradcache_clip.ops.late_interaction_tiles import Maxima
from gradcache_clip.ops.tiles import times_on
from gradcache_clip.ops.token_pieces import Pieces, Run

if TYPE_CHECKING:
    from jaxtyping import Float, Int

# Tokens along the image side of a CPU's tile, and all its similarities: 4 MB in fp32.
_SIDE, _ELEMENTS = 1024, 2**20
# The longest and the shortest piece of packed tokens.
_PIECES = 16, 1


class TorchPanels:
    """Tiles from matrix products, in buffers that stay in a CPU's cache."""

    gradient_scale, ignores_nan = 1.0, False

    def __init__(self, images: Pieces, texts: Pieces, *, one_way: bool) -> None:
        self.images, self.texts, self.one_way = images, texts, one_way
        P, R = images.weight.shape[1], texts.weight.shape[1]
        rows, columns = times_on(images.given.device)
        stripe, elements = max(1, rows * _SIDE // P), rows * columns * _ELEMENTS
        self.shape = stripe, max(1, elements // (max(stripe, images.most) * P * R))
        self._buffers: dict[str, Tensor] = {}
        self._stripe: tuple[slice, Tensor] | None = None

    @staticmethod
    def piece_limits(tokens: Tensor) -> tuple[tuple[int, int], tuple[int, int]]:
        return _PIECES, _PIECES

    def texts_at_once(self, images: int, texts: int) -> int:
        return 1

    def maxima(
        self, stripe: slice, panel: slice, *, with_index: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor | None]:
        P, R = self.images.weight.shape[1], self.texts.weight.shape[1]
        rows, columns = self._stripe_rows(stripe), self._rows(self.texts, panel)
        shape = len(rows), len(columns)
        tile = torch.mm(rows, columns.T, out=self._buffer("similarity", *shape))
        scratch = self._buffer("scratch", *shape) if with_index else None
        best_image, image_token = _best(tile, scratch, P, R)
        if self.one_way:
            return None, None, best_image, image_token
        turned = None if scratch is None else scratch.T
        found = _best(tile.T, turned, R, P)
        best_text, text_token = (None if x is None else x.permute(1, 2, 0) for x in found)
        return best_text, text_token, best_image, image_token

    def add_gradients(
        self,
        runs: tuple[Run, Run],
        maxima: Maxima,
        dscores: tuple[Tensor | None, Tensor],
        dtokens: tuple[Tensor | None, Tensor | None],
    ) -> None:
        image, text, weight = self._entries(runs, maxima, dscores)
        dimages, dtexts = dtokens
        if dimages is not None:
            _add_sums(dimages, image, text, weight, self._rows(self.texts, runs[1].pieces))
        if dtexts is not None:
            _add_sums(dtexts, text, image, weight, self._stripe_rows(runs[0].pieces))

    def _entries(
        self,
        runs: tuple[Run, Run],
        maxima: Maxima,
        dscores: tuple[Tensor | None, Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return (image token, text token, weight) of each maximum, numbered within the tile."""
        (images, texts), (row, column), won = runs, dscores, maxima.best_image_token
        assert won is not None
        (image, image_weight), (text, text_weight) = (
            _numbered(side.weight[run.pieces], won.dtype)
            for side, run in zip((self.images, self.texts), runs, strict=True)
        )
        won = images.in_run(won, 0, image.shape[1])
        weight = texts.spread(column, 1)[:, :, None] * text_weight
        found = [(won, text.expand_as(won), weight)]
        if row is not None and (won := maxima.best_text_token) is not None:
            won = texts.in_run(won, 2, text.shape[1])
            weight = images.spread(row, 0)[:, None] * image_weight[:, :, None]
            found.append((image[:, :, None].expand_as(won), won, weight))
        flat = [[each.flatten() for each in entry] for entry in found]
        image, text, weight = (torch.cat(each) for each in zip(*flat, strict=True))
        return image, text, weight

    def _stripe_rows(self, pieces: slice) -> Tensor:
        """Return the image tokens, kept for the other panels of a stripe."""
        if self._stripe is None or self._stripe[0] != pieces:
            self._stripe = pieces, self._rows(self.images, pieces)
        return self._stripe[1]

    def _rows(self, side: Pieces, pieces: slice) -> Tensor:
        """Return their tokens in the dtype of the similarities."""
        return side.values(pieces).flatten(0, 1).to(side.weight.dtype)

    def _buffer(self, name: str, rows: int, columns: int) -> Tensor:
        if name not in self._buffers or self._buffers[name].numel() < rows * columns:
            self._buffers[name] = self.images.weight.new_empty(rows * columns)
        return self._buffers[name][: rows * columns].view(rows, columns)


def _best(
    tile: Float[Tensor, "t o"], scratch: Tensor | None, length: int, other: int
) -> tuple[Float[Tensor, "n o l"], Int[Tensor, "n o l"] | None]:
    """Return the maxima over the tokens of each piece and, with scratch, the tokens that won."""
    block, token = tile.unflatten(0, (-1, length)), None
    best = block.amax(1)
    if scratch is not None:
        token = _winners(block, best, scratch.unflatten(0, (-1, length))).unflatten(1, (-1, other))
    return best.unflatten(1, (-1, other)), token


def _numbered(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    number = torch.arange(weight.numel(), dtype=dtype, device=weight.device)
    return number.view_as(weight), weight


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
    out = out.view(-1, out.shape[-1])
    to, order = to.sort(stable=True)
    first = torch.arange(len(out), dtype=to.dtype, device=to.device)
    offsets = torch.searchsorted(to, first, out_int32=True)
    source, weight = source[order], weight[order]
    out += embedding_bag(source, tokens, offsets, per_sample_weights=weight, mode="sum")
