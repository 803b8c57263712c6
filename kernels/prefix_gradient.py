"""Backward over several prefixes of the features: G^p = dloss/dS^p panel by panel.

M rows q_i, N columns k_j, P prefixes, logit_scale s. With unit prefixes u_i of q_i and v_j of k_j,
r the inverse norms of the prefixes of q and A_i = sum_j G_ij v_j, the chain through the norm gives

    dq_i[:d] += s r_i (A_i - u_i <u_i, A_i>)          dlogit_scale += sum_i <u_i, A_i>

and likewise dk. It is linear in A: each panel adds its own part. The products take the flops of
each prefix, not of the widest alone: sums over the tiles of several prefixes, which would save
that, cost more traffic than the flops are worth on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradcache_clip.kernels.competition import RAGGED, meets_diagonal
from gradcache_clip.kernels.cuts import tile_grid
from gradcache_clip.kernels.gradient_epilogue import softmax_gradient
from gradcache_clip.kernels.launch_config import (
    FLOAT16_GRADIENT_SCALE,
    LaunchConfig,
    launch_options,
    prefix_config,
)
from gradcache_clip.kernels.panels import Panels, product
from gradcache_clip.kernels.prefix_statistics import Segments
from gradcache_clip.kernels.similarity import store_tile, tile_pointers, tile_position, whole

Needs = tuple[bool, bool, bool]
Gradients = tuple["Tensor | None", "Tensor | None", "Tensor | None"]


@triton.jit(do_not_specialize=RAGGED)
def _prefix_gradient_kernel(
    q_ptr,
    k_ptr,
    row_factor_ptr,
    column_factor_ptr,
    row_max_ptr,
    row_dsum_ptr,
    row_dpositive_ptr,
    column_max_ptr,
    column_dsum_ptr,
    gradient_ptr,
    gradient_plane,
    gradient_stride,
    first_row,
    first_column,
    rows,
    columns,
    M,
    N,
    D,
    ends_ptr,
    positive_shift,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of G of each prefix; factors and maxima in units of log 2."""
    tile_m, tile_n = tile_position(tl.program_id(0), rows, columns, BLOCK_M, BLOCK_N, GROUP_M)
    row_start, column_start = first_row + tile_m * BLOCK_M, first_column + tile_n * BLOCK_N
    row = row_start + tl.arange(0, BLOCK_M)
    column = column_start + tl.arange(0, BLOCK_N)
    # Clamped indices need fewer registers than masked loads; nobody reads G of the repeats.
    row_clamped, column_clamped = tl.minimum(row, M - 1), tl.minimum(column, N - 1)
    q_ptrs, k_ptrs = tile_pointers(
        q_ptr, k_ptr, row_start, column_start, M, N, D, BLOCK_M, BLOCK_N, BLOCK_D
    )
    tile = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    prefix = 0
    end = tl.load(ends_ptr)
    for start in range(0, D, BLOCK_D):
        tile = tl.dot(tl.load(q_ptrs), tl.load(k_ptrs), tile, input_precision=PRECISION)
        q_ptrs += BLOCK_D
        k_ptrs += BLOCK_D
        if start + BLOCK_D == end:
            own_row, own_column = prefix * M + row_clamped, prefix * N + column_clamped
            row_factor = tl.load(row_factor_ptr + own_row)
            logits = tile * row_factor[:, None] * tl.load(column_factor_ptr + own_column)[None, :]
            gradient = softmax_gradient(
                logits,
                logits,
                row_max_ptr,
                row_dsum_ptr,
                column_max_ptr,
                column_dsum_ptr,
                own_row,
                own_column,
            )
            near = meets_diagonal(row_start, column_start, positive_shift, BLOCK_M, BLOCK_N)
            near |= meets_diagonal(row_start, column_start, positive_shift - N, BLOCK_M, BLOCK_N)
            if near:
                partner = row + positive_shift
                partner = tl.where(partner < N, partner, partner - N)
                dpositive = tl.load(row_dpositive_ptr + own_row)
                positives = partner[:, None] == column[None, :]
                gradient = tl.where(positives, dpositive[:, None], gradient)
            plane_ptr = gradient_ptr + prefix * whole(gradient_plane).to(tl.int64)
            store_tile(plane_ptr, gradient_stride, gradient, tile_m, tile_n)
            prefix += 1
            end = tl.load(ends_ptr + prefix)


