"""The late-interaction kernels against the reference: in Triton's interpreter, or on a GPU.

test_kernels.py runs this file in a process of its own, because Triton decides at its first import
whether kernels are interpreted.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from clip_inputs import (
    ROUNDED_LOGIT,
    assert_each_subset,
    loss_and_gradients,
    poisoned_memory,
    relative_errors,
)
from late_interaction_inputs import (
    OPTIONS,
    TokenInputs,
    clustered_tokens,
    errors_without_positives,
    plain_loss,
    random_masks,
    token_inputs,
)
from torch import Tensor
from torch.nn.functional import normalize

from gradcache_clip import LateInteractionLoss, MaxSimDistillationLoss, MaxSimLoss
from gradcache_clip.kernels import late_interaction as kernels
from gradcache_clip.kernels.launch_config import INTERPRETED, LaunchConfig, launch_config
from gradcache_clip.ops.late_interaction import (
    late_interaction_loss,
    late_interaction_loss_with_accuracy,
)

DEVICE = "cpu" if INTERPRETED else "cuda"
# Products of bfloat16 in the interpreter are silently wrong; on a GPU it stands for both, whose
# kernels differ in one conversion.
DTYPES = [torch.float32, torch.float16 if INTERPRETED else torch.bfloat16]

reference = partial(late_interaction_loss, impl="reference")
triton = partial(late_interaction_loss, impl="triton")


def check(inputs: TokenInputs, options: dict[str, Any], *, outer: float = 1.0) -> None:
    dtype = inputs.images.dtype
    with poisoned_memory():
        got = loss_and_gradients(partial(triton, **options), inputs, outer=outer)
    exact = inputs.to(torch.float64)
    expected = loss_and_gradients(partial(reference, **options), exact, outer=outer)
    tolerance = 8 * torch.finfo(dtype).eps + ROUNDED_LOGIT
    for value, want in zip(got, expected, strict=True):
        assert value.isfinite().all()
        scale = want.abs().max().clamp_min(1e-2)
        assert ((value - want).abs().max() / scale).item() < tolerance


SHAPES = [(1, 3, 2, 3), (2, 1, 1, 3), (7, 16, 5, 16), (5, 17, 33, 24), (9, 2, 7, 123)]


@pytest.mark.parametrize(
    ("shape", "options", "dtype"),
    [(shape, options, torch.float32) for shape in SHAPES for options in [None, *OPTIONS]]
    + [(SHAPES[-1], OPTIONS[0], dtype) for dtype in DTYPES[1:]],
)
def test_equals_the_reference(
    shape: tuple[int, ...], options: dict[str, Any] | None, dtype: torch.dtype
) -> None:
    """Without masks, and with them in every setting."""
    inputs = token_inputs(*shape, dtype, scale=5.0, device=DEVICE)
    check(inputs, {} if options is None else options | random_masks(inputs), outer=-2.5)


def test_strided_tokens_and_masks() -> None:
    inputs = token_inputs(6, 4, 5, 16, torch.float32, device=DEVICE)
    masks = {name: mask.T.contiguous().T for name, mask in random_masks(inputs).items()}
    images = inputs.images.detach().transpose(0, 1).contiguous().transpose(0, 1)
    assert not images.is_contiguous() and not masks["image_mask"].is_contiguous()
    check(inputs._replace(images=images.requires_grad_()), masks)


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Several stripes, panels, tiles and pieces, and a count of what was launched."""
    tiles = LaunchConfig(32, 32, 32, num_warps=4, num_stages=1, GROUP_M=2, workspace_bytes=16384)
    monkeypatch.setattr(kernels, "token_config", lambda features, **way: tiles)
    count: Counter[str] = Counter()
    for name in ("_launch_maxima", "dsimilarity"):
        original = getattr(kernels.TokenPanels, name)

        def counted(self: Any, *args: Any, name: str = name, original: Any = original) -> Any:
            count[name] += 1
            return original(self, *args)

        monkeypatch.setattr(kernels.TokenPanels, name, counted)
    return count


