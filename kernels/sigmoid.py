"""The sigmoid loss and its gradients in one pass: panels of S, and two vendor products with G.

M rows q_i, N columns k_j, S_ij = logit_scale <q_i, k_j> + logit_bias, G_ij = M dloss/dS_ij.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from gradcache_clip.kernels.cuts import program_grid
from gradcache_clip.kernels.launch_config import (
    FLOAT16_GRADIENT_SCALE,
    LaunchConfig,
    launch_config,
    launch_options,
    without_bound,
)
from gradcache_clip.kernels.panels import Panels, add_product
from gradcache_clip.kernels.sigmoid_tile import sigmoid_kernel
from gradcache_clip.kernels.similarity import LOG2_E, operands, padded

# Beyond all columns; a multiple of 16 as 0 is, or Triton would compile for both.
_NO_POSITIVES = 2**30


def sigmoid_loss(
    q: Tensor,
    k: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    labels: tuple[Tensor, Tensor] | None,
    wanted: tuple[bool, bool, bool, bool, bool],
    *,
    paired: bool = True,
    config: LaunchConfig | None = None,
) -> tuple[Tensor | None, ...]:
    """Launch one pass over the tiles: for each panel the kernel, then at most two vendor products.

    Args:
        q: (M, D) contiguous, fp32, fp16 or bf16.
        k: (N, D), like q.
        logit_scale: 0-dim, fp32, on the same device.
        logit_bias: like logit_scale.
        labels: (M,) and (N,) int64, equal on positives; None where there are `paired` ones or none.
        wanted: whether dq, dk, dlogit_scale, dlogit_bias and the largest logits are.
        paired: without labels, whether row i and column i are positives.
        config: launch parameters; those of the table when None.

    Returns:
        The fields of `SigmoidPass`: fp32, None where not wanted.
    """
    config = config or launch_config(q, kernel=None if labels else "sigmoid")
    panels = _Panels(q, k, logit_scale, logit_bias, labels, wanted, config, paired)
    wants_q, wants_k, wants_scale, wants_bias, wants_accuracy = wanted
    dq = torch.zeros_like(q, dtype=torch.float32) if wants_q else None
    dk = torch.zeros_like(k, dtype=torch.float32) if wants_k else None
    for rows in panels.stripes():
        for columns in panels.columns_from():
            gradient = panels.compute(rows, columns)
            if dq is not None:
                add_product(dq[rows], gradient, k[columns])
            if dk is not None:
                add_product(dk[columns], gradient.T, q[rows])
    for each in (dq, dk):
        if each is not None and panels.gradient_scale != 1:
            each.div_(panels.gradient_scale)
    loss, dlogit_scale, dlogit_bias = panels.totals()
    return (
        loss,
        dq,
        dk,
        dlogit_scale if wants_scale else None,
        dlogit_bias if wants_bias else None,
        *(panels.largest() if wants_accuracy else (None, None)),
    )


class _Panels(Panels):
    """Computes one panel at a time: its sums, its largest logits and its G."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor,
        labels: tuple[Tensor, Tensor] | None,
        wanted: tuple[bool, bool, bool, bool, bool],
        config: LaunchConfig,
        paired: bool = True,
    ) -> None:
        self.tiles = _tiles(config, compares=labels is not None and wanted[4])
        inner = self.tiles.inner
        super().__init__(padded(q, inner.BLOCK_D), padded(k, inner.BLOCK_D), inner)
        self.operands = operands(self.q, self.k, inner)
        # Where sign <q, k> is largest the logit is, also of a negative scale.
        self.sign = torch.copysign(torch.ones_like(logit_scale), logit_scale)
        self.scale, self.bias, self.labels = logit_scale.abs(), logit_bias, labels
        self.gradient_wanted, self.best_wanted = wanted[0] or wanted[1], wanted[4]
        self.gradient_scale = FLOAT16_GRADIENT_SCALE if q.dtype == torch.float16 else 1.0
        labelled = labels is not None
        self.paired = paired and not labelled
        self.switches = {
            "LABELS": labelled,
            "SUMS": any(wanted[:4]),
            "GRADIENT": self.gradient_wanted,
            "BEST": self.best_wanted,
            "PARTS": self.tiles.parts,
            "GRADIENT_SCALE": self.gradient_scale,
        }
        self._allocate(*self.shape)

    def _allocate(self, rows: int, columns: int) -> None:
        tiles_m, slots_n = self.tiles.count(rows, columns)
        self.sums = self.scale.new_empty(3, tiles_m * slots_n)
        self.total = self.scale.new_zeros(3, dtype=torch.float64)
        # What is not wanted is neither read nor written: any pointer will do.
        self.workspace = self.row_best = self.column_best = self.scale
        if self.gradient_wanted:
            self.workspace = self.allocated()
        if self.best_wanted:
            self.row_best = self.scale.new_empty(2 * slots_n * rows)
            self.column_best = self.scale.new_empty(2 * tiles_m * columns)
            self.best = [self.scale.new_full((2, len(x)), -torch.inf) for x in (self.q, self.k)]

    def compute(self, rows: slice, columns: slice) -> Tensor:
        """G of these rows and columns, times gradient_scale; overwritten by the next call."""
        height, width = rows.stop - rows.start, columns.stop - columns.start
        tiles_m, slots_n = self.tiles.count(height, width)
        if self.best_wanted:
            row_best = self.row_best[: 2 * slots_n * height].fill_(-torch.inf)
            column_best = self.column_best[: 2 * tiles_m * width].fill_(-torch.inf)
        # Not every part of a tile has sums of its own.
        self.sums.zero_()
        self._launch(rows, columns, height, width)
        self.total += self.sums.sum(1, dtype=torch.float64)
        if self.best_wanted:
            _raise(self.best[0][:, rows], row_best.view(2, slots_n, height))
            _raise(self.best[1][:, columns], column_best.view(2, tiles_m, width))
        if not self.gradient_wanted:
            return self.workspace
        return self.workspace[0, :height, :width]

    def _launch(self, rows: slice, columns: slice, height: int, width: int) -> None:
        for edge in (False, True):
            config = self.tiles.edge if edge else self.tiles.inner
            grid = self._grid(height, width, edge=edge)
            if grid == (0,):
                continue
            with torch.cuda.device_of(self.q):
                sigmoid_kernel[grid](
                    *((self.q, self.k) if edge else self.operands),
                    self.scale,
                    self.bias,
                    self.sign,
                    *(self.labels or (self.scale, self.scale)),
                    self.sums,
                    self.workspace,
                    self.row_best,
                    self.column_best,
                    self.stride,
                    rows.start,
                    columns.start,
                    height,
                    width,
                    len(self.q),
                    *self.k.shape,
                    0 if self.paired else _NO_POSITIVES,
                    self.tiles.count(height, width)[1],
                    self.sums.shape[1],
                    EDGE=edge,
                    DESCRIPTORS=config.descriptors,
                    STACKED=config.stacked,
                    **self.switches,
                    **launch_options(config),
                )

    def _grid(self, height: int, width: int, *, edge: bool) -> tuple[int]:
        if edge:
            return self.tiles.edge_grid(height, width, paired=self.paired)
        return program_grid(self.tiles.inner, height, width, self.q.device)

    def totals(self) -> tuple[Tensor, Tensor, Tensor]:
        """The loss and its gradients of scale and bias."""
        loss, bias, scale = self.total
        return loss.float(), (scale * self.sign / LOG2_E.value).float(), bias.float()

    def largest(self) -> list[Tensor]:
        """Of rows, and of columns: the largest <q, k> of positives and negatives, times a sign."""
        # A scale of zero makes all logits equal.
        return [each.where((self.scale != 0) | (each == -torch.inf), 0) for each in self.best]


