"""Backward of the CLIP loss: G = 2B dloss/dS panel by panel, and the two products with it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradcache_clip.kernels.launch_config import (
    FLOAT16_GRADIENT_SCALE,
    LaunchConfig,
    launch_config,
    launch_options,
    panel_shape,
    tile_grid,
)
from gradcache_clip.kernels.similarity import padded, similarity_tile, tile_position

# Rows of G start at multiples of 16 bytes, which the vendor's fast products require.
_ALIGNED_COLUMNS = 8


@triton.jit
def _clip_gradient_kernel(
    q_ptr,
    k_ptr,
    logit_scale_ptr,
    shift_ptr,
    row_lse_ptr,
    column_lse_ptr,
    positive_gradient_ptr,
    gradient_ptr,
    gradient_stride,
    first_row,
    first_column,
    rows,
    columns,
    N,
    D,
    GRADIENT_SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of GRADIENT_SCALE (P_row + P_column - 2 I), with log-sum-exps in units of log 2."""
    tile_m, tile_n = tile_position(rows, columns, BLOCK_M, BLOCK_N, GROUP_M)
    row_start = first_row + tile_m * BLOCK_M
    column_start = first_column + tile_n * BLOCK_N
    tile = similarity_tile(
        q_ptr,
        k_ptr,
        logit_scale_ptr,
        row_start,
        column_start,
        N,
        D,
        BLOCK_M,
        BLOCK_N,
        BLOCK_D,
        PRECISION,
    )
    row = row_start + tl.arange(0, BLOCK_M)
    column = column_start + tl.arange(0, BLOCK_N)
    # Clamped indices need fewer registers than masked loads, and the store masks the repeats.
    row_clamped, column_clamped = tl.minimum(row, N - 1), tl.minimum(column, N - 1)
    row_lse = tl.load(row_lse_ptr + row_clamped)
    column_lse = tl.load(column_lse_ptr + column_clamped)
    positive_gradient = tl.load(positive_gradient_ptr + row_clamped)
    tile -= tl.load(shift_ptr)
    gradient = tl.exp2(tile - row_lse[:, None]) + tl.exp2(tile - column_lse[None, :])
    gradient = tl.where(row[:, None] == column[None, :], positive_gradient[:, None], gradient)

    corner_ptr = gradient_ptr + (tile_m * BLOCK_M).to(tl.int64) * gradient_stride + tile_n * BLOCK_N
    offset = tl.arange(0, BLOCK_M)[:, None] * gradient_stride + tl.arange(0, BLOCK_N)[None, :]
    inside = (row[:, None] < first_row + rows) & (column[None, :] < first_column + columns)
    value = (gradient * GRADIENT_SCALE).to(gradient_ptr.dtype.element_ty)
    tl.store(corner_ptr + offset, value, mask=inside)


def clip_gradient(
    q: Tensor,
    k: Tensor,
    logit_scale: Tensor,
    terms: tuple[Tensor, ...],
    factor: Tensor,
    needs: tuple[bool, bool, bool],
    *,
    config: LaunchConfig | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Launch the backward: for each panel of G the tile kernel, then at most two vendor products.

    Args:
        q: (B, D) contiguous, fp32, fp16 or bf16.
        k: like q.
        logit_scale: 0-dim, fp32, on the same device.
        terms: shift (0-dim), row and column log-sum-exps less the shift, and G on the diagonal
            (B,), all fp32; the first three in units of log 2.
        factor: 0-dim fp32, the outer gradient over 2B.
        needs: which of q, k and logit_scale need a gradient.
        config: launch parameters; those of the table when None.

    Returns:
        dq, dk in the dtype of q, dlogit_scale in fp32; None where not needed.
    """
    needs_q, needs_k, needs_scale = needs
    panels = _Panels(q, k, logit_scale, terms, config or launch_config(q))
    # <q, G k> and <k, G^T q> are the same sum, so the scale needs only one of the two products.
    through_q = needs_q or not needs_k
    factor = factor / panels.gradient_scale
    dq = torch.empty_like(q) if needs_q else None
    dk = torch.zeros_like(k, dtype=torch.float32) if needs_k else None
    dlogit_scale = torch.zeros_like(logit_scale) if needs_scale else None
    for rows in panels.stripes():
        product = torch.zeros_like(q[rows], dtype=torch.float32) if through_q else None
        for columns in panels.columns_of_stripe():
            gradient = panels.gradient(rows, columns)
            if product is not None:
                product += _product(gradient, k[columns])
            if dk is not None:
                dk[columns] += _product(gradient.T, q[rows])
        if product is not None and dlogit_scale is not None:
            dlogit_scale += (q[rows] * product).sum()
        if product is not None and dq is not None:
            torch.mul(product, factor * logit_scale, out=dq[rows])
    if not through_q and dk is not None and dlogit_scale is not None:
        dlogit_scale += (k * dk).sum()
    if dk is not None:
        dk = dk.mul_(factor * logit_scale).to(k.dtype)
    return dq, dk, None if dlogit_scale is None else dlogit_scale * factor


class _Panels:
    """Cuts G into panels that fit the workspace, and computes one at a time into it."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        logit_scale: Tensor,
        terms: tuple[Tensor, ...],
        config: LaunchConfig,
    ) -> None:
        self.q, self.k = padded(q, config.BLOCK_D), padded(k, config.BLOCK_D)
        self.logit_scale, self.terms, self.config = logit_scale, terms, config
        self.gradient_scale = FLOAT16_GRADIENT_SCALE if q.dtype == torch.float16 else 1.0
        rows, columns = panel_shape(config, len(q), q.element_size())
        self.shape = min(rows, len(q)), min(columns, len(q))
        self.workspace = q.new_empty(self.shape[0] * _aligned(self.shape[1]))

    def stripes(self) -> Iterator[slice]:
        return _slices(len(self.q), self.shape[0])

    def columns_of_stripe(self) -> Iterator[slice]:
        return _slices(len(self.q), self.shape[1])

    def gradient(self, rows: slice, columns: slice) -> Tensor:
        """G of these rows and columns, times gradient_scale; overwritten by the next call."""
        height, width = rows.stop - rows.start, columns.stop - columns.start
        stride = _aligned(width)
        N, D = self.q.shape
        with torch.cuda.device_of(self.q):
            _clip_gradient_kernel[tile_grid(self.config, height, width)](
                self.q,
                self.k,
                self.logit_scale,
                *self.terms,
                self.workspace,
                stride,
                rows.start,
                columns.start,
                height,
                width,
                N,
                D,
                GRADIENT_SCALE=self.gradient_scale,
                **launch_options(self.config),
            )
        return self.workspace[: height * stride].view(height, stride)[:, :width]


def _aligned(columns: int) -> int:
    return triton.cdiv(columns, _ALIGNED_COLUMNS) * _ALIGNED_COLUMNS


def _slices(size: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, size)) for start in range(0, size, step))


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b in fp32, accumulated in fp32."""
    if a.dtype == torch.float32:
        return torch.mm(a, b)
    if _mm_returns_float32(a.device):
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())


@cache
def _mm_returns_float32(device: torch.device) -> bool:
    """Whether this torch multiplies 16-bit matrices into fp32 here (CUDA, torch 2.8 or later)."""
    probe = torch.ones(16, 16, dtype=torch.float16, device=device)
    try:
        torch.mm(probe, probe, out_dtype=torch.float32)
    except (TypeError, RuntimeError):
        return False
    return True
