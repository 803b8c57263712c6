"""The one main loop: a BLOCK_M x BLOCK_N tile of S, for every epilogue.

Pointers load the features, or TMA descriptors where the table of launches says so.
q and k are contiguous (rows x D), D a multiple of BLOCK_D: launchers append zeros with `padded`,
because masks along D and rows of unknown alignment cost a third more registers. The address of a
tile is 64 bits wide, offsets within it 32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradcache_clip.kernels.launch_config import LaunchConfig, TensorDescriptor

LOG2_E = tl.constexpr(1.4426950408889634)


def padded(features: Tensor, BLOCK_D: int) -> Tensor:
    """Contiguous features from an address of 16 bytes, zeros appended to a multiple of BLOCK_D.

    Features that are so already are returned as they are.
    """
    missing = -features.shape[1] % BLOCK_D
    if missing:
        return torch.nn.functional.pad(features, (0, missing))
    features = features.contiguous()
    return features.clone() if features.data_ptr() % 16 else features


def operands(
    q: Tensor, k: Tensor, config: LaunchConfig
) -> "tuple[Tensor, Tensor] | tuple[TensorDescriptor, TensorDescriptor]":
    """Rows and columns as a kernel of this configuration takes them; `padded` before."""
    if not config.descriptors:
        return q, k
    rows = TensorDescriptor.from_tensor(q, [config.BLOCK_M, config.BLOCK_D])
    return rows, TensorDescriptor.from_tensor(k, [config.BLOCK_N, config.BLOCK_D])


@triton.jit
def whole(size):
    """A multiple of 8, unchanged: the compiler believes arithmetic, not hints on arguments."""
    return size // 8 * 8


@triton.jit
def store_tile(gradient_ptr, gradient_stride, tile, tile_m, tile_n):
    """Write a tile of G into a workspace of whole tiles; unmasked, 16 bytes at a time."""
    BLOCK_M: tl.constexpr = tile.shape[0]
    BLOCK_N: tl.constexpr = tile.shape[1]
    stride = whole(gradient_stride)
    corner_ptr = gradient_ptr + (tile_m * BLOCK_M).to(tl.int64) * stride + tile_n * BLOCK_N
    offset = tl.arange(0, BLOCK_M)[:, None] * stride + tl.arange(0, BLOCK_N)[None, :]
    tl.store(corner_ptr + offset, tile.to(gradient_ptr.dtype.element_ty))


@triton.jit
def tile_position(
    index, rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr
):
    """Tile row and column of a number; GROUP_M tile rows in turn share their columns in the L2."""
    tiles_m = tl.cdiv(rows, BLOCK_M)
    programs_in_group = GROUP_M * tl.cdiv(columns, BLOCK_N)
    first_m = (index // programs_in_group) * GROUP_M
    group_m = tl.minimum(tiles_m - first_m, GROUP_M)
    within = index % programs_in_group
    return first_m + within % group_m, within // group_m


@triton.jit
def tile_pointers(
    q_ptr,
    k_ptr,
    first_row,
    first_column,
    M,
    N,
    D,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """First features of rows and of columns; rows from M, columns from N on repeat the last."""
    row = tl.minimum(tl.arange(0, BLOCK_M), M - 1 - first_row)
    column = tl.minimum(tl.arange(0, BLOCK_N), N - 1 - first_column)
    depth = tl.arange(0, BLOCK_D)
    q_ptrs = q_ptr + first_row.to(tl.int64) * D + (row[:, None] * D + depth[None, :])
    k_ptrs = k_ptr + first_column.to(tl.int64) * D + (column[None, :] * D + depth[:, None])
    return q_ptrs, k_ptrs


@triton.jit
def products(
    q_ptrs,
    k_ptrs,
    D,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The main loop: <q_i, k_j> of all D features."""
    tile = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for _ in range(0, D, BLOCK_D):
        tile = tl.dot(tl.load(q_ptrs), tl.load(k_ptrs), tile, input_precision=PRECISION)
        q_ptrs += BLOCK_D
        k_ptrs += BLOCK_D
    return tile


@triton.jit
def similarity_tile(
    q_ptr,
    k_ptr,
    logit_scale_ptr,
    first_row,
    first_column,
    M,
    N,
    D,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """S in units of log 2 (exp2 gives exp(S))."""
    q_ptrs, k_ptrs = tile_pointers(
        q_ptr, k_ptr, first_row, first_column, M, N, D, BLOCK_M, BLOCK_N, BLOCK_D
    )
    tile = products(q_ptrs, k_ptrs, D, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION)
    return tile * (tl.load(logit_scale_ptr) * LOG2_E)


@triton.jit
def similarity_parts(
    q,
    k,
    logit_scale_ptr,
    first_row,
    first_column,
    D,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    PARTS: tl.constexpr,
):
    """`similarity_tile` through descriptors, its columns in PARTS; 0 beyond the features."""
    tile = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for depth in range(0, D, BLOCK_D):
        rows, columns = q.load([first_row, depth]), k.load([first_column, depth])
        tile = tl.dot(rows, columns.T, tile, input_precision=PRECISION)
    tile *= tl.load(logit_scale_ptr) * LOG2_E
    left, right = _halves(tile)
    if PARTS == 8:
        return _quarters(left) + _quarters(right)
    elif PARTS == 4:
        return _halves(left) + _halves(right)
    else:
        tl.static_assert(PARTS == 2)
        return left, right


@triton.jit
def _quarters(tile):
    left, right = _halves(tile)
    return _halves(left) + _halves(right)


@triton.jit
def _halves(tile):
    pair = tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2))
    left, right = tl.split(tl.permute(pair, (0, 2, 1)))
    return left, right