def _raise(best: Tensor, parts: Tensor) -> None:
    torch.maximum(best, parts.amax(1), out=best)


@dataclass(frozen=True)
class _Tiles:
    """Tiles inside a panel, and the parts that tiles on its edge are cut into."""

    inner: LaunchConfig
    parts: int

    @property
    def edge(self) -> LaunchConfig:
        return replace(self.inner, BLOCK_N=self.inner.BLOCK_N // self.parts, parts=1)

    def count(self, height: int, width: int) -> tuple[int, int]:
        """Tile rows of a panel, and parts along its columns."""
        tiles_n = triton.cdiv(width, self.inner.BLOCK_N)
        return triton.cdiv(height, self.inner.BLOCK_M), tiles_n * self.parts

    def edge_grid(self, height: int, width: int, *, paired: bool) -> tuple[int]:
        """Programs on the edge: of the last tile row and column, and of the diagonal."""
        tiles_m, parts_n = self.count(height, width)
        if paired:
            diagonal = tiles_m * triton.cdiv(self.inner.BLOCK_M, self.inner.BLOCK_N)
            return (parts_n + (tiles_m + diagonal) * self.parts,)
        ragged = height % self.inner.BLOCK_M or width % self.inner.BLOCK_N
        return (parts_n + tiles_m * self.parts,) if ragged else (0,)


def _tiles(config: LaunchConfig, *, compares: bool) -> _Tiles:
    """The table's tiles, less where masks or sums need the registers."""
    config = without_bound(config)
    if compares:
        return _Tiles(replace(config, BLOCK_N=config.BLOCK_N // 2), parts=1)
    return _Tiles(config, parts=max(2, config.parts))
