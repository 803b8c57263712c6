"""Features, losses and gradients that the tests of the softmax family and of its kernels share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from torch.utils._python_dispatch import TorchDispatchMode

from gradcache_clip.ops import (
    clip_loss_with_accuracy,
    contrast,
    info_nce_loss_with_accuracy,
    nt_xent_loss_with_accuracy,
    sup_con_loss_with_accuracy,
)
from gradcache_clip.ops.contrast_tiled import gradient_tiled, statistics_tiled
from gradcache_clip.ops.tiles import TileShape

# Half a unit in the last place of an fp32 logit between 64 and 128.
ROUNDED_LOGIT = 2.0**-18

Loss = Callable[..., Tensor]


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    logit_scale: Tensor

    def to(self, dtype: torch.dtype) -> Inputs:
        """Leaves in another dtype; the scale stays fp32 unless everything becomes fp64."""
        scale_dtype = torch.promote_types(dtype, torch.float32)
        return Inputs(
            self.q.detach().to(dtype).requires_grad_(),
            self.k.detach().to(dtype).requires_grad_(),
            self.logit_scale.detach().to(scale_dtype).requires_grad_(),
        )


def random_inputs(
    B: int, D: int, dtype: torch.dtype, *, scale: float = 30.0, device: str = "cpu"
) -> Inputs:
    """Unrelated unit vectors."""
    return _leaves(unit(B, D), unit(B, D), scale, dtype, device)


def unit(*shape: int) -> Tensor:
    """Unrelated unit vectors along the last dimension, fp64."""
    return normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def clustered_inputs(
    cosine: float, B: int, D: int, dtype: torch.dtype, *, device: str = "cpu"
) -> Inputs:
    """Every image against every text near one cosine, at scale 100: a gap, or a collapse."""
    axis = torch.zeros(D, dtype=torch.float64)
    axis[0] = 1
    across = torch.zeros_like(axis)
    across[1] = 1
    centre = cosine * axis + (1 - cosine**2) ** 0.5 * across
    noise = 0.02 * torch.randn(2, B, D, dtype=torch.float64)
    q, k = normalize(axis + noise[0], dim=1), normalize(centre + noise[1], dim=1)
    return _leaves(q, k, 100.0, dtype, device)


def _leaves(q: Tensor, k: Tensor, scale: float, dtype: torch.dtype, device: str) -> Inputs:
    logit_scale = torch.tensor(scale, dtype=torch.float64)
    return Inputs(q.to(device), k.to(device), logit_scale.to(device)).to(dtype)


def plain_loss(q: Tensor, k: Tensor, logit_scale: Tensor) -> Tensor:
    """What a person writes without this library, in the dtype of the features throughout."""
    logits = logit_scale.to(q.dtype) * q @ k.T
    labels = torch.arange(len(q), device=q.device)
    return (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2


def loss_and_gradients(loss: Loss, inputs: Sequence[Tensor], *, outer: float = 1.0) -> list[Tensor]:
    """The loss, and the gradient of outer * loss for each input, in fp64."""
    value = loss(*inputs)
    gradients = torch.autograd.grad(outer * value, tuple(inputs))
    return [value.detach().double(), *(gradient.double() for gradient in gradients)]


def assert_each_subset(
    loss: Loss,
    inputs: Sequence[Tensor],
    *,
    rtol: float,
    atol: float,
    after: Callable[[list[Tensor]], object] = lambda leaves: None,
) -> None:
    """Inputs get the same gradients whichever of the others need one; `after` sees each subset."""
    full = torch.autograd.grad(loss(*inputs), tuple(inputs))
    assert not loss(*(x.detach() for x in inputs)).requires_grad
    for needed in range(1, 2 ** len(inputs)):
        leaves = [x.detach().requires_grad_(bool(needed >> i & 1)) for i, x in enumerate(inputs)]
        loss(*leaves).backward()
        after(leaves)
        for leaf, gradient in zip(leaves, full, strict=True):
            assert (leaf.grad is not None) == leaf.requires_grad
            if leaf.grad is not None:
                torch.testing.assert_close(leaf.grad, gradient, rtol=rtol, atol=atol)


def relative_errors(got: list[Tensor], expected: list[Tensor]) -> list[float]:
    """For each tensor the largest difference over the largest expected entry."""
    return [
        ((a - b).abs().max() / b.abs().max().clamp_min(1e-30)).item()
        for a, b in zip(got, expected, strict=True)
    ]


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Uninitialised tensors hold NaN, so that reading one before writing it shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(2).isnan().all()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


class Case(NamedTuple):
    """A loss with its options: `call(*leaves, impl=...)` gives loss and accuracies."""

    call: Callable[..., Any]
    leaves: list[Tensor]
    """Features and, last, the scale."""

    def outcome(self, impl: str = "tiled", *, outer: float = 1.0) -> list[Tensor]:
        """Loss, gradients of outer * loss, accuracies, in fp64."""
        result = self.call(*self.leaves, impl=impl)
        accuracies = [accuracy.double() for accuracy in result[1:] if accuracy is not None]
        return [*loss_and_gradients(lambda *_: result[0], self.leaves, outer=outer), *accuracies]

    def loss(self, *leaves: Tensor, impl: str = "tiled") -> Tensor:
        return self.call(*leaves, impl=impl).loss

    def with_leaves(self, *leaves: Tensor) -> Case:
        return self._replace(leaves=[leaf.detach().requires_grad_() for leaf in leaves])


CASES = (
    "clip",
    "clip, smoothed",
    "clip, labels and ids",
    "clip, labels and ids, smoothed",
    "info_nce",
    "info_nce, shared negatives, ids, margin",
    "info_nce, own negatives, ids, debiased",
    "nt_xent",
    "nt_xent, debiased",
    "sup_con",
)
# Those with the most options of each loss.
FULL_CASES = [n for n in CASES if n.count(",") > 1 or "xent," in n or "_con" in n]


def case(
    name: str, B: int, D: int, dtype: torch.dtype = torch.float64, *, scale: float = 8.0
) -> Case:
    """One of `CASES` over B pairs of unrelated unit vectors; numbers below B / 2 as labels."""
    labels, ids = (torch.randint(0, B // 2 + 1, (B + 5,)) for _ in range(2))
    features = [unit(B, D), unit(B, D)]
    call: Callable[..., Any] = {
        "clip": clip_loss_with_accuracy,
        "nt_xent": nt_xent_loss_with_accuracy,
        "info_nce": _info_nce,
        "sup_con": _sup_con,
    }[name.partition(",")[0]]
    options: dict[str, Any] = {}
    if name.startswith("clip, labels"):
        options |= {"labels": labels[:B], "ids": ids[:B]}
    if "smoothed" in name:
        options["label_smoothing"] = 0.1
    if "debiased" in name:
        options["tau_plus"] = 0.1
    if name.startswith("info_nce"):
        options["symmetric"] = True
    if "shared" in name:
        features.append(unit(5, D))
        options |= {"ids": ids, "false_negative_margin": 0.2}
    if "own" in name:
        features.append(unit(B, 3, D))
        options["ids"] = ids[:B]
    if name == "sup_con":
        features, options = [unit(B, D)], {"labels": labels[:B]}
    leaves = [x.to(dtype).requires_grad_() for x in features]
    wide = torch.promote_types(dtype, torch.float32)
    return Case(
        partial(call, **options), [*leaves, torch.tensor(scale, dtype=wide, requires_grad=True)]
    )


def _info_nce(queries: Tensor, documents: Tensor, *rest: Tensor, **options: Any) -> Any:
    negatives = rest[0] if len(rest) == 2 else None
    return info_nce_loss_with_accuracy(
        queries, documents, rest[-1], hard_negatives=negatives, **options
    )


def _sup_con(features: Tensor, logit_scale: Tensor, *, labels: Tensor, **options: Any) -> Any:
    return sup_con_loss_with_accuracy(features, labels, logit_scale, **options)


class Products(TorchDispatchMode):
    """Counts matrix products, and remembers the largest tensor that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.flops, self.largest = 0, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_):
            left, right = args[-2:]
            self.count += 1
            self.flops += 2 * left.shape[0] * left.shape[1] * right.shape[1]
        if isinstance(result, Tensor):
            self.largest = max(self.largest, result.numel())
        return result


@contextmanager
def small_tiles(
    rows: int, columns: int, *, watched_by: TorchDispatchMode | None = None
) -> Iterator[None]:
    """impl="tiled" with these tiles. What its custom ops do inside is hidden from a dispatch mode
    that surrounds them: `watched_by` is entered there, and around the body.
    """
    shape = TileShape(rows, columns)

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            if watched_by is None:
                return function(*arguments, shape=shape)
            with watched_by:
                return function(*arguments, shape=shape)

        return run

    with (
        patch.dict(contrast._STATISTICS, tiled=watched(statistics_tiled)),
        patch.dict(contrast._GRADIENT, tiled=watched(gradient_tiled)),
    ):
        if watched_by is None:
            yield
        else:
            with watched_by:
                yield