@pytest.mark.parametrize(
    ("options", "dtype"),
    [*((each, torch.float32) for each in OPTIONS), *(({}, dtype) for dtype in DTYPES[1:])],
)
def test_several_stripes_panels_and_pieces(
    options: dict[str, Any], dtype: torch.dtype, narrow: Counter[str]
) -> None:
    inputs = token_inputs(4, 33, 19, 40, dtype, device=DEVICE)
    tokens = inputs.images.detach(), inputs.texts.detach()
    panels = kernels.TokenPanels(*tokens, both_ways=True, samples=4)
    assert (panels.block_p, panels.block_r, panels._pieces()) == (16, 32, (3, 1))
    images, texts = panels.shape
    count = math.ceil(4 / images) * math.ceil(4 / texts)
    assert images < 4 and texts < 4
    check(inputs, options | random_masks(inputs))
    assert narrow == {"_launch_maxima": 2 * count, "dsimilarity": count}


@pytest.mark.parametrize(("images", "texts"), [(3, 7), (7, 3)])
@pytest.mark.parametrize("one_way", [False, True])
def test_a_block_without_positives(
    images: int, texts: int, one_way: bool, narrow: Counter[str]
) -> None:
    dtype = torch.float32
    inputs = token_inputs(7, 9, 17, 16, dtype, device=DEVICE)
    inputs = TokenInputs(inputs.images[:images], inputs.texts[:texts], inputs.logit_scale)
    errors = errors_without_positives(inputs, "triton", one_way=one_way, texts_first=False)
    assert max(errors) < 8 * torch.finfo(dtype).eps + 1e-5
    assert narrow["_launch_maxima"] > 2


@pytest.mark.parametrize(
    ("one_way", "dtype"), [(True, torch.float32), *((False, dtype) for dtype in DTYPES)]
)
@pytest.mark.parametrize("cosine", [-0.6, 0.0, 0.9])
def test_error_budget(dtype: torch.dtype, cosine: float, one_way: bool) -> None:
    """No further from fp64 than plain PyTorch in the same dtype, plus a few roundings."""
    inputs = clustered_tokens(cosine, 9, 7, 5, 64, dtype, device=DEVICE)
    loss, plain = (partial(each, one_way=one_way) for each in (triton, plain_loss))
    truth = loss_and_gradients(partial(reference, one_way=one_way), inputs.to(torch.float64))
    budget = relative_errors(loss_and_gradients(plain, inputs), truth)
    got = relative_errors(loss_and_gradients(loss, inputs), truth)
    tolerance = 4 * torch.finfo(dtype).eps + ROUNDED_LOGIT
    assert all(error <= allowed + tolerance for error, allowed in zip(got, budget, strict=True))
    assert max(got[0], got[3]) < 1e-5


def test_each_subset_of_gradients() -> None:
    inputs = token_inputs(4, 3, 4, 16, torch.float32, device=DEVICE)
    assert_each_subset(triton, inputs, rtol=1e-4, atol=1e-7)


def test_of_equal_maxima_the_first_token_gets_the_gradient(narrow: Counter[str]) -> None:
    """Within a piece, and between pieces."""
    inputs = token_inputs(4, 3, 40, 16, torch.float32, device=DEVICE)
    texts = inputs.texts.detach().clone()
    texts[:, 5] = texts[:, 35] = texts[:, 2]
    got = loss_and_gradients(triton, inputs._replace(texts=texts.requires_grad_()))
    expected = loss_and_gradients(reference, inputs._replace(texts=texts))
    assert max(relative_errors(got, expected)) < 1e-5
    one_way = partial(triton, one_way=True)
    mirrored = TokenInputs(texts, inputs.images, inputs.logit_scale)
    gradient = loss_and_gradients(one_way, mirrored)[1]
    assert gradient[:, 2].abs().sum() > 0
    assert gradient[:, 5].abs().sum() == gradient[:, 35].abs().sum() == 0


def test_accuracies_count_ranks_and_ties_are_wrong() -> None:
    tokens = torch.eye(8, device=DEVICE).view(4, 2, 8)
    texts = torch.stack([tokens[0], tokens[1], tokens[1] + tokens[2], tokens[0] * 2])
    result = late_interaction_loss_with_accuracy(tokens, texts, 10.0, impl="triton")
    assert result.image_to_text_accuracy.item() == 0.25
    assert result.text_to_image_accuracy.item() == 0.5


