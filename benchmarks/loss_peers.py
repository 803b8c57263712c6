"""The contestants of loss.py, their inputs, and the losses as a person writes them.

An adapter is (q, k, scale[, bias]) -> loss: it calls what a package exports, with its defaults, and
imports it when it is built. B pairs, D features. q are image, k text features; in the NT-Xent loss
the two views of a picture.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import version
from typing import Any

import torch
from contestants import DTYPES, ON_GPU, Contestant, NotOffered
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, logsigmoid, normalize

# Inputs, and the losses as a person writes them

Leaves = tuple[Tensor, ...]
"""q and k (B, D), the scale of the logits and, for the sigmoid loss, their bias."""
LossFunction = Callable[..., Tensor]

OUTPUTS = {
    "clip": ("loss", "dq", "dk", "dscale"),
    "siglip": ("loss", "dq", "dk", "dscale", "dbias"),
    "nt_xent": ("loss", "dq", "dk", "dscale"),
}
SIGLIP_BIAS = -10.0


@dataclass(frozen=True)
class Case:
    """Where the vectors lie, and the scale of their logits."""

    scale: float
    cosine: float | None = None
    """Approximate cosine of every q to every k; unrelated vectors when None."""
    slipped: bool = False
    """The vector equal to q_i is k_(i+1)."""
    dtype: str = ""
    """Replaces the dtype of the run."""


CASES = {
    "random": Case(1 / 0.07),
    # A modality gap.
    "gap": Case(100.0, -0.6),
    # As in a list that is off by a row.
    "slipped": Case(100.0, slipped=True),
    "near": Case(100.0, 0.9, dtype="bf16"),
}


def make_leaves(
    loss: str, case: Case, batch_size: int, width: int, dtype: str, device: str
) -> Leaves:
    """The same tensors for every contestant: unit vectors, rounded to their dtype; fp32 scalars."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(batch_size, width, generator=generator) for _ in range(2))
    if case.slipped:
        k = q.roll(1, 0)
    if case.cosine is not None:
        q, k = q.mul_(0.02), k.mul_(0.02)
        q[:, 0] += 1
        k[:, 0] += case.cosine
        k[:, 1] += (1 - case.cosine**2) ** 0.5
    scalars = [case.scale, SIGLIP_BIAS][: len(OUTPUTS[loss]) - 3]
    tensors = [
        *(normalize(x, dim=1).to(device, DTYPES[case.dtype or dtype]) for x in (q, k)),
        *(torch.tensor(value, device=device) for value in scalars),
    ]
    return tuple(tensor.requires_grad_() for tensor in tensors)