def prefix_gradient(
    q: Tensor,
    k: Tensor,
    logit_scale: Tensor,
    factors: tuple[Tensor, Tensor, Tensor],
    sides: Sequence[Tensor | None],
    widths: Sequence[int],
    positive_shift: int,
    largest_inverse_norm: float,
    needs: Needs,
    dtype: torch.dtype,
    *,
    config: LaunchConfig | None = None,
) -> Gradients:
    """Launch the backward: for each panel the tile kernel, then two vendor products a prefix.

    Args:
        q: (M, D), fp32, fp16 or bf16.
        k: (N, D), like q.
        logit_scale: 0-dim, fp32, on the same device.
        factors: row_factor (P, M) as the forward takes it; inverse norms of the prefixes of q
            (P, M) and of k (P, N).
        sides: maxima (in units of log 2, +inf for empty sums), dsum and dpositive of the rows,
            (P, M) each; maxima and dsum of the columns, (P, N) each, or None and None.
        widths: P increasing widths, the last at most D.
        positive_shift: the positive of row i is column (i + positive_shift) mod N.
        largest_inverse_norm: rows that have it were divided by a constant, not by their norm.
        needs: which of q, k and logit_scale need a gradient.
        dtype: of dq and dk: that of q, or fp32 where they are added to others.
        config: launch parameters; those of `prefix_config` when None.

    Returns:
        dq, dk, dlogit_scale in fp32; None where not needed.
    """
    needs_q, needs_k, needs_scale = needs
    config = config or prefix_config(q, gradient=True)
    panels = _Panels(q, k, factors, sides, widths, positive_shift, config)
    rows_chain = _Chain(q, factors[1], widths, largest_inverse_norm)
    columns_chain = _Chain(k, factors[2], widths, largest_inverse_norm)
    through_q = needs_q or not needs_k
    dq = torch.empty(q.shape, dtype=dtype, device=q.device) if needs_q else None
    dk = torch.zeros(k.shape, dtype=torch.float32, device=k.device) if needs_k else None
    # Either side gives the gradient of the scale; the other one adds to a sum nobody reads.
    dscale = torch.zeros_like(logit_scale)
    for rows in panels.stripes():
        sums = torch.zeros(q[rows].shape, dtype=torch.float32, device=q.device)
        for columns in panels.columns_from():
            for index, gradient in enumerate(panels.gradients(rows, columns)):
                if through_q:
                    own = product(gradient, columns_chain.unit(index, columns))
                    dscale += rows_chain.add(sums, index, rows, own)
                if dk is not None:
                    own = product(gradient.T, rows_chain.unit(index, rows))
                    along = columns_chain.add(dk[columns], index, columns, own)
                    dscale += 0 if through_q else along
        if dq is not None:
            torch.mul(sums, logit_scale / panels.gradient_scale, out=dq[rows])
    if dk is not None:
        dk = dk.mul_(logit_scale / panels.gradient_scale).to(dtype)
    return dq, dk, dscale / panels.gradient_scale if needs_scale else None


class _Chain:
    """Unit prefixes of features, and the way back through their norms."""

    def __init__(
        self, features: Tensor, inverse_norm: Tensor, widths: Sequence[int], largest: float
    ) -> None:
        self.features, self.inverse_norm, self.widths = features, inverse_norm, widths
        self.largest = largest

    def unit(self, index: int, where: slice) -> Tensor:
        """Unit prefixes of these rows in the dtype of the features."""
        prefix = self.features[where, : self.widths[index]]
        return (prefix * self.inverse_norm[index, where, None]).to(self.features.dtype)

    def add(self, sums: Tensor, index: int, where: slice, gradient: Tensor) -> Tensor:
        """Add to the sums of these rows what a gradient of unit prefixes means for them.

        Returns the sum of <unit prefix, gradient>.
        """
        factor = self.inverse_norm[index, where]
        unit = self.features[where, : self.widths[index]] * factor[:, None]
        along = torch.linalg.vecdot(unit, gradient)
        projected = along.where(factor < self.largest, 0)
        gradient.addcmul_(unit, projected[:, None], value=-1)
        sums[:, : self.widths[index]].addcmul_(gradient, factor[:, None])
        return along.sum()


class _Panels(Panels):
    """Computes one panel of G of each prefix at a time."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        factors: tuple[Tensor, Tensor, Tensor],
        sides: Sequence[Tensor | None],
        widths: Sequence[int],
        positive_shift: int,
        config: LaunchConfig,
    ) -> None:
        self.segments = Segments(widths, config.BLOCK_D)
        features = self.segments.padded(q), self.segments.padded(k)
        super().__init__(*features, config, planes=len(widths))
        self.factors, self.positive_shift = (factors[0], factors[2]), positive_shift
        self.gradient_scale, self.sides = _scaled(sides, q.dtype)
        self.workspace = self.allocated()

    def gradients(self, rows: slice, columns: slice) -> list[Tensor]:
        """G of these rows and columns, times gradient_scale; overwritten by the next call."""
        height, width = rows.stop - rows.start, columns.stop - columns.start
        with torch.cuda.device_of(self.q):
            _prefix_gradient_kernel[tile_grid(self.config, height, width)](
                self.q,
                self.k,
                *self.factors,
                *self.sides,
                self.workspace,
                self.workspace.stride(0),
                self.stride,
                rows.start,
                columns.start,
                height,
                width,
                len(self.q),
                *self.k.shape,
                self.segments.ends_on(self.q.device),
                self.positive_shift,
                **launch_options(self.config),
            )
        return list(self.workspace[:, :height, :width])


def _scaled(
    sides: Sequence[Tensor | None], dtype: torch.dtype
) -> tuple[Tensor | float, list[Tensor | None]]:
    """In fp16 a power of two that brings the largest |G| near 2^14, and the sides times it."""
    if dtype != torch.float16:
        return 1.0, list(sides)
    row_max, row_dsum, row_dpositive, column_max, column_dsum = sides
    largest = torch.maximum(row_dsum.abs().amax(), row_dpositive.abs().amax())
    if column_dsum is not None:
        largest = torch.maximum(largest, column_dsum.abs().amax())
    exponent = torch.log2(FLOAT16_GRADIENT_SCALE / largest.clamp_min(2.0**-100)).floor()
    scale = torch.exp2(exponent)
    scaled = [None if x is None else x * scale for x in (row_dsum, row_dpositive, column_dsum)]
    return scale, [row_max, scaled[0], scaled[1], column_max, scaled[2]]
