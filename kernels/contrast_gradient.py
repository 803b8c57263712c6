"""Backward of the softmax family: G = dloss/dS panel by panel, and the products with it."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from gradcache_clip.kernels.competition import Competition, lengthened
from gradcache_clip.kernels.cuts import program_grid
from gradcache_clip.kernels.gradient_tile import contrast_gradient_kernel
from gradcache_clip.kernels.launch_config import (
    LaunchConfig,
    launch_config,
    launch_options,
    with_column_sums,
)
from gradcache_clip.kernels.panels import Panels, add_product, in_range_of_float16
from gradcache_clip.kernels.similarity import operands, padded

# What the kernels know of rows, or of columns: maximum in units of log 2, dsum, dpositive.
Side = tuple[Tensor, Tensor, Tensor]


def contrast_gradient(
    q: Tensor,
    k: Tensor,
    logit_scale: Tensor,
    competition: Competition,
    rows: Side,
    columns: Side | None,
    needs: tuple[bool, bool, bool],
    *,
    column_sums: Tensor | None,
    dtype: torch.dtype,
    config: LaunchConfig | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Launch the backward: for each panel of G the tile kernel, then at most two vendor products.

    Args:
        q: (M, D) contiguous, fp32, fp16 or bf16.
        k: (N, D), like q; q itself in a self-contrast.
        logit_scale: 0-dim, fp32, on the same device.
        competition: which logits are positives and which compete.
        rows: maximum (in units of log 2, -inf where nothing competes), dsum and dpositive of each
            row, contiguous fp32.
        columns: the same of each column, dpositive only with labels; None unless both ways.
        needs: which of q, k and logit_scale need a gradient.
        column_sums: (N,) fp32, to which the sums of G over rows are added, the gradient of
            column_bias; None where nobody asks, and in a self-contrast.
        dtype: of dq and dk: that of q, or fp32 where they are added to others.
        config: launch parameters; those of the table when None.

    Returns:
        dq, dk, dlogit_scale in fp32; None where not needed. Of a self-contrast dq is the gradient
        through both sides, and dk is None.
    """
    if config is None:
        kernel = "gradient" if competition.described and column_sums is None else None
        config = launch_config(q, **competition.rules(), kernel=kernel)
    if column_sums is not None:
        config = with_column_sums(config)
    panels = _Panels(q, k, logit_scale, competition, rows, columns, config)
    if competition.self_contrast:
        return _self_contrast(panels, q, k, needs, dtype)
    return _two_sided(panels, q, k, needs, column_sums, dtype)


def softmax_products(
    q: Tensor,
    k: Tensor,
    logit_scale: Tensor,
    log_sum_exp: Tensor,
    operand: Tensor,
    *,
    transposed: bool = False,
    config: LaunchConfig | None = None,
) -> Tensor:
    """P x operand, or its transpose, for the softmax P_ij = exp(S_ij - log_sum_exp_i), by panels.

    P is the G of a loss whose rows have dsum = 1 and no positive.

    Args:
        q, k, logit_scale, config: as in `contrast_gradient`.
        log_sum_exp: (M,) fp32, of each row of S in units of log 2.
        operand: (N, V), transposed (M, V), like q.
        transposed: whether rows are summed, not columns.

    Returns:
        (M, V), transposed (N, V), fp32.
    """
    competition = Competition(both_ways=False, positive_shift=2 * (len(q) + len(k)))
    config = config or launch_config(q, plain=False, kernel="gradient")
    ones, zeros = torch.ones_like(log_sum_exp), torch.zeros_like(log_sum_exp)
    rows = log_sum_exp, ones, zeros
    panels = _Panels(q, k, logit_scale, competition, rows, None, config)
    shape = len(k if transposed else q), operand.shape[1]
    out = torch.zeros(shape, dtype=torch.float32, device=q.device)
    for stripe in panels.stripes():
        for panel in panels.columns_from(0):
            weights = panels.gradient(stripe, panel)
            if transposed:
                add_product(out[panel], weights.T, operand[stripe])
            else:
                add_product(out[stripe], weights, operand[panel])
    return out.mul_(panels.factor)


