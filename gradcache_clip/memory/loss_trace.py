"""The losses that a step may end in, traced on the meta device over features of B rows."""

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

_ROWS = (64, 128, 192)


class FullMatrixLoss(nn.Module):
    """The CLIP loss as it is usually written, with its B x B logits and both cross-entropies."""

    def __init__(self) -> None:
        super().__init__()
        self.log_logit_scale = nn.Parameter(torch.zeros(()))

    def forward(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """Features (B, D) to the mean loss of both directions."""
        image_features = F.normalize(image_features, dim=-1)
        text_features = F.normalize(text_features, dim=-1)
        logits = self.log_logit_scale.exp() * image_features @ text_features.T
        return _cross_entropies(logits, logits.T)


class FullTokenLoss(nn.Module):
    """Late interaction as it is usually written, with its B x P x B x R similarities."""

    def __init__(self) -> None:
        super().__init__()
        self.log_logit_scale = nn.Parameter(torch.zeros(()))

    def forward(self, images: Tensor, texts: Tokens) -> Tensor:
        """Patches (B, P, D) and `Tokens` of B texts to the mean loss of both directions."""
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
    """Segments "forward" and "backward" of a loss over two features of B rows.

    The shapes are those of a row: (D,), or (tokens, D), of which the second gets a mask. Gradients
    of the features stay, as "feature". Workspaces inside the tiled loss stay open: their kinds are
    those of `workspaces`.
    """
    recordings = [
        _recorded(
            loss, [(rows, *shape) for shape in shapes], features, DeviceRules(device_kind, dtype)
        )
        for rows in _ROWS
    ]
    return join_recordings(recordings, _ROWS)


def tiled_loss(*, tokens: bool = False) -> nn.Module:
    """The library's loss, on the meta device, of features or of tokens."""
    with torch.device("meta"):
        return TokenLoss(LateInteractionLoss(impl="tiled")) if tokens else ClipLoss(impl="tiled")


def full_matrix_loss(*, tokens: bool = False) -> nn.Module:
    """The usual loss, on the meta device."""
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
        del value, output
        recorder.cut("backward")
    loss.zero_grad()
    return recorder


# What the Triton kernels take at most: on consumer cards, and on A100, H100 and their successors.
_WORKSPACE_BYTES = {False: 128 * 2**20, True: 256 * 2**20}
_TILE = 128


def workspaces(
    rows: int, columns: int, width: int, itemsize: int, *, large: bool
) -> dict[str, int]:
    """Bytes that the fused loss takes inside one op, for each of its two passes.

    Forward: two fp32 numbers for each row and column of every tile of a stripe. Backward: a panel
    of the gradient of S, and an fp32 accumulator for each of the two gradients.

    Args:
        rows, columns: of the similarity matrix of this process.
        width: D.
        itemsize: bytes of a feature's number.
        large: a card whose kernels take the larger workspace.
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
    """The same of the fused late interaction, at most.

    Forward: maxima of a panel of pairs, about 32 bytes a token, and six fp32 numbers for each image
    of a stripe and every text. Backward: those maxima, a panel of the gradient of the similarities,
    and fp32 accumulators of the gradients of all tokens. Both: the tokens without what is masked.

    Args:
        rows, columns: images and texts of the pairs of this process.
        tokens: P patches of an image, R tokens of a text.
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
