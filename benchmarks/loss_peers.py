"""The contestants of loss.py: one small adapter each, (q, k, scale[, bias]) -> loss.

Adapters call what a package exports, with its defaults, and import it when they are built.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from loss_truth import PLAIN
from torch import Tensor, nn

LossFunction = Callable[..., Tensor]
_GPU = ("cuda",)
NEEDS_GPU = "needs an NVIDIA GPU"


class NotOffered(Exception):
    """The installed version of a package lacks what the adapter calls."""


@dataclass(frozen=True)
class Contestant:
    """One implementation of one loss."""

    name: str
    loss: str
    build: Callable[[float], LossFunction]
    """From the scale of the logits (for those that take a number) to the adapter."""
    package: str = "torch"
    """Distribution on the package index."""
    devices: tuple[str, ...] = ("cpu", "cuda")
    normalises: bool = False
    """L2-normalises inside, so the gradient is that of the normalised features."""
    largest: int = 2**20
    """Batches beyond it are not tried."""
    note: str = ""

    def obstacle(self, device: str) -> str:
        """Why it cannot run here, empty if it can."""
        if device not in self.devices:
            return NEEDS_GPU
        return "" if self.version() else "not installed"

    def version(self) -> str:
        try:
            return version(self.package)
        except PackageNotFoundError:
            return ""


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
        Contestant(_our_name("triton"), loss, partial(build, "triton"), "gradcache-clip", _GPU),
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
        _GPU,
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
    Contestant("memeff", "clip", partial(_memeff, True), "memeff", _GPU, note=_FIXED),
    Contestant("memeff stable=False", "clip", partial(_memeff, False), "memeff", _GPU, note=_FIXED),
    Contestant("inf-cl flash", "clip", _inf_cl, "inf-cl", _GPU, note=_TWICE),
    *_of_ours("siglip"),
    Contestant("plain loss", "siglip", lambda _: PLAIN["siglip"]),
    Contestant("open_clip SigLipLoss", "siglip", partial(_open_clip_siglip, 0), "open_clip_torch"),
    Contestant(
        "open_clip SigLipLoss chunks",
        "siglip",
        partial(_open_clip_siglip, 512),
        "open_clip_torch",
    ),
    Contestant("siglip-kernel", "siglip", _siglip_kernel, "siglip-kernel", _GPU),
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
