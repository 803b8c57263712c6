"""The losses that a step may end in, traced on the meta device over features of B rows."""

from __future__ import annotations

from collections.abc import Callable
from math import isqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradcache_clip.losses import ClipLoss
from gradcache_clip.memory.device_rules import DeviceRules, World
from gradcache_clip.memory.trace import Recorder, Trace, joined

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
        labels = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def trace_loss(
    loss: nn.Module,
    width: int,
    *,
    features: torch.dtype,
    world: World = "cuda",
    dtype: torch.dtype | None = None,
) -> Trace:
    """Segments "forward" and "backward" of a loss over two (B, width) features.

    Gradients of the features stay, as "feature". Workspaces inside the tiled loss stay open: their
    kinds are those of `workspaces`.
    """
    recordings = [_recorded(loss, (rows, width), features, world, dtype) for rows in _ROWS]
    return joined(recordings, _ROWS)


def tiled_loss() -> ClipLoss:
    """The library's loss, on the meta device."""
    with torch.device("meta"):
        return ClipLoss(impl="tiled")


def full_matrix_loss() -> FullMatrixLoss:
    """The usual loss, on the meta device."""
    with torch.device("meta"):
        return FullMatrixLoss()


def _recorded(
    loss: nn.Module,
    shape: tuple[int, int],
    features: torch.dtype,
    world: World,
    dtype: torch.dtype | None,
) -> Recorder:
    rules = DeviceRules(world, dtype)
    leaves = [torch.empty(shape, dtype=features, device="meta").requires_grad_() for _ in range(2)]
    recorder = Recorder([*leaves, *loss.parameters()])
    with recorder, rules:
        output: Any = loss(*leaves)
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


def feature_dtype(encode: Callable[[], Tensor], world: World, dtype: torch.dtype | None) -> Any:
    """What a tower returns under autocast."""
    with DeviceRules(world, dtype), torch.no_grad():
        return encode().dtype
