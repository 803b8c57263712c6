"""The sigmoid loss through the Triton kernel. Triton is imported on first use only."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from gradcache_clip.ops.siglip_tiled import Labels, SigmoidPass, Wanted

if TYPE_CHECKING:
    from jaxtyping import Float


def siglip_triton(
    q: Float[Tensor, "m d"],
    k: Float[Tensor, "n d"],
    logit_scale: Float[Tensor, ""],
    logit_bias: Float[Tensor, ""],
    labels: Labels | None,
    wanted: Wanted,
    *,
    paired: bool = True,
) -> SigmoidPass:
    """Launch one pass for loss and gradients; memory beyond them: a workspace of bounded size."""
    from gradcache_clip.kernels.sigmoid import sigmoid_loss

    q, k = q.contiguous(), k.contiguous()
    if labels is not None:
        labels = labels[0].contiguous(), labels[1].contiguous()
    found = sigmoid_loss(q, k, logit_scale, logit_bias, labels, wanted, paired=paired)
    return SigmoidPass(*found)