def test_rules_of_who_competes() -> None:
    inputs, number = token_inputs(10, 3, 4, 16, torch.float32, device=DEVICE), torch.arange(10)
    rules = {"ids": number % 4, "groups": number % 3, "column_bias": number.sin()}
    rules = {name: each.to(DEVICE) for name, each in rules.items()}
    got, expected = (
        loss_and_gradients(
            lambda *x, impl=impl: LateInteractionLoss(impl=impl)(*x, **rules).loss, inputs
        )
        for impl in ("triton", "reference")
    )
    assert max(relative_errors(got, expected)) < 1e-5


OWN = {"symmetric": True, "share_hard_negatives": False, "token_reduction": "mean"}
# Cut into pieces of 16 tokens of documents and 32 of queries, as above: nothing else to compile.
LENGTHS = {
    "query_lengths": torch.tensor([32, 25, 60, 31, 29]),
    "document_lengths": torch.tensor([1, 40, 12, 70, 16]),
    "hard_negative_lengths": torch.tensor([[7, 33], [1, 2], [16, 3], [45, 9], [8, 5]]),
}


def packed_tokens(dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Tensor]]:
    tokens = [torch.randn(int(each.sum()), 40) for each in LENGTHS.values()]
    tokens = [normalize(each, dim=1).to(DEVICE, dtype).requires_grad_() for each in tokens]
    return tokens, {name: each.to(DEVICE) for name, each in LENGTHS.items()}


