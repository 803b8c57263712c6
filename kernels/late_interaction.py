"""Late interaction: token similarities reduced to maxima, and their gradient panel by panel.

I images of P tokens against J texts of R tokens, D feature width. The tokens of a sample are cut
into pieces of BLOCK_P or BLOCK_R, the last one filled by repeats of the last token, so that every
piece lies within one tile. A maximum is taken over a piece in registers, and over the pieces of a
sample, often one, afterwards.
"""

from __future__ import annotations

from math import isqrt

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradcache_clip.kernels.competition import RAGGED
from gradcache_clip.kernels.cuts import up_to_whole
from gradcache_clip.kernels.launch_config import (
    FLOAT16_GRADIENT_SCALE,
    LaunchConfig,
    launch_options,
    token_config,
)
from gradcache_clip.kernels.panels import add_product
from gradcache_clip.kernels.pieces import SHORTEST, piece_length
from gradcache_clip.kernels.similarity import padded, products, store_tile, tile_position

# A gradient tile is written without products: any small shape whose rows are whole lines does.
_WRITE_M, _WRITE_N = 16, 128


@triton.jit(do_not_specialize=RAGGED)
def _token_maxima_kernel(
    x_ptr,
    y_ptr,
    row_max_ptr,
    row_index_ptr,
    column_max_ptr,
    column_index_ptr,
    images,
    texts,
    P,
    R,
    D,
    BOTH_WAYS: tl.constexpr,
    WITH_INDEX: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile: maxima of its rows over pieces of texts (I P x pieces), and of its columns."""
    PIECES_M: tl.constexpr = BLOCK_M // BLOCK_P
    PIECES_N: tl.constexpr = BLOCK_N // BLOCK_R
    pieces_p, pieces_r = tl.cdiv(P, BLOCK_P), tl.cdiv(R, BLOCK_R)
    tile_m, tile_n = tile_position(
        tl.program_id(0),
        images * pieces_p * BLOCK_P,
        texts * pieces_r * BLOCK_R,
        BLOCK_M,
        BLOCK_N,
        GROUP_M,
    )
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row_piece, column_piece = row // BLOCK_P, column // BLOCK_R
    p = (row_piece % pieces_p) * BLOCK_P + row % BLOCK_P
    r = (column_piece % pieces_r) * BLOCK_R + column % BLOCK_R
    # Repeats of the last token or sample change no maximum, and need no mask in the main loop.
    x_row = tl.minimum(row_piece // pieces_p, images - 1) * P + tl.minimum(p, P - 1)
    y_row = tl.minimum(column_piece // pieces_r, texts - 1) * R + tl.minimum(r, R - 1)
    depth = tl.arange(0, BLOCK_D)
    x_ptrs = x_ptr + x_row.to(tl.int64)[:, None] * D + depth[None, :]
    y_ptrs = y_ptr + y_row.to(tl.int64)[None, :] * D + depth[:, None]
    tile = products(x_ptrs, y_ptrs, D, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION)
    tile = tl.reshape(tile, (PIECES_M, BLOCK_P, PIECES_N, BLOCK_R))
    row_inside = (p < P) & (row_piece < images * pieces_p)
    column_inside = (r < R) & (column_piece < texts * pieces_r)

    if BOTH_WAYS:
        piece = tile_n * PIECES_N + tl.arange(0, PIECES_N)
        offset = x_row.to(tl.int64)[:, None] * (texts * pieces_r) + piece[None, :]
        inside = row_inside[:, None] & (piece < texts * pieces_r)[None, :]
        if WITH_INDEX:
            best, index = tl.max(tile, 3, return_indices=True)
            index = tl.reshape(index, (BLOCK_M, PIECES_N))
            index = tl.minimum(index + ((piece % pieces_r) * BLOCK_R)[None, :], R - 1)
            tl.store(row_index_ptr + offset, index, mask=inside)
        else:
            best = tl.max(tile, 3)
        tl.store(row_max_ptr + offset, tl.reshape(best, (BLOCK_M, PIECES_N)), mask=inside)
    piece = tile_m * PIECES_M + tl.arange(0, PIECES_M)
    offset = piece.to(tl.int64)[:, None] * (texts * R) + y_row[None, :]
    inside = (piece < images * pieces_p)[:, None] & column_inside[None, :]
    if WITH_INDEX:
        best, index = tl.max(tile, 1, return_indices=True)
        index = tl.reshape(index, (PIECES_M, BLOCK_N))
        index = tl.minimum(index + ((piece % pieces_p) * BLOCK_P)[:, None], P - 1)
        tl.store(column_index_ptr + offset, index, mask=inside)
    else:
        best = tl.max(tile, 1)
    tl.store(column_max_ptr + offset, tl.reshape(best, (PIECES_M, BLOCK_N)), mask=inside)


@triton.jit(do_not_specialize=RAGGED)
def _token_gradient_kernel(
    row_index_ptr,
    column_index_ptr,
    row_gradient_ptr,
    column_gradient_ptr,
    row_weight_ptr,
    column_weight_ptr,
    gradient_ptr,
    gradient_stride,
    images,
    texts,
    P,
    R,
    BOTH_WAYS: tl.constexpr,
    GRADIENT_SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """GRADIENT_SCALE times the gradient of each similarity: 0 but for the winners of a maximum."""
    tiles_n = tl.cdiv(texts * R, BLOCK_N)
    tile_m, tile_n = tl.program_id(0) // tiles_n, tl.program_id(0) % tiles_n
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row_clamped = tl.minimum(row, images * P - 1)
    column_clamped = tl.minimum(column, texts * R - 1)
    image, text = row_clamped // P, column_clamped // R
    pair = image.to(tl.int64)[:, None] * texts + text[None, :]

    token = image.to(tl.int64)[:, None] * (texts * R) + column_clamped[None, :]
    winner = tl.load(column_index_ptr + token)
    weight = tl.load(column_weight_ptr + column_clamped)[None, :]
    won = winner == (row_clamped % P)[:, None]
    gradient = tl.where(won, tl.load(column_gradient_ptr + pair) * weight, 0.0)
    if BOTH_WAYS:
        token = row_clamped.to(tl.int64)[:, None] * texts + text[None, :]
        weight = tl.load(row_weight_ptr + row_clamped)[:, None]
        won = tl.load(row_index_ptr + token) == (column_clamped % R)[None, :]
        gradient += tl.where(won, tl.load(row_gradient_ptr + pair) * weight, 0.0)
    store_tile(gradient_ptr, gradient_stride, gradient * GRADIENT_SCALE, tile_m, tile_n)


class TokenPanels:
    """All pairs of images and texts in panels that fit the workspace, launched one at a time.

    Args:
        x: (images, P, D) contiguous image tokens, fp32, fp16 or bf16.
        y: (texts, R, D) like x.
        both_ways: whether image tokens look for text tokens too.
        samples: how many texts have scores; fewer where y holds pieces of them.
    """

    def __init__(self, x: Tensor, y: Tensor, *, both_ways: bool, samples: int) -> None:
        self.config = config = token_config(x, both_ways=both_ways)
        self.both_ways = both_ways
        self.x, self.y = (padded(side.flatten(0, 1), config.BLOCK_D) for side in (x, y))
        (self.images, self.P, _), (self.texts, self.R, _) = x.shape, y.shape
        self.block_p = piece_length([self.P], config.BLOCK_M)
        self.block_r = piece_length([self.R], config.BLOCK_N)
        self.gradient_scale = FLOAT16_GRADIENT_SCALE if x.dtype == torch.float16 else 1.0
        B = max(len(x), len(y))
        self.shape = panel_shape(config, B, samples, self.P, self.R, x.element_size())

    def maxima(
        self, stripe: slice, panel: slice, *, with_index: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor | None]:
        """Maxima over text tokens (I, P, J) and over image tokens (I, J, R), fp32.

        Returns:
            best text similarity and its token (None unless both ways), best image similarity and
            its token; tokens are int32, and None without `with_index`. Of equal ones the first.
        """
        I, J = stripe.stop - stripe.start, panel.stop - panel.start
        pieces_p, pieces_r = self._pieces()
        row_shape = (I, self.P, J, pieces_r) if self.both_ways else (0,)
        column_shape = (I, pieces_p, J, self.R)
        best = [self.x.new_empty(s, dtype=torch.float32) for s in (row_shape, column_shape)]
        index = [
            self.x.new_empty(s if with_index else (0,), dtype=torch.int32)
            for s in (row_shape, column_shape)
        ]
        self._launch_maxima(stripe, panel, best, index)
        best_image, image_token = _over_pieces(best[1], index[1], 1)
        if not self.both_ways:
            return None, None, best_image, image_token
        return (*_over_pieces(best[0], index[0], 3), best_image, image_token)

    def _pieces(self) -> tuple[int, int]:
        return triton.cdiv(self.P, self.block_p), triton.cdiv(self.R, self.block_r)

    def _launch_maxima(
        self, stripe: slice, panel: slice, best: list[Tensor], index: list[Tensor]
    ) -> None:
        I, J = stripe.stop - stripe.start, panel.stop - panel.start
        pieces_p, pieces_r = self._pieces()
        with_index, config = index[1].numel() > 0, self.config
        tiles_m = triton.cdiv(I * pieces_p * self.block_p, config.BLOCK_M)
        tiles_n = triton.cdiv(J * pieces_r * self.block_r, config.BLOCK_N)
        with torch.cuda.device_of(self.x):
            _token_maxima_kernel[(tiles_m * tiles_n,)](
                self.x[stripe.start * self.P :],
                self.y[panel.start * self.R :],
                best[0],
                index[0],
                best[1],
                index[1],
                I,
                J,
                self.P,
                self.R,
                self.x.shape[1],
                BOTH_WAYS=self.both_ways,
                WITH_INDEX=with_index,
                BLOCK_P=self.block_p,
                BLOCK_R=self.block_r,
                **launch_options(config),
            )

    def dsimilarity(
        self,
        winners: tuple[Tensor | None, Tensor | None],
        dscores: tuple[Tensor | None, Tensor],
        weights: tuple[Tensor, Tensor],
    ) -> Tensor:
        """gradient_scale times the gradient of the token similarities of a panel, I P x J R.

        Args:
            winners: tokens that `maxima` returned, (I, P, J) and (I, J, R).
            dscores: (I, J) fp32 gradients of the scores, from image to text and back.
            weights: (I, P) and (J, R) fp32, of each token in the scores.
        """
        (I, P), (J, R) = weights[0].shape, weights[1].shape
        height, width = up_to_whole(I * P, _WRITE_M), up_to_whole(J * R, _WRITE_N)
        gradient = self.x.new_empty((height, width))
        grid = (height // _WRITE_M * (width // _WRITE_N),)
        # Unused one way, but a pointer all the same.
        row_index, row_gradient = winners[0], dscores[0]
        with torch.cuda.device_of(self.x):
            _token_gradient_kernel[grid](
                winners[1] if row_index is None else row_index,
                winners[1],
                dscores[1] if row_gradient is None else row_gradient,
                dscores[1],
                weights[0],
                weights[1],
                gradient,
                width,
                I,
                J,
                P,
                R,
                BOTH_WAYS=self.both_ways,
                GRADIENT_SCALE=self.gradient_scale,
                BLOCK_M=_WRITE_M,
                BLOCK_N=_WRITE_N,
                enable_fp_fusion=True,
            )
        return gradient[: I * P, : J * R]

    def add_product(self, out: Tensor, dsimilarity: Tensor, tokens: Tensor) -> None:
        """out += dsimilarity tokens, in fp32; (samples, tokens, D) both."""
        add_product(out.view(-1, out.shape[-1]), dsimilarity, tokens.flatten(0, 1))


def piece_limits(tokens: Tensor) -> tuple[tuple[int, int], tuple[int, int]]:
    """The longest and the shortest piece of packed tokens, of images and of texts."""
    config = token_config(tokens, both_ways=True)
    return (config.BLOCK_M, SHORTEST), (config.BLOCK_N, SHORTEST)


def panel_shape(
    config: LaunchConfig, B: int, scored: int, P: int, R: int, itemsize: int
) -> tuple[int, int]:
    """Images and texts of a panel, of B in all.

    A panel of gradients takes P R numbers for each pair, maxima with their indices and temporaries
    about 32 (P + R) bytes; the forward keeps six numbers for each image of a stripe and each text
    that is scored. Each fits the workspace.
    """
    pairs = config.workspace_bytes // max(itemsize * P * R, 32 * (P + R))
    images = max(1, min(B, isqrt(pairs), config.workspace_bytes // (24 * scored)))
    return images, max(1, min(B, pairs // images))


def _over_pieces(best: Tensor, index: Tensor, dim: int) -> tuple[Tensor, Tensor | None]:
    """Maximum over the pieces of a sample, and the token that won."""
    if best.shape[dim] == 1:
        return best.squeeze(dim), index.squeeze(dim) if index.numel() else None
    value, piece = best.max(dim)
    if not index.numel():
        return value, None
    return value, index.gather(dim, piece.unsqueeze(dim)).squeeze(dim)