def plain_clip(q: Tensor, k: Tensor, scale: Tensor) -> Tensor:
    """As a person writes it: the matrix and two cross-entropies, in the dtype of the features."""
    logits = scale * q @ k.T
    labels = torch.arange(len(q), device=q.device)
    return (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2


def plain_siglip(q: Tensor, k: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """The pseudocode of the SigLIP paper (Zhai et al. 2023, algorithm 1)."""
    signs = 2 * torch.eye(len(q), dtype=q.dtype, device=q.device) - 1
    return -logsigmoid(signs * (scale * q @ k.T + bias)).sum() / len(q)


def plain_nt_xent(q: Tensor, k: Tensor, scale: Tensor) -> Tensor:
    """SimCLR (Chen et al. 2020, equation 1): each view against the 2B - 1 others."""
    views = torch.cat([q, k])
    logits = (scale * views @ views.T).fill_diagonal_(-torch.inf)
    return cross_entropy(logits, torch.arange(len(views), device=q.device).roll(len(q)))


PLAIN: dict[str, Callable[..., Tensor]] = {
    "clip": plain_clip,
    "siglip": plain_siglip,
    "nt_xent": plain_nt_xent,
}


# Adapters


def ours(device: str) -> str:
    """Name of the contestant that the others are compared with."""
    return _our_name("triton" if device == "cuda" else "tiled")


def _our_name(impl: str) -> str:
    return f"gradcache_clip {impl}"


def _of_ours(loss: str) -> list[Contestant]:
    def build(impl: str, _: float) -> LossFunction:
        module = "gradcache_clip.ops.siglip" if loss == "siglip" else "gradcache_clip.ops"
        return partial(getattr(import_module(module), f"{loss}_loss"), impl=impl)

    return [
        Contestant(_our_name("tiled"), loss, partial(build, "tiled"), "gradcache-clip"),
        Contestant(_our_name("triton"), loss, partial(build, "triton"), "gradcache-clip", ON_GPU),
        Contestant(_our_name("reference"), loss, partial(build, "reference"), "gradcache-clip"),
    ]


def _both_directions(one: Callable[[Tensor, Tensor], Tensor]) -> LossFunction:
    """A cross-entropy of rows as a CLIP loss: scale q against k, and scale k against q."""

    def loss(q: Tensor, k: Tensor, scale: Tensor) -> Tensor:
        return (one(scale * q, k) + one(scale * k, q)) / 2

    return loss


def _labels(rows: Tensor) -> Tensor:
    return torch.arange(len(rows), device=rows.device)


def _torch_linear_cross_entropy(_: float) -> LossFunction:
    if not hasattr(nn, "LinearCrossEntropyOptions"):
        raise NotOffered(f"torch {torch.__version__} has no chunked linear_cross_entropy")
    options = nn.LinearCrossEntropyOptions()

    def one(x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.linear_cross_entropy(x, y, _labels(x), options=options)

    return _both_directions(one)


def _cut_cross_entropy(impl: str, _: float) -> LossFunction:
    from cut_cross_entropy import linear_cross_entropy

    return _both_directions(lambda x, y: linear_cross_entropy(x, y, _labels(x), impl=impl))


def _liger(_: float) -> LossFunction:
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import (
        LigerFusedLinearScaledCrossEntropyFunction as Function,
    )

    return _both_directions(lambda x, y: Function.apply(x, y, _labels(x)).mean())


def _inf_cl(_: float) -> LossFunction:
    from inf_cl import cal_flash_loss

    def loss(q: Tensor, k: Tensor, scale: Tensor) -> Tensor:
        rows, columns = cal_flash_loss(q, k, scale=scale), cal_flash_loss(k, q, scale=scale)
        return (rows.mean() + columns.mean()) / 2

    return loss


def _open_clip(_: float) -> LossFunction:
    from open_clip.loss import ClipLoss

    return ClipLoss()


def _sentence_transformers(scale: float) -> LossFunction:
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
    from sentence_transformers.util import dot_score

    stage = CachedMultipleNegativesRankingLoss(
        nn.Sequential(nn.Identity()),
        scale=scale,
        similarity_fct=dot_score,
        directions=("query_to_doc", "doc_to_query"),
        partition_mode="per_direction",
    )
    return lambda q, k, _: _LossStage.apply(q, k, stage)


class _LossStage(torch.autograd.Function):
    """The cached loss between embed and replay: its backward fills gradients chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, stage: Any) -> Tensor:
        leaves = [x.detach().requires_grad_() for x in (q, k)]
        with torch.enable_grad():
            loss = stage.calculate_loss([[leaf] for leaf in leaves], with_backward=True)
        ctx.gradients = [leaf.grad for leaf in leaves]
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        return (*(gradient.mul_(dloss) for gradient in ctx.gradients), None)


def _info_nce(_: float) -> LossFunction:
    from info_nce import info_nce

    def loss(q: Tensor, k: Tensor, scale: Tensor) -> Tensor:
        rows, columns = (info_nce(*pair, temperature=1 / scale) for pair in ((q, k), (k, q)))
        return (rows + columns) / 2

    return loss


def _metric_learning_ntxent(scale: float) -> LossFunction:
    from pytorch_metric_learning.losses import NTXentLoss

    criterion = NTXentLoss(temperature=1 / scale)

    def one(x: Tensor, y: Tensor) -> Tensor:
        # The same tensor for both labels would take x and y for one set and drop the pairs.
        return criterion(x, _labels(x), ref_emb=y, ref_labels=_labels(y))

    return lambda q, k, _: (one(q, k) + one(k, q)) / 2


def _metric_learning_supcon(scale: float) -> LossFunction:
    from pytorch_metric_learning.losses import SupConLoss

    criterion = SupConLoss(temperature=1 / scale)
    return lambda q, k, _: criterion(torch.cat([q, k]), _labels(q).repeat(2))


def _lightly(scale: float) -> LossFunction:
    from lightly.loss.ntx_ent_loss import NTXentLoss

    criterion = NTXentLoss(temperature=1 / scale)
    return lambda q, k, _: criterion(q, k)


def _memeff(stable: bool, scale: float) -> LossFunction:
    from memeff import MemoryEfficientCLIPLoss

    criterion = MemoryEfficientCLIPLoss(1 / scale, normalized_inputs=True, stable=stable)
    return lambda q, k, _: criterion(q, k)


def _open_clip_siglip(chunk_size: int, _: float) -> LossFunction:
    from inspect import signature

    from open_clip.loss import SigLipLoss

    if not chunk_size:
        return SigLipLoss()
    if "chunk_size" not in signature(SigLipLoss).parameters:
        raise NotOffered(f"open_clip {version('open_clip_torch')} has no chunk_size")
    return SigLipLoss(chunk_size=chunk_size)


def _siglip_kernel(_: float) -> LossFunction:
    from siglip_kernel import fused_siglip_loss

    return lambda q, k, scale, bias: fused_siglip_loss(q, k, scale.log(), bias)


_TWICE = "two calls"
_FIXED = "fixed scale"

CONTESTANTS = [
    *_of_ours("clip"),
    Contestant("plain loss", "clip", lambda _: PLAIN["clip"]),
    Contestant("torch linear_cross_entropy x 2", "clip", _torch_linear_cross_entropy, note=_TWICE),
    Contestant("open_clip ClipLoss", "clip", _open_clip, "open_clip_torch"),
    Contestant(
        "sentence-transformers cached",
        "clip",
        _sentence_transformers,
        "sentence-transformers",
        note=f"32 rows a chunk; {_FIXED}",
    ),
    Contestant(
        "cut-cross-entropy torch_compile",
        "clip",
        partial(_cut_cross_entropy, "torch_compile"),
        "cut-cross-entropy",
        note=_TWICE,
    ),
    Contestant(
        "cut-cross-entropy cce",
        "clip",
        partial(_cut_cross_entropy, "cce"),
        "cut-cross-entropy",
        ON_GPU,
        note=_TWICE,
    ),
    Contestant("liger-kernel scaled CE", "clip", _liger, "liger-kernel", note=_TWICE),
    Contestant(
        "info-nce-pytorch", "clip", _info_nce, "info-nce-pytorch", normalises=True, note=_TWICE
    ),
    Contestant(
        "pytorch-metric-learning NTXent",
        "clip",
        _metric_learning_ntxent,
        "pytorch-metric-learning",
        normalises=True,
        largest=256,
        note=f"memory B^3; {_FIXED}",
    ),
    Contestant("memeff", "clip", partial(_memeff, True), "memeff", ON_GPU, note=_FIXED),
    Contestant(
        "memeff stable=False", "clip", partial(_memeff, False), "memeff", ON_GPU, note=_FIXED
    ),
    Contestant("inf-cl flash", "clip", _inf_cl, "inf-cl", ON_GPU, note=_TWICE),
    *_of_ours("siglip"),
    Contestant("plain loss", "siglip", lambda _: PLAIN["siglip"]),
    Contestant("open_clip SigLipLoss", "siglip", partial(_open_clip_siglip, 0), "open_clip_torch"),
    Contestant(
        "open_clip SigLipLoss chunks",
        "siglip",
        partial(_open_clip_siglip, 512),
        "open_clip_torch",
    ),
    Contestant("siglip-kernel", "siglip", _siglip_kernel, "siglip-kernel", ON_GPU),
    *_of_ours("nt_xent"),
    Contestant("plain loss", "nt_xent", lambda _: PLAIN["nt_xent"]),
    Contestant("lightly NTXentLoss", "nt_xent", _lightly, "lightly", normalises=True, note=_FIXED),
    Contestant(
        "pytorch-metric-learning SupCon",
        "nt_xent",
        _metric_learning_supcon,
        "pytorch-metric-learning",
        normalises=True,
        note=_FIXED,
    ),
]


def find(loss: str, name: str) -> Contestant:
    return next(one for one in CONTESTANTS if (one.loss, one.name) == (loss, name))