def _two_sided(
    panels: _Panels,
    q: Tensor,
    k: Tensor,
    needs: tuple[bool, bool, bool],
    column_sums: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    needs_q, needs_k, needs_scale = needs
    logit_scale, factor = panels.logit_scale, panels.factor
    # <q, G k> and <k, G^T q> are the same sum, so the scale needs only one of the two products.
    through_q = needs_q or (needs_scale and not needs_k)
    dq = torch.empty_like(q, dtype=dtype) if needs_q else None
    dk = torch.zeros_like(k, dtype=torch.float32) if needs_k else None
    dlogit_scale = torch.zeros_like(logit_scale) if needs_scale else None
    for stripe in panels.stripes():
        rows = torch.zeros_like(q[stripe], dtype=torch.float32) if through_q else None
        for panel in panels.columns_from(0):
            of_panel = None if column_sums is None else column_sums[panel]
            gradient = panels.gradient(stripe, panel, of_panel)
            if rows is not None:
                add_product(rows, gradient, k[panel])
            if dk is not None:
                add_product(dk[panel], gradient.T, q[stripe])
        if rows is not None and dlogit_scale is not None:
            dlogit_scale += (q[stripe] * rows).sum()
        if rows is not None and dq is not None:
            torch.mul(rows, factor * logit_scale, out=dq[stripe])
    if not through_q and dk is not None and dlogit_scale is not None:
        dlogit_scale += (k * dk).sum()
    if dk is not None:
        dk = dk.mul_(factor * logit_scale).to(dtype)
    return dq, dk, None if dlogit_scale is None else dlogit_scale * factor


def _self_contrast(
    panels: _Panels,
    q: Tensor,
    k: Tensor,
    needs: tuple[bool, bool, bool],
    dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """G is symmetric: what a stripe holds beyond its own columns also serves those, transposed."""
    needs_q, needs_k, needs_scale = needs
    dq = torch.zeros_like(q, dtype=torch.float32)
    for stripe in panels.stripes():
        for panel in panels.columns_from(stripe.start):
            gradient = panels.gradient(stripe, panel)
            add_product(dq[stripe], gradient, q[panel])
            beyond = slice(max(panel.start, stripe.stop), panel.stop)
            if beyond.start < beyond.stop:
                own = gradient[:, beyond.start - panel.start :]
                add_product(dq[beyond], own.T, q[stripe])
    # G holds dloss/dS_ij + dloss/dS_ji, and <q, G q> meets each pair twice.
    dlogit_scale = (q * dq).sum() * (panels.factor / 2) if needs_scale else None
    if not (needs_q or needs_k):
        return None, None, dlogit_scale
    return dq.mul_(panels.factor * panels.logit_scale).to(dtype), None, dlogit_scale


class _Panels(Panels):
    """Computes one panel of G at a time."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        logit_scale: Tensor,
        competition: Competition,
        rows: Side,
        columns: Side | None,
        config: LaunchConfig,
    ) -> None:
        super().__init__(padded(q, config.BLOCK_D), padded(k, config.BLOCK_D), config)
        self.operands = operands(self.q, self.k, config)
        self.logit_scale, self.competition = logit_scale, competition
        self.rules = *competition.vectors(config.BLOCK_N), *competition.guides(config.BLOCK_D)
        self.sides, self.factor = _sides(rows, columns, competition, q.dtype, config)
        self.workspace = self.allocated()

    def gradient(self, rows: slice, columns: slice, sums: Tensor | None = None) -> Tensor:
        """G of these rows and columns, over `factor`; overwritten by the next call.

        Its sums over rows, taken before G is rounded, are added to `sums` if there are any.
        """
        height, width = rows.stop - rows.start, columns.stop - columns.start
        parts = None
        if sums is not None:
            parts = sums.new_empty(triton.cdiv(height, self.config.BLOCK_M), self.stride)
        with torch.cuda.device_of(self.q):
            contrast_gradient_kernel[program_grid(self.config, height, width, self.q.device)](
                *self.operands,
                self.logit_scale,
                *self.rules,
                *self.sides,
                self.workspace,
                self.stride,
                parts,
                rows.start,
                columns.start,
                height,
                width,
                len(self.q),
                *self.k.shape,
                self.competition.positive_shift,
                SELF=self.competition.self_contrast,
                PARTS=self.config.parts,
                **launch_options(self.config),
            )
        if sums is not None and parts is not None:
            sums += parts[:, :width].sum(0) * self.factor
        return self.workspace[0, :height, :width]


def _sides(
    rows: Side,
    columns: Side | None,
    competition: Competition,
    dtype: torch.dtype,
    config: LaunchConfig,
) -> tuple[list[Tensor | None], Tensor | float]:
    """The six vectors of the kernel, and the factor by which its G is to be multiplied."""
    if competition.self_contrast:
        rows = columns = _symmetric(rows, competition)
    maxima = [rows[0], columns and columns[0]]
    dsums = [rows[1], columns and columns[1]]
    dpositives = [rows[2], columns[2] if columns and competition.labelled else None]
    factor: Tensor | float = 1.0
    if dtype == torch.float16:
        scaled, factor = in_range_of_float16([*dsums, *dpositives])
        dsums, dpositives = scaled[:2], scaled[2:]
    maxima = [_without_empty(each) for each in maxima]
    row, column = zip(maxima, dsums, dpositives, strict=True)
    return [*row, *(lengthened(each, config.BLOCK_N) for each in column)], factor


def _symmetric(rows: Side, competition: Competition) -> Side:
    """Without labels row and partner are each other's positive, and G holds both gradients."""
    maximum, dsum, dpositive = rows
    if not competition.labelled:
        dpositive = dpositive + dpositive.roll(-competition.positive_shift)
    return maximum, dsum, dpositive


def _without_empty(maximum: Tensor | None) -> Tensor | None:
    """Where nothing competes, exp(S - inf) is 0, and no overflow meets a dsum of 0."""
    return None if maximum is None else maximum.masked_fill(maximum == -torch.inf, torch.inf)
