"""Losses of a batch spread over two, three and four processes equal those of one process.

`python test_losses_distributed.py FOLDER` runs the cases of the kernels, which need a process that
has TRITON_INTERPRET set before its first import.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from losses_over_ranks import (
    CASES,
    ROWS,
    WIDTH,
    Case,
    Place,
    alone_group,
    evaluated,
    relative_errors,
    whole_batch,
    worst_errors,
)
from queue_over_ranks import a_queue_that_does_not_divide, negatives_of_a_queue
from rank_processes import Check, failures
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gradcache_clip import (
    ClipLoss,
    InBatchDistillationLoss,
    InfoNCELoss,
    LateInteractionLoss,
    RetrievalLoss,
    SigLipLoss,
)

Checks = Iterator[tuple[str, Check]]

BY_NAME = {case.name: case for case in CASES}
EXCHANGES = "gather", "ring"
# One of each way through the tiles.
FEW = [
    BY_NAME[name]
    for name in (
        *("clip", "clip labels", "info_nce shared both ways", "nt_xent", "siglip"),
        *("siglip captions", "late_interaction masks", "max_sim packed", "matryoshka clip"),
    )
]


def exact(
    cases: Sequence[Case],
    impl: str,
    *,
    exchanges: Sequence[str] = EXCHANGES,
    dtype: torch.dtype = torch.float64,
    tolerance: float = 1e-12,
    group: dist.ProcessGroup | None = None,
) -> Checks:
    """Everything that a loss returns, and all gradients, within a tolerance."""

    def check(case: Case, exchange: str) -> None:
        errors = worst_errors(case, dtype, impl=impl, exchange=exchange, group=group)
        wrong = {name: error for name, error in errors.items() if not error < tolerance}
        assert not wrong, str(wrong)

    for case in cases:
        for exchange in exchanges:
            yield f"{case.name} {exchange} {impl} {dtype}", partial(check, case, exchange)


def as_good_as_alone(case: Case, exchange: str, dtype: torch.dtype) -> None:
    """No further from fp64 than one process is: blocks are added before they are rounded."""
    place = Place.in_group(None)
    whole = whole_batch(case, place.world, dtype)
    in_fp64 = {n: x.double() if x.is_floating_point() else x for n, x in whole.items()}

    def of(inputs: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
        found = evaluated(case.build(**options).to(dtype), inputs)
        return {name: each.double() for name, each in found.items()}

    alone = partial(of, group=alone_group())
    truth = place.of_rank(alone(in_fp64, impl="reference"), whole)
    budget = relative_errors(place.of_rank(alone(whole, impl="tiled"), whole), truth)
    errors = relative_errors(of(place.share(whole), impl="tiled", exchange=exchange), truth)
    for name, error in errors.items():
        allowed = 1.1 * budget[name] + 1e-5
        assert error <= allowed, f"{name}: {error:.1e}, alone {budget[name]:.1e}"


def rounded_once() -> Checks:
    for name in ("clip", "info_nce", "nt_xent", "siglip", "late_interaction", "matryoshka clip"):
        for exchange in EXCHANGES:
            for dtype in (torch.bfloat16, torch.float16):
                check = partial(as_good_as_alone, BY_NAME[name], exchange, dtype)
                yield f"{name} {exchange} {dtype}: rounded once", check


def one_gradient(case: Case, exchange: str, wanted: str) -> None:
    """The gradient of one input or parameter alone is the one that it gets among others."""
    given = Place.in_group(None).share(whole_batch(case, dist.get_world_size(), torch.float64))
    expected = evaluated(case.build(impl="tiled", exchange=exchange), given)[f"d{wanted}"]
    loss = case.build(impl="tiled", exchange=exchange).double().requires_grad_(False)
    leaves = dict(loss.named_parameters()) | given
    leaves[wanted].requires_grad_()
    (3 * loss(**given).loss).backward()
    assert [name for name, each in leaves.items() if each.grad is not None] == [wanted]
    error = relative_errors({wanted: leaves[wanted].grad}, {wanted: expected})[wanted]
    assert error < 1e-12, f"{error:.1e}"


def single_gradients() -> Checks:
    for name, parameters in (("clip", 1), ("siglip", 2), ("late_interaction", 1)):
        case, kind = BY_NAME[name], "tokens" if "late" in name else "features"
        scalars = ("log_logit_scale", "logit_bias")[:parameters]
        for wanted in (f"image_{kind}", f"text_{kind}", *scalars):
            for exchange in EXCHANGES:
                check = partial(one_gradient, case, exchange, wanted)
                yield f"{name} {exchange}: {wanted} alone", check


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(each, Tensor):
                self.numel = max(self.numel, each.numel())
        return result


def a_ring_holds_no_more_than_three_ranks_features(case: Case) -> None:
    """Not those of all four at once; a gather does."""
    world = dist.get_world_size()
    given = Place.in_group(None).share(whole_batch(case, world, torch.float64))
    of_all = world * min(each.numel() for each in given.values() if each.is_floating_point())
    for exchange in EXCHANGES:
        loss = case.build(impl="tiled", exchange=exchange)
        with Largest() as largest:
            evaluated(loss, given)
        held_all = largest.numel >= of_all
        assert held_all == (exchange == "gather"), f"{exchange}: {largest.numel} of {of_all}"


Sent = list[tuple[str, int]]
ALL_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"


def recorded(step: Callable[[], Any]) -> Sent:
    """Collectives of a step in their order, and the bytes that this rank put in."""
    sent: Sent = []

    def size(tensor: Tensor) -> int:
        return tensor.numel() * tensor.element_size()

    def wrapped(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            first = arguments[1] if name == ALL_GATHER else arguments[0]
            if name == "batch_isend_irecv":
                first = next(each.tensor for each in first if each.op is dist.isend)
            sent.append((name, size(first)))
            return original(*arguments, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in (ALL_GATHER, "all_reduce", "batch_isend_irecv"):
            patch.setattr(dist, name, wrapped(name, getattr(dist, name)))
        step()
    return sent


def what_is_sent(name: str, exchange: str, expected: Sent) -> None:
    case = BY_NAME[name]
    given = Place.in_group(None).share(whole_batch(case, dist.get_world_size(), torch.float64))
    sent = recorded(lambda: evaluated(case.build(impl="tiled", exchange=exchange), given))
    assert sent == expected, f"{sent}"


def traffic() -> Checks:
    """In fp64: a side of b x D features once a rank and pass, and a few vectors of B numbers."""
    world = dist.get_world_size()
    features, numbers = 8 * ROWS * WIDTH, 8 * ROWS
    # Rows, width and dtype of four arguments, int64.
    agreed = (ALL_GATHER, 4 * 4 * 8)
    gathered, passed = (ALL_GATHER, features), ("batch_isend_irecv", features)
    ring = [passed] * (world - 1)
    rows = (ALL_GATHER, 3 * numbers)
    columns = [("all_reduce", world * numbers)] * 2
    scale, sums = ("all_reduce", 8), ("all_reduce", 4 * 8)
    best = ("all_reduce", 2 * world * numbers)
    of_clip = {
        "gather": [agreed, gathered, rows, *columns, gathered, scale],
        "ring": [agreed, *ring, rows, *columns, *ring, *ring, scale],
    }
    of_siglip = {
        "gather": [agreed, gathered, gathered, sums, best],
        "ring": [agreed, *ring, *ring, sums, best],
    }
    for name, by_exchange in (("clip", of_clip), ("siglip", of_siglip)):
        for exchange, expected in by_exchange.items():
            yield f"{name} {exchange}: sent", partial(what_is_sent, name, exchange, expected)


def unequal_rows(build: type, *tokens: int) -> None:
    features = torch.ones(2 + dist.get_rank(), *tokens, 4)
    with pytest.raises(ValueError, match=r"same number of rows on every rank, got \[2, 3\]"):
        build()(features, features)


def labels_on_one_rank(build: type) -> None:
    labels = torch.arange(3) if dist.get_rank() == 1 else None
    with pytest.raises(ValueError, match=r"labels: .* on every rank or on none.*ranks \[0\]"):
        build()(torch.ones(3, 4), torch.ones(3, 4), labels=labels)


def learned_on_one_rank(name: str) -> None:
    given = {"documents": torch.ones(3, 4), "column_bias": torch.zeros(3)}
    given[name].requires_grad_(dist.get_rank() == 1)
    with pytest.raises(ValueError, match=rf"{name}: .* gradient .* got constants on ranks \[0\]"):
        RetrievalLoss()(torch.ones(3, 4), **given)


def documents_of_two_dtypes() -> None:
    q, dtype = torch.ones(3, 4), (torch.float32, torch.float64)[dist.get_rank()]
    with pytest.raises(ValueError, match="documents: expected the same width and dtype on every"):
        RetrievalLoss()(q, q.to(dtype))
    with pytest.raises(ValueError, match="documents: expected the same width and dtype on every"):
        InBatchDistillationLoss(teacher_scale=1.0)(q, q.to(dtype), q, q)


def negatives_on_one_rank(build: type) -> None:
    negatives = torch.ones(3, 2, 4) if dist.get_rank() == 1 else None
    with pytest.raises(ValueError, match=r"hard_negatives: .* every rank or on none.*ranks \[0\]"):
        build()(torch.ones(3, 4), torch.ones(3, 4), negatives)


def second_derivative(build: type, name: str, *tokens: int) -> None:
    q = torch.randn(3, *tokens, 4, requires_grad=True)
    loss = build()(q, torch.randn(3, *tokens, 4)).loss
    with pytest.raises(RuntimeError, match=f"{name}: expected one derivative, got a second one"):
        (gradient,) = torch.autograd.grad(loss, q, create_graph=True)
        gradient.square().sum().backward()


def refusals() -> Checks:
    losses = (ClipLoss, "clip_loss"), (SigLipLoss, "siglip_loss")
    tokens = (LateInteractionLoss, "late_interaction_loss", 2)
    for build, name, *more in (*losses, tokens):
        yield f"{name}: unequal rows", partial(unequal_rows, build, *more)
        yield f"{name}: second derivative", partial(second_derivative, build, name, *more)
    for name in ("documents", "column_bias"):
        yield f"{name} learned on one rank", partial(learned_on_one_rank, name)
    yield "documents of two dtypes", documents_of_two_dtypes
    for build in (InfoNCELoss, RetrievalLoss):
        yield f"{build.__name__}: negatives", partial(negatives_on_one_rank, build)
    for build, name in losses:
        yield f"{name}: labels on one rank", partial(labels_on_one_rank, build)


def in_two() -> Checks:
    yield "queue", negatives_of_a_queue
    yield "queue that does not divide", a_queue_that_does_not_divide
    yield from exact(CASES, "tiled")
    yield from exact(CASES, "reference")
    yield from exact(FEW, "tiled", dtype=torch.float32, tolerance=1e-5)
    yield from rounded_once()
    yield from single_gradients()
    yield from refusals()


def in_three() -> Checks:
    yield from exact(CASES, "tiled")
    yield from exact(FEW, "reference", exchanges=["gather"])
    yield from traffic()


def in_four() -> Checks:
    yield from exact(FEW, "tiled")
    for name in ("clip", "nt_xent", "siglip", "late_interaction"):
        check = partial(a_ring_holds_no_more_than_three_ranks_features, BY_NAME[name])
        yield f"{name}: held in a ring", check
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    yield from exact(FEW, "tiled", group=pairs[dist.get_rank() // 2])


def interpreted() -> Checks:
    """Gathered from three, the first rank's block of columns is that of two others."""
    names = (
        "clip",
        "nt_xent",
        "siglip",
        "siglip captions",
        "late_interaction masks",
        "max_sim masks",
    )
    cases = [BY_NAME[name] for name in names]
    fp32: dict[str, Any] = {"dtype": torch.float32, "tolerance": 1e-5}
    yield from exact(cases, "triton", exchanges=["gather"], **fp32)
    # Groups, a bias and a guide, of rows and columns that change places in the backward.
    ruled = (
        *("retrieval rules", "distillation in the batch", "max_sim packed own"),
        "matryoshka distillation in the batch",
    )
    yield from exact([BY_NAME[name] for name in ruled], "triton", exchanges=["ring"], **fp32)


@pytest.mark.distributed
@pytest.mark.parametrize(("world", "suite"), [(2, in_two), (3, in_three), (4, in_four)])
def test_in_processes(world: int, suite: Callable[[], Checks], tmp_path: Path) -> None:
    found = failures(suite, world, tmp_path)
    assert not found, "\n".join(found)


@pytest.mark.distributed
def test_kernels_in_the_interpreter(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, __file__, str(tmp_path)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("build", [ClipLoss, SigLipLoss, LateInteractionLoss])
def test_an_unknown_exchange_is_named(build: Any) -> None:
    with pytest.raises(ValueError, match="exchange: expected 'gather' or 'ring', got 'tree'"):
        build(exchange="tree")


if __name__ == "__main__":
    # Once for all three; the first call of an op imports torch._dynamo.
    for name in ("torch._dynamo", "fast_interpreter"):
        import_module(name)
    found = failures(interpreted, 3, Path(sys.argv[1]), start_method="fork")
    sys.exit("\n".join(found) or 0)
