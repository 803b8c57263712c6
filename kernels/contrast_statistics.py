"""Forward of the softmax family: what one pass over the logits leaves of each row and column."""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
from torch import Tensor

from gradcache_clip.kernels.competition import Competition
from gradcache_clip.kernels.cuts import program_grid, stripe_rows, tile_grid
from gradcache_clip.kernels.launch_config import (
    LaunchConfig,
    launch_config,
    launch_options,
    one_part,
    second_launch,
)
from gradcache_clip.kernels.panels import slices
from gradcache_clip.kernels.similarity import operands, padded
from gradcache_clip.kernels.statistics_parts import FLAGS_PER_PROGRAM, Running
from gradcache_clip.kernels.statistics_tile import contrast_statistics_kernel


def contrast_statistics(
    q: Tensor,
    k: Tensor,
    logit_scale: Tensor,
    competition: Competition,
    *,
    maxima: bool = True,
    config: LaunchConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Launch the forward: stripes of rows, each followed by its merges; no M x N tensor.

    Args:
        q: (M, D) contiguous, fp32, fp16 or bf16.
        k: (N, D), like q; q itself in a self-contrast.
        logit_scale: 0-dim, fp32, on the same device.
        competition: which logits are positives and which compete.
        maxima: whether the references are to be the maxima; with labels they always are.
        config: launch parameters; those of the table when None.

    Returns:
        positive: (M,) fp32, the positive logits; empty with labels.
        rows: (planes, M) fp32: a reference r and the sum of exp(S - r) over what competes, of the
            negatives alone without labels (-inf and 0 if there are none); with labels also the sum
            of the positive logits, and the maximum over the negatives.
        columns: (planes, N), the same for columns; None unless both ways.
        Logits and references are in units of log 2.
    """
    if config is None:
        described = competition.described and not competition.labelled
        kernel = "statistics" if described else None
        config = launch_config(q, **competition.rules(), kernel=kernel)
    stored = one_part(config)
    q, k = padded(q, config.BLOCK_D), padded(k, config.BLOCK_D)
    M, (N, D) = len(q), k.shape
    labelled, self_contrast = competition.labelled, competition.self_contrast
    stripe = min(stripe_rows(stored, N, numbers=4 if labelled else 2), M)
    positive = logit_scale.new_empty(0 if labelled else M)
    rows, columns = _running(logit_scale, M, N, stripe, competition, stored)
    flags = None
    # One way, maxima cost no exponential more.
    if columns is not None and not (maxima or labelled):
        flags = q.new_empty(tile_grid(stored, stripe, N), dtype=torch.int32)
    written = positive, rows.parts, columns and columns.parts, flags
    rules = *competition.vectors(config.BLOCK_N), *competition.guides(config.BLOCK_D)
    launches = [
        (each, group, operands(q, k, each))
        for each, group in _launches(config, again=flags is not None)
    ]
    with torch.cuda.device_of(q):
        for part in slices(M, stripe):
            height, first_column = part.stop - part.start, part.start if self_contrast else 0
            width = N - first_column
            sizes = part.start, first_column, height, M, N, D, competition.positive_shift
            for each, group, features in launches:
                (programs,) = program_grid(each, height, width, q.device)
                contrast_statistics_kernel[(triton.cdiv(programs, group),)](
                    *(*features, logit_scale, *rules, *written, *sizes),
                    SELF=self_contrast,
                    GROUP=group,
                    PARTS=each.parts,
                    STACKED=each.stacked,
                    **launch_options(each),
                )
            rows.merge(part, triton.cdiv(width, stored.BLOCK_N))
            if columns is not None:
                columns.merge(slice(first_column, N), triton.cdiv(height, stored.BLOCK_M))
    both = columns is not None and not self_contrast
    return positive, rows.planes[0], columns.planes[0] if both else None


def _launches(config: LaunchConfig, *, again: bool) -> list[tuple[LaunchConfig, int]]:
    """How each is launched, and of how many tiles a program takes those with a flag (1: all)."""
    second = second_launch(one_part(config)), FLAGS_PER_PROGRAM
    return [(config, 1), second] if again else [(config, 1)]


def _running(
    logit_scale: Tensor, M: int, N: int, stripe: int, rules: Competition, config: LaunchConfig
) -> tuple[Running, Running | None]:
    """Statistics of rows and columns with nothing in them; of a self-contrast they are the same."""
    row_parts = triton.cdiv(N, config.BLOCK_N) * stripe
    column_parts = triton.cdiv(stripe, config.BLOCK_M) * N
    rows = Running.empty(logit_scale, 1, M, row_parts, labelled=rules.labelled)
    if not rules.both_ways and not rules.self_contrast:
        return rows, None
    columns = Running.empty(logit_scale, 1, N, column_parts, labelled=rules.labelled)
    return rows, replace(columns, planes=rows.planes) if rules.self_contrast else columns