def counting_tokens(dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Queries and documents hold tokens that count and may not be found, and the reverse."""
    shapes, found = {"query": (5, 60), "document": (5, 26), "hard_negative": (5, 2, 9)}, {}
    tokens = [normalize(torch.randn(*shape, 40), dim=-1) for shape in shapes.values()]
    for name, (_, *_, T) in shapes.items():
        found[f"{name}_mask"] = (torch.rand(shapes[name]) < 0.9) & (torch.arange(T) < 0.55 * T)
    for name in ("query", "document"):
        found[f"{name}_counts"] = found[f"{name}_mask"].flip(1) | (torch.rand(5, 1) < 0.5)
    leaves = [each.to(DEVICE, dtype).requires_grad_() for each in tokens]
    return leaves, {name: each.to(DEVICE) for name, each in found.items()}


def check_packed(
    build: Any, leaves: list[Tensor], options: dict[str, Tensor], scores: Tensor | None = None
) -> None:
    def outputs(impl: str, dtype: torch.dtype) -> list[Tensor]:
        given = [each.detach().to(dtype).requires_grad_() for each in leaves]
        scale = torch.tensor(5.0, device=DEVICE, dtype=torch.promote_types(dtype, torch.float32))
        given.append(scale.requires_grad_())
        taught = [] if scores is None else [scores.to(scale)]
        loss = build(impl=impl, normalize=False)(*given[:3], *taught, given[3], **options).loss
        return [loss.detach(), *torch.autograd.grad(-2.5 * loss, given)]

    with poisoned_memory():
        got = outputs("triton", leaves[0].dtype)
    errors = relative_errors(got, outputs("reference", torch.float64))
    assert max(errors) < 8 * torch.finfo(leaves[0].dtype).eps + ROUNDED_LOGIT, errors


@pytest.mark.parametrize(
    ("make", "options", "dtype"),
    [
        (packed_tokens, {"token_reduction": "mean"}, torch.float32),
        (packed_tokens, OWN, torch.float32),
        (counting_tokens, {"symmetric": True}, torch.float32),
        *((packed_tokens, {"symmetric": True}, dtype) for dtype in DTYPES[1:]),
    ],
)
def test_tokens_of_any_number(
    make: Any, options: dict[str, Any], dtype: torch.dtype, narrow: Counter[str]
) -> None:
    check_packed(partial(MaxSimLoss, **options), *make(dtype))
    assert narrow["_launch_maxima"] > 20


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("side", [0, 1])
def test_nan_in_packed_tokens_reaches_the_loss(side: int, narrow: Counter[str]) -> None:
    leaves, lengths = packed_tokens(torch.float32)
    queries, documents, _ = (each.detach() for each in leaves)
    (queries, documents)[side][-1] = math.nan
    lengths.pop("hard_negative_lengths")
    assert MaxSimLoss(impl="triton")(queries, documents, **lengths).loss.isnan()


@pytest.mark.parametrize(
    ("workspace", "dtype"),
    [
        (2**14, torch.float32),
        (2**18, torch.float32),
        pytest.param(
            *(2**18, torch.float16),
            marks=pytest.mark.skipif(not INTERPRETED, reason="one more kernel to compile"),
        ),
    ],
)
def test_scores_of_own_candidates(
    workspace: int, dtype: torch.dtype, narrow: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A query or less in a launch, and three or the last two."""
    tiles = replace(
        kernels.token_config(torch.empty(0), both_ways=False), workspace_bytes=workspace
    )
    monkeypatch.setattr(kernels, "token_config", lambda features, **way: tiles)
    leaves, lengths = packed_tokens(dtype)
    build = partial(MaxSimDistillationLoss, "margin_mse")
    check_packed(build, leaves, lengths, torch.randn(5, 3, device=DEVICE))
    launches = {2**14: 5 + 5, 2**18: 2 + 2}[workspace]
    assert narrow == {"_launch_maxima": 2 * launches, "dsimilarity": launches}


def test_small_gradients_survive_float16() -> None:
    """Every weight is about exp(-16) / 2, where fp16 has two bits; the loss is scaled by 1e5."""
    tokens = torch.eye(16, dtype=torch.float16, device=DEVICE).view(8, 2, 16)
    scale = torch.tensor(16.0, device=DEVICE)
    inputs = TokenInputs(tokens, tokens.clone(), scale).to(torch.float16)
    got = loss_and_gradients(triton, inputs, outer=1e5)
    expected = loss_and_gradients(reference, inputs.to(torch.float64), outer=1e5)
    assert max(relative_errors(got, expected)) < 2e-3


def test_runs_are_bit_equal() -> None:
    inputs = token_inputs(9, 5, 4, 33, torch.float16, device=DEVICE)
    first, second = (loss_and_gradients(triton, inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_exact_under_autocast() -> None:
    inputs = token_inputs(12, 5, 4, 33, torch.float32, device=DEVICE)
    expected = loss_and_gradients(triton, inputs)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        got = loss_and_gradients(triton, inputs)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


# NumPy warns of the NaN in the interpreter.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("one_way", [False, True])
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_infinity_reach_the_loss(bad: float, side: int, one_way: bool) -> None:
    inputs = [x.detach().clone() for x in token_inputs(5, 3, 4, 16, torch.float32, device=DEVICE)]
    inputs[side][2, 1, 3] = bad
    # Not through all of its similarities: a maximum on the device passes over NaN.
    inputs[1 - side][..., 3] = 0
    assert not triton(*inputs, one_way=one_way).isfinite()


def test_what_cannot_run_is_refused() -> None:
    tokens = torch.eye(3, device=DEVICE)[None]
    with pytest.raises(RuntimeError, match="kernels have no float64"):
        triton(tokens.double(), tokens.double(), 1.0)


def test_panels_stay_within_the_workspace() -> None:
    config = launch_config(torch.empty(1, device=DEVICE))
    for B in (1, 100, 10_000, 1_000_000):
        for P, R in ((1, 1), (49, 32), (577, 77), (4096, 4096)):
            for itemsize in (2, 4):
                images, texts = kernels.panel_shape(config, B, B, P, R, itemsize)
                assert 1 <= images <= B and 1 <= texts <= B
                for taken in (itemsize * P * R * texts, 32 * (P + R) * texts, 24 * B):
                    assert images * taken <= config.workspace_bytes or images == 1


def test_pieces_waste_little() -> None:
    lengths = {1: 16, 17: 32, 32: 32, 49: 64, 77: 16, 196: 32, 577: 128, 100_000: 128}
    for tokens, length in lengths.items():
        assert kernels.piece_length([tokens], 256) == length
    assert kernels.piece_length([577], 64) == 64
    assert kernels.piece_length([100, 4], 256) == 16
    assert kernels.piece_length([0, 17, 32], 256) == 32
