"""Gradients of the sigmoid loss: what is computed, how often, and what autograd makes of it."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from clip_inputs import assert_each_subset, loss_and_gradients, relative_errors
from siglip_inputs import Inputs, labels_of, random_inputs
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gradcache_clip.ops import siglip, siglip_tiled
from gradcache_clip.ops.siglip import siglip_loss, siglip_loss_with_accuracy
from gradcache_clip.ops.siglip_tiled import SigmoidPass, Wanted
from gradcache_clip.ops.tiles import TileShape

SMALL = TileShape(rows=48, columns=80)
EVERYTHING = Wanted(True, True, True, True, True)

reference = partial(siglip_loss, impl="reference")
tiled = partial(siglip_loss, impl="tiled")


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    cut(monkeypatch, SMALL)


def cut(monkeypatch: pytest.MonkeyPatch, shape: TileShape) -> None:
    monkeypatch.setitem(siglip._PASSES, "tiled", partial(siglip_tiled.siglip_tiled, shape=shape))


def run_pass(inputs: Inputs, wanted: Wanted, labels: Any = None) -> SigmoidPass:
    with torch.no_grad():
        return siglip_tiled.siglip_tiled(*inputs, labels, wanted, shape=SMALL)


class CountProducts(TorchDispatchMode):
    """Counts operations, and remembers the largest tensor that any of them returned."""

    def __init__(self) -> None:
        super().__init__()
        self.products, self.largest = 0, 0
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_)
        self.names.add(func.overloadpacket.__name__)
        if isinstance(result, Tensor):
            self.largest = max(self.largest, result.numel())
        return result


@pytest.mark.parametrize(
    ("needs", "products"),
    [("qkst", 3), ("qst", 2), ("kst", 2), ("q", 2), ("st", 2), ("s", 2), ("t", 1), ("", 1)],
)
def test_no_product_that_nobody_asked_for(needs: str, products: int) -> None:
    wanted = Wanted(*(name in needs for name in "qkst"), accuracy=False)
    with CountProducts() as count:
        result = run_pass(random_inputs(20, 8, torch.float32), wanted)
    assert count.products == products
    assert [x is not None for x in result] == [True, *wanted, False]
    assert ("sigmoid_" in count.names) == bool(needs)
    assert "amax" not in count.names, "ranks are for the accuracy alone"


@pytest.mark.parametrize(("M", "N"), [(70, 130), (130, 70), (1, 3)])
def test_a_block_without_positives(M: int, N: int) -> None:
    """Nothing is compared, and the result is that of labels of which no two are equal."""
    inputs = tuple(x.detach() for x in random_inputs(M, 8, torch.float64, N=N))
    labels = torch.arange(M), torch.arange(N) + M
    expected = siglip_tiled.siglip_tiled(*inputs, labels, EVERYTHING, shape=SMALL)
    with CountProducts() as count:
        got = siglip_tiled.siglip_tiled(*inputs, None, EVERYTHING, paired=False, shape=SMALL)
    assert not count.names & {"eq", "neg_", "diagonal"}
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("labelled", [False, True])
def test_never_holds_the_matrix(labelled: bool) -> None:
    B, D = 600, 8
    inputs = random_inputs(B, D, torch.float32)
    labels = (labels_of(B), labels_of(B)) if labelled else None
    with CountProducts() as count:
        run_pass(inputs, EVERYTHING, labels)
    assert count.largest <= 1.1 * max(B * D, SMALL.rows * SMALL.columns) < B * B / 50
    with CountProducts() as count:
        reference(*inputs)
    assert count.largest == B * B


def spied(monkeypatch: pytest.MonkeyPatch) -> list[Wanted]:
    asked: list[Wanted] = []
    original = siglip._PASSES["tiled"]

    def spy(*arguments: Any, **options: Any) -> SigmoidPass:
        asked.append(arguments[-1])
        return original(*arguments, **options)

    monkeypatch.setitem(siglip._PASSES, "tiled", spy)
    return asked


def test_computes_only_what_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, inputs = spied(monkeypatch), random_inputs(9, 4, torch.float32)
    tiled(*inputs)
    with torch.no_grad():
        loss = siglip_loss(*inputs)
        siglip_loss_with_accuracy(*inputs)
    tiled(inputs.q.detach(), inputs.k, 1.0, inputs.logit_bias)
    assert not loss.requires_grad
    assert ["".join(str(int(flag)) for flag in wanted) for wanted in asked] == [
        "11110",
        "00000",
        "00001",
        "01010",
    ]


def test_gradients_wait_in_fp32_and_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, inputs = spied(monkeypatch), random_inputs(40, 8, torch.float16)
    loss = tiled(*inputs)
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    second = torch.autograd.grad(2 * loss, inputs, retain_graph=True)
    third = torch.autograd.grad(loss, inputs)
    assert len(asked) == 1
    for a, b, c in zip(first, second, third, strict=True):
        assert torch.equal(a, c), "a backward left the stored gradients as they were"
        torch.testing.assert_close(2 * a, b, rtol=1e-3, atol=1e-7)


def test_what_a_gradient_scaler_saves_is_not_lost_before() -> None:
    """Most gradients of the loss itself are below 6e-8, the least number of fp16."""
    inputs = random_inputs(64, 16, torch.float16, bias=-20.0)
    no_positives = torch.arange(64), torch.arange(64) + 64
    tiled_loss, truth = (partial(f, labels=no_positives) for f in (tiled, reference))
    unscaled = torch.autograd.grad(tiled_loss(*inputs), inputs.q)[0]
    assert unscaled.count_nonzero() < inputs.q.numel() / 2
    got = loss_and_gradients(tiled_loss, inputs, outer=2.0**24)
    expected = loss_and_gradients(truth, inputs.to(torch.float64), outer=2.0**24)
    assert max(relative_errors(got, expected)) < 1e-3


@pytest.mark.parametrize("labelled", [False, True])
def test_gradcheck(monkeypatch: pytest.MonkeyPatch, labelled: bool) -> None:
    cut(monkeypatch, TileShape(2, 3))
    inputs = random_inputs(7, 5, torch.float64, scale=3.0, bias=-1.0)
    labels = labels_of(7, 4) if labelled else None
    torch.autograd.gradcheck(partial(tiled, labels=labels), tuple(inputs))
    torch.autograd.gradgradcheck(partial(reference, labels=labels), tuple(inputs))


def test_each_subset_of_gradients() -> None:
    inputs = random_inputs(65, 16, torch.float64)
    assert_each_subset(tiled, inputs, rtol=1e-11, atol=1e-15)


def test_gradients_have_the_dtype_of_their_inputs() -> None:
    q = torch.randn(5, 4, dtype=torch.bfloat16, requires_grad=True)
    k = torch.randn(5, 4, dtype=torch.float32, requires_grad=True)
    scale = torch.ones(1, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros((), dtype=torch.float16, requires_grad=True)
    loss = tiled(q, k, scale, bias)
    loss.backward()
    assert loss.dtype == torch.float32
    assert [x.grad.dtype for x in (q, k, scale, bias)] == [x.dtype for x in (q, k, scale, bias)]
    torch.testing.assert_close(loss, siglip_loss(q.float(), k, 1.0, 0.0, impl="reference"))


def test_non_contiguous_features_and_shared_tensor() -> None:
    q = torch.randn(8, 20, dtype=torch.float64).T.requires_grad_()
    got = torch.autograd.grad(tiled(q, q, 2.0, -1.0), q)
    expected = torch.autograd.grad(reference(q, q, 2.0, -1.0), q)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-14)


def test_exact_under_autocast() -> None:
    inputs = random_inputs(65, 33, torch.float32)
    expected = loss_and_gradients(tiled, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = loss_and_gradients(tiled, inputs)
        under_autocast = reference(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert torch.equal(under_autocast, reference(*inputs))


def test_second_derivative_is_refused() -> None:
    inputs = random_inputs(5, 4, torch.float64)
    loss = tiled(*inputs)
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()
    for x in inputs:
        (gradient,) = torch.autograd.grad(tiled(*inputs), x, create_graph=True)
        assert gradient.requires_grad, "it must not pass for a constant"
        with pytest.raises(RuntimeError, match="siglip_loss: expected one derivative.*reference"):
            gradient.square().sum().backward()


# torch's own modules for forward mode script functions on their first import.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_transforms_are_refused() -> None:
    q, k, scale, bias = (x.detach() for x in random_inputs(5, 4, torch.float64))
    with pytest.raises(RuntimeError, match="siglip_loss: expected ordinary tensors"):
        torch.func.grad(lambda q: tiled(q, k, scale, bias))(q)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="ordinary tensors"):
        tiled(q, k, scale, forward_ad.make_dual(bias, bias))
    torch.func.grad(lambda q: reference(q, k, scale, bias))(q)


@pytest.mark.parametrize("labelled", [False, True])
def test_compiles_whole(labelled: bool) -> None:
    inputs = random_inputs(65, 16, torch.float32)
    labels = labels_of(65) if labelled else None
    expected = siglip_loss_with_accuracy(*inputs, labels=labels)
    gradients = torch.autograd.grad(expected.loss, inputs)
    compiled = torch.compile(siglip_loss_with_accuracy, fullgraph=True, backend="aot_eager")
    got = compiled(*inputs, labels=labels)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    for a, b in zip(torch.autograd.grad(got.loss, inputs), gradients, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("wanted", [[True] * 5, [False] * 5, [False, True, False, True, False]])
@pytest.mark.parametrize("labelled", [False, True])
def test_fake_kernels_tell_the_truth(wanted: list[bool], labelled: bool) -> None:
    q, k, scale, bias = (x.detach() for x in random_inputs(20, 8, torch.float16))
    labels = (labels_of(20), labels_of(20)) if labelled else (None, None)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(
        torch.ops.gradcache_clip.siglip.default,
        (q, k, scale, bias, *labels, wanted, "tiled"),
        test_utils=checks,
    )
    gradient = torch.randn(20, 8)
    torch.library.opcheck(
        torch.ops.gradcache_clip.attach_gradient.default, (scale, q.requires_grad_(), gradient)
    )
    torch.library.opcheck(
        torch.ops.gradcache_clip.scale_gradient.default, (gradient, scale, q), test_utils=checks
    )


def test_each_stored_gradient_goes_once_it_is_used() -> None:
    inputs = random_inputs(9, 4, torch.float32)
    loss = tiled(inputs.q, inputs.k, 1.0, 0.0)
    node_of_k = loss.grad_fn
    node_of_q = node_of_k.next_functions[0][0]
    seen = []

    def look(_: Tensor) -> None:
        with pytest.raises(RuntimeError, match="freed"):
            _ = node_of_k.saved_tensors
        seen.append(len(node_of_q.saved_tensors))

    inputs.k.register_post_accumulate_grad_hook(look)
    loss.backward()
    assert seen == [2]


def test_runs_are_bit_equal() -> None:
    inputs = random_inputs(252, 33, torch.bfloat16)
    first, second = (loss_and_gradients(tiled, inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
