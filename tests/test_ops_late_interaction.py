"""Late interaction: the reference against the paper, and what the public function promises."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from clip_inputs import loss_and_gradients, relative_errors
from late_interaction_inputs import (
    OPTIONS,
    TokenInputs,
    paper_loss,
    random_mask,
    random_masks,
    token_inputs,
)
from torch import Tensor
from torch.nn.functional import cross_entropy

from gradcache_clip.ops import ContrastiveOutput, late_interaction_op
from gradcache_clip.ops import late_interaction as module
from gradcache_clip.ops.late_interaction import (
    late_interaction_loss,
    late_interaction_loss_with_accuracy,
)
from gradcache_clip.ops.late_interaction_op import TokenRules

reference = partial(late_interaction_loss, impl="reference")
tiled = partial(late_interaction_loss, impl="tiled")


@pytest.mark.parametrize("impl", ["reference", "tiled"])
@pytest.mark.parametrize("options", OPTIONS)
def test_equals_the_equations(impl: Any, options: dict[str, Any]) -> None:
    inputs = token_inputs(9, 5, 4, 6, scale=4.0)
    masks = random_masks(inputs)
    expected = paper_loss(inputs.images, inputs.texts, 4.0, *masks.values(), **options)
    got = late_interaction_loss(*inputs, **masks, **options, impl=impl)
    assert got.item() == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("impl", ["reference", "tiled"])
def test_one_token_each_is_the_clip_loss(impl: Any) -> None:
    inputs = token_inputs(11, 1, 1, 6)
    logits = inputs.logit_scale * inputs.images[:, 0] @ inputs.texts[:, 0].T
    labels = torch.arange(11)
    expected = (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2
    torch.testing.assert_close(late_interaction_loss(*inputs, impl=impl), expected)


@pytest.mark.parametrize("impl", ["reference", "tiled"])
def test_padding_changes_nothing(impl: Any) -> None:
    """Right or left of the tokens, huge or not even a number: as if it were not there."""
    inputs = token_inputs(6, 5, 4, 8)
    expected = loss_and_gradients(partial(late_interaction_loss, impl=impl), inputs)
    images, texts = (
        torch.full((6, T, 8), filling, dtype=torch.float64)
        for T, filling in ((9, 1e30), (7, math.nan))
    )
    images[:, :5], texts[:, 3:] = inputs.images.detach(), inputs.texts.detach()
    padded = TokenInputs(images, texts, inputs.logit_scale).to(torch.float64)
    masks = {
        "image_mask": (torch.arange(9) < 5).expand(6, 9),
        "text_mask": (torch.arange(7) >= 3).expand(6, 7),
    }
    got = loss_and_gradients(partial(late_interaction_loss, **masks, impl=impl), padded)
    assert got[1][:, 5:].abs().max() == got[2][:, :3].abs().max() == 0
    kept = [got[0], got[1][:, :5], got[2][:, 3:], got[3]]
    assert max(relative_errors(kept, expected)) < 1e-12


def test_a_mask_equals_the_trimmed_sample() -> None:
    """Samples of different lengths, each scored without its padding in a loop."""
    inputs = token_inputs(5, 6, 5, 8, scale=3.0)
    masks = random_masks(inputs)
    expected = paper_loss(inputs.images, inputs.texts, 3.0, *masks.values())
    assert tiled(*inputs, **masks).item() == pytest.approx(expected, rel=1e-13)
    assert tiled(*inputs).item() != pytest.approx(expected, rel=1e-3)


def test_of_equal_maxima_the_first_token_gets_the_gradient() -> None:
    images = torch.tensor([[[1.0, 0.0], [1.0, 0.0]], [[0.0, 1.0], [0.0, 1.0]]])
    texts = torch.tensor(
        [[[0.0, 0.0], [1.0, 0.0], [1.0, 0.0]], [[0.5, 0.5], [0.0, 1.0], [0.0, 1.0]]]
    )
    inputs = TokenInputs(images, texts, torch.tensor(2.0)).to(torch.float64)
    for options in ({}, {"text_mask": torch.tensor([[False, True, True]] * 2)}):
        got = loss_and_gradients(partial(tiled, one_way=True, **options), inputs)
        assert got[1][:, 0].abs().sum() > 0 and got[1][:, 1].abs().sum() == 0
        got = loss_and_gradients(partial(tiled, **options), inputs)
        expected = loss_and_gradients(partial(reference, **options), inputs)
        torch.testing.assert_close(got, expected)


def test_accuracies_count_ranks_and_ties_are_wrong() -> None:
    tokens = torch.eye(8).view(4, 2, 8)
    # Text 2 ties between images 1 and 2, text 3 belongs to image 0; image 2 ties with texts 1, 2.
    texts = torch.stack([tokens[0], tokens[1], tokens[1] + tokens[2], tokens[0] * 2])
    for impl in ("reference", "tiled"):
        result = late_interaction_loss_with_accuracy(tokens, texts, 10.0, impl=impl)
        assert isinstance(result, ContrastiveOutput)
        # Image 0 prefers text 3, 1 ties with text 2, 2 is right, 3 finds nothing.
        assert result.image_to_text_accuracy.item() == 0.25
        assert result.text_to_image_accuracy.item() == 0.5
        assert not result.image_to_text_accuracy.requires_grad
        assert not result.text_to_image_accuracy.requires_grad


@pytest.mark.parametrize("options", OPTIONS)
def test_accuracies_equal_the_reference(options: dict[str, Any]) -> None:
    images, noise, scale = token_inputs(30, 3, 3, 8)
    got, expected = (
        late_interaction_loss_with_accuracy(images, images + noise, scale, **options, impl=impl)
        for impl in ("tiled", "reference")
    )
    assert 0 < got.image_to_text_accuracy < 1 and 0 < got.text_to_image_accuracy < 1
    assert got[1:] == expected[1:]


def test_batch_of_one_has_loss_zero() -> None:
    inputs = token_inputs(1, 4, 3, 8, torch.float32)
    assert [tensor.abs().max().item() for tensor in loss_and_gradients(tiled, inputs)] == [0.0] * 4
    assert late_interaction_loss_with_accuracy(*inputs).image_to_text_accuracy == 1


def test_reference_is_differentiable_twice() -> None:
    inputs = token_inputs(3, 2, 3, 4, scale=3.0)
    assert torch.autograd.gradgradcheck(partial(reference, **random_masks(inputs)), tuple(inputs))


@pytest.mark.parametrize("impl", ["reference", "tiled"])
def test_no_overflow_at_scale_100(impl: Any) -> None:
    """exp of a logit of 100 is infinite in fp32: without the running maximum so is the loss."""
    tokens = token_inputs(12, 4, 4, 8, torch.float32, scale=100.0).images
    inputs = TokenInputs(tokens, tokens.detach().flip(0), torch.tensor(100.0)).to(torch.float32)
    scores = torch.einsum("ipd,jrd->ijpr", inputs.images, inputs.texts).amax(3).mean(2)
    assert torch.exp(100.0 * scores).sum(1).isinf().any()
    got = loss_and_gradients(partial(late_interaction_loss, impl=impl), inputs)
    truth = loss_and_gradients(reference, inputs.to(torch.float64))
    assert got[0] > 10
    assert max(relative_errors(got, truth)) < 1e-5


def test_gradients_have_the_dtype_of_their_inputs() -> None:
    images = torch.randn(5, 3, 4, dtype=torch.bfloat16, requires_grad=True)
    texts = torch.randn(5, 2, 4, dtype=torch.float32, requires_grad=True)
    scale = torch.ones(1, dtype=torch.float64, requires_grad=True)
    loss = tiled(images, texts, scale)
    loss.backward()
    assert loss.dtype == torch.float32
    assert [x.grad.dtype for x in (images, texts, scale)] == [
        x.dtype for x in (images, texts, scale)
    ]
    torch.testing.assert_close(loss, reference(images.float(), texts, 1.0))
    assert late_interaction_loss(images, texts.half(), 1.0).dtype == torch.float32


def test_non_contiguous_and_shared_tokens() -> None:
    tokens = torch.randn(3, 8, 6, dtype=torch.float64).transpose(0, 1).requires_grad_()
    mask = random_mask(3, 8).T
    mask[:, 0] = True
    got, expected = (
        torch.autograd.grad(loss(tokens, tokens, 2.0, text_mask=mask), tokens)
        for loss in (tiled, reference)
    )
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-14)


def test_exact_under_autocast() -> None:
    inputs = token_inputs(20, 4, 3, 16, torch.float32)
    expected = loss_and_gradients(tiled, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = loss_and_gradients(tiled, inputs)
        under_autocast = reference(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert torch.equal(under_autocast, reference(*inputs))


@pytest.mark.parametrize("masked", [False, True])
def test_compiles_without_a_break(masked: bool) -> None:
    inputs = token_inputs(9, 4, 3, 8)
    masks = random_masks(inputs) if masked else {}

    @partial(torch.compile, backend="aot_eager", fullgraph=True)
    def step(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
        return 2 * tiled(images * 1.5, texts, scale.exp() / 1e4, **masks)

    def eager(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
        return 2 * tiled(images * 1.5, texts, scale.exp() / 1e4, **masks)

    got, expected = (loss_and_gradients(each, inputs) for each in (step, eager))
    assert max(relative_errors(got, expected)) < 1e-14


def test_registered_as_torch_wants_it() -> None:
    inputs = token_inputs(5, 3, 2, 4)
    masks = random_masks(inputs)
    for mask in (None, masks["text_mask"]):
        for one_way in (False, True):
            masks_and_numbers = TokenRules(None, mask, one_way, "mean").packed()
            arguments = (*inputs, *masks_and_numbers, "tiled", "late_interaction_loss", None)
            torch.library.opcheck(late_interaction_op._statistics, arguments)


def test_second_derivative_and_transforms_are_refused() -> None:
    images, texts, scale = token_inputs(5, 3, 2, 4)
    (first,) = torch.autograd.grad(tiled(images, texts, scale), images, create_graph=True)
    with pytest.raises(RuntimeError, match="late_interaction_loss: expected one derivative"):
        first.square().sum().backward()
    with pytest.raises(RuntimeError, match="late_interaction_loss: expected ordinary tensors"):
        torch.func.grad(tiled)(images.detach(), texts.detach(), scale.detach())
    assert torch.func.grad(reference)(images, texts, scale).shape == images.shape


def test_auto_is_tiled_on_the_cpu_and_inference_needs_no_graph() -> None:
    inputs = token_inputs(20, 3, 4, 8, torch.float32)
    with torch.no_grad():
        loss = late_interaction_loss(*inputs)
    assert not loss.requires_grad
    assert torch.equal(loss, tiled(*inputs))


def test_shapes_without_data() -> None:
    images = torch.empty(300, 5, 16, device="meta", requires_grad=True)
    mask = torch.empty(300, 5, dtype=torch.bool, device="meta")
    for impl in ("reference", "tiled"):
        loss = late_interaction_loss(images, images[:, :3], 1.0, image_mask=mask, impl=impl)
        images.grad = None
        loss.backward()
        assert loss.shape == () and images.grad is not None and images.grad.is_meta


@pytest.mark.parametrize("options", OPTIONS)
def test_a_sample_without_tokens_scores_zero(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """Where the mask cannot be seen without waiting: no NaN, no gradient for the sample."""
    monkeypatch.setattr(module, "_readable", lambda mask: False)
    inputs = token_inputs(8, 3, 4, 5)
    masks = random_masks(inputs)
    masks["image_mask"][2], masks["text_mask"][5] = False, False
    got, expected = (
        loss_and_gradients(partial(each, **masks, **options), inputs) for each in (tiled, reference)
    )
    assert all(tensor.isfinite().all() for tensor in got)
    assert max(relative_errors(got, expected)) < 1e-12
    assert got[1][2].abs().max() == got[2][5].abs().max() == 0


TOKENS = torch.ones(3, 2, 4)

MASK = torch.ones(3, 2, dtype=torch.bool)

EMPTY = MASK & torch.tensor([[True], [False], [True]])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([[1.0]], TOKENS), TypeError, "image_tokens: expected a tensor, got list"),
        ((TOKENS, TOKENS.bool()), TypeError, "text_tokens: expected float16"),
        ((TOKENS[0], TOKENS), ValueError, r"image_tokens: .*\(B, tokens, D\).*\(2, 4\)"),
        ((TOKENS[:, :0], TOKENS), ValueError, "image_tokens: expected a non-empty"),
        ((TOKENS, TOKENS[:2]), ValueError, r"text_tokens: .*\(3, any, 4\).*got \(2, 2, 4\)"),
        ((TOKENS, TOKENS[..., :2]), ValueError, r"text_tokens: .*got \(3, 2, 2\).*same width"),
        ((TOKENS, TOKENS.to("meta")), ValueError, "text_tokens: expected device cpu, got meta"),
    ],
)
def test_bad_tokens_are_named(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        late_interaction_loss(*arguments, 1.0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"image_mask": MASK.float()}, TypeError, "image_mask: expected a bool.*float32.*bool()"),
        ({"text_mask": [True]}, TypeError, "text_mask: expected a bool tensor.*got list"),
        ({"text_mask": MASK[:2]}, ValueError, r"text_mask: .*\(3, 2\), got \(2, 2\)"),
        ({"text_mask": MASK.to("meta")}, ValueError, "text_mask: expected device cpu, got meta"),
        ({"image_mask": EMPTY}, ValueError, "image_mask: .*got none in sample 1; drop the pair"),
        ({"token_reduction": "max"}, ValueError, 'token_reduction: expected "mean" or "sum"'),
        ({"impl": "cuda"}, ValueError, "impl: expected .*got 'cuda'"),
    ],
)
def test_bad_options_are_named(options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        late_interaction_loss(TOKENS, TOKENS, 1.0, **options)


def test_what_cannot_run_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r'got "triton", but .*; impl="tiled" runs on cpu'):
        late_interaction_loss(TOKENS.double(), TOKENS.double(), 1.0, impl="triton")
    with pytest.raises(TypeError, match="logit_scale: expected a number"):
        late_interaction_loss(TOKENS, TOKENS, "1")  # type: ignore[arg-type]
