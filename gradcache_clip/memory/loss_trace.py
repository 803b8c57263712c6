"""Traces losses on the meta device: ours in tiles, and the usual ones with a B x B matrix."""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradcache_clip.losses import ClipLoss, LateInteractionLoss
from gradcache_clip.memory.device_rules import DeviceKind, DeviceRules
from gradcache_clip.memory.trace import Recorder, Trace, join_recordings
from gradcache_clip.train.token_towers import TokenLoss, Tokens

# Three sizes, for storages that grow quadratically.
_ROWS = (64, 128, 192)


class FullMatrixLoss(nn.Module):
    """The usual CLIP loss: B x B logits and two cross-entropies."""

    def __init__(self) -> None:
        super().__init__()
        self.log_logit_scale = nn.Parameter(torch.zeros(()))

    def forward(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """Compute the mean loss of both directions for features (B, D)."""
        image_features = F.normalize(image_features, dim=-1)
        text_features = F.normalize(text_features, dim=-1)
        logits = self.log_logit_scale.exp() * image_features @ text_features.T
        return _cross_entropies(logits, logits.T)


class FullTokenLoss(nn.Module):
    """The usual late-interaction loss: B x P x B x R similarities."""

    def __init__(self) -> None:
        super().__init__()
        self.log_logit_scale = nn.Parameter(torch.zeros(()))

    def forward(self, images: Tensor, texts: Tokens) -> Tensor:
        """Compute the mean loss of both directions for patches (B, P, D) and `Tokens`."""
        patches, words = F.normalize(images, dim=-1), F.normalize(texts.vectors, dim=-1)
        similarity = torch.einsum("ipd,jrd->ipjr", patches, words)
        looked_up = similarity.masked_fill(~texts.mask, -torch.inf).amax(3).mean(1)
        found = (similarity.amax(1) * texts.mask).sum(2) / texts.mask.sum(1)
        scale = self.log_logit_scale.exp()
        return _cross_entropies(scale * looked_up, scale * found.T)


def _cross_entropies(rows: Tensor, columns: Tensor) -> Tensor:
    labels = torch.arange(len(rows), device=rows.device)
    return (F.cross_entropy(rows, labels) + F.cross_entropy(columns, labels)) / 2


def trace_loss(
    loss: nn.Module,
    shapes: Sequence[tuple[int, ...]],
    *,
    features: torch.dtype,
    device_kind: DeviceKind = "cuda",
    dtype: torch.dtype | None = None,
) -> Trace:
    """Trace a loss over two features of B rows, in the segments "forward" and "backward".

    `shapes` are those of one row: (D,), or (tokens, D), where the second side gets a mask.
    Gradients of the features stay alive, with kind "feature". Workspaces inside the tiled loss get
    their sizes later, from `workspaces`.
    """
    recordings = [
        _recorded(
            loss, [(rows, *shape) for shape in shapes], features, DeviceRules(device_kind, dtype)
        )
        for rows in _ROWS
    ]
    return join_recordings(recordings, _ROWS)


def tiled_loss(*, tokens: bool = False) -> nn.Module:
    """Build this library's loss on the meta device, for features or tokens."""
    with torch.device("meta"):
        return TokenLoss(LateInteractionLoss(impl="tiled")) if tokens else ClipLoss(impl="tiled")


def full_matrix_loss(*, tokens: bool = False) -> nn.Module:
    """Build the usual loss on the meta device, for features or tokens."""
    with torch.device("meta"):
        return FullTokenLoss() if tokens else FullMatrixLoss()


def _recorded(
    loss: nn.Module, shapes: Sequence[tuple[int, ...]], features: torch.dtype, rules: DeviceRules
) -> Recorder:
    leaves = [torch.empty(s, dtype=features, device="meta").requires_grad_() for s in shapes]
    given: list[Any] = list(leaves)
    known = [*leaves, *loss.parameters()]
    if len(shapes[1]) == 3:
        mask = torch.empty(shapes[1][:2], dtype=torch.bool, device="meta")
        given[1], known = Tokens(leaves[1], mask), [*known, mask]
    recorder = Recorder(known)
    with recorder, rules:
        output: Any = loss(*given)
        value: Tensor = output if isinstance(output, Tensor) else output.loss
        recorder.cut("forward")
        value.backward()
        for leaf in leaves:
            recorder.mark(leaf.grad, "feature")
        # The graph is freed inside the segment.
        del value, output
        recorder.cut("backward")
    loss.zero_grad()
    return recorder


# Largest workspace of the Triton kernels: on consumer cards, and on A100, H100 and successors.
_WORKSPACE_BYTES = {False: 128 * 2**20, True: 256 * 2**20}
_TILE = 128


def workspaces(
    rows: int, columns: int, width: int, itemsize: int, *, large: bool
) -> dict[str, int]:
    """Return the workspace bytes of the fused loss, for each of its two passes.

    Forward: two fp32 numbers per row and column of every tile of a stripe. Backward: a panel of the
    gradient of S, and an fp32 accumulator for each of the two gradients.

    Args:
        rows, columns: of this process's similarity matrix.
        width: D.
        itemsize: bytes per element of the features.
        large: whether the card's kernels use the larger workspace.
    """
    bound = _WORKSPACE_BYTES[large]
    tiles = -(-rows // _TILE), -(-columns // _TILE)
    statistics = 8 * (rows * tiles[1] + columns * tiles[0])
    panel_rows = min(rows, max(_TILE, bound // (itemsize * min(columns, 2 * isqrt(bound)))))
    panel = min(bound, rows * columns * itemsize)
    return {
        "statistics workspace": min(bound, statistics),
        "gradient workspace": panel + 4 * width * (columns + panel_rows),
    }


def token_workspaces(
    rows: int, columns: int, tokens: tuple[int, int], width: int, itemsize: int, *, large: bool
) -> dict[str, int]:
    """Return upper bounds of the workspace bytes of the fused late-interaction loss.

    Forward: maxima of a panel of pairs, about 32 bytes per token, and six fp32 numbers for each
    image of a stripe and every text. Backward: those maxima, a panel of the gradient of the
    similarities, and fp32 accumulators for the gradients of all tokens. Both: packed copies of the
    unmasked tokens.

    Args:
        rows, columns: images and texts of this process's pairs.
        tokens: P patches per image, R tokens per text.
    """
    bound, (patches, words) = _WORKSPACE_BYTES[large], tokens
    pairs, a_pair = rows * columns, 32 * (patches + words)
    copies = itemsize * width * (rows * patches + columns * words)
    maxima = min(bound, pairs * a_pair)
    panel = min(bound, pairs * patches * words * itemsize)
    return {
        "statistics workspace": copies + maxima + min(bound, 24 * pairs),
        "gradient workspace": copies
        + max(maxima, panel)
        + 4 * width * (rows * patches + columns * words),
    }
