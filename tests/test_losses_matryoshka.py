"""MatryoshkaLoss against the wrapped loss, called once for each normalised prefix."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from gradcache_clip import (
    ClipLoss,
    FeatureQueue,
    GradCache,
    InBatchDistillationLoss,
    InfoNCELoss,
    LateInteractionLoss,
    MaxSimDistillationLoss,
    MoCoLoss,
    NTXentLoss,
    ScoreDistillationLoss,
    SupConLoss,
)
from gradcache_clip.losses import in_batch_distillation
from gradcache_clip.losses.matryoshka import MatryoshkaLoss
from gradcache_clip.losses.siglip import SigLipLoss
from gradcache_clip.ops import contrast

B, D, K = 24, 20, 3
LABELS, IDS = torch.arange(B) % 7, torch.arange(B) % 11


TEACHER = dict(
    zip(
        ("teacher_queries", "teacher_documents"),
        torch.randn(2, B, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
        strict=True,
    )
)
SCORES = {"scores": TEACHER["teacher_queries"][:, : 1 + K]}


class Triplet(nn.Module):
    """A loss of a person's own, which returns a tensor."""

    feature_arguments = "anchors", "positives"

    def forward(self, anchors: Tensor, positives: Tensor, *, margin: float = 0.5) -> Tensor:
        far = anchors @ positives.T + margin - (anchors * positives).sum(1, keepdim=True)
        return far.relu().mean()


# The loss, the shapes of its features, its other options, and whether all widths share one pass.
LOSSES: dict[str, tuple[Callable[[], nn.Module], list[tuple[int, ...]], dict[str, Any], bool]] = {
    "clip": (ClipLoss, [(B, D)] * 2, {}, True),
    "clip, labels": (
        lambda: ClipLoss(label_smoothing=0.1),
        [(B, D)] * 2,
        {"labels": LABELS, "ids": IDS},
        True,
    ),
    "info_nce": (
        lambda: InfoNCELoss(symmetric=True, false_negative_margin=0.4),
        [(B, D)] * 2 + [(9, D)],
        {"ids": IDS},
        True,
    ),
    "info_nce, own": (lambda: InfoNCELoss(tau_plus=0.1), [(B, D)] * 2 + [(B, 3, D)], {}, True),
    "nt_xent": (lambda: NTXentLoss(tau_plus=0.1), [(B, D)] * 2, {}, True),
    "sup_con": (SupConLoss, [(B, D)], {"labels": LABELS}, True),
    "siglip": (SigLipLoss, [(B, D)] * 2, {"labels": LABELS}, False),
    "in-batch": (
        lambda: InBatchDistillationLoss(teacher_scale=4.0, symmetric=True),
        [(B, D)] * 2,
        TEACHER,
        True,
    ),
    "scores": (ScoreDistillationLoss, [(B, D)] * 2 + [(B, K, D)], SCORES, False),
    "scores over tokens": (
        MaxSimDistillationLoss,
        [(B, 3, D), (B, 2, D), (B, K, 2, D)],
        SCORES,
        False,
    ),
    "own": (Triplet, [(B, D)] * 2, {"margin": 0.3}, False),
}
every_loss = pytest.mark.parametrize("name", LOSSES)


@pytest.fixture
def passes() -> Iterator[Counter[str]]:
    """Counts passes over the tiles of several prefixes, and of a teacher."""
    count: Counter[str] = Counter()

    def counted(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            count[name] += 1
            return original(*arguments)

        return call

    forward = counted("forward", contrast._PREFIX_STATISTICS["tiled"])
    taught = counted("teacher", in_batch_distillation.soft_average)
    with (
        patch.dict(contrast._PREFIX_STATISTICS, tiled=forward),
        patch.object(in_batch_distillation, "soft_average", taught),
    ):
        yield count


def setting(name: str) -> tuple[nn.Module, list[Tensor], dict[str, Any], bool]:
    build, shapes, options, one_pass = LOSSES[name]
    features = [3 * torch.randn(*shape, dtype=torch.float64) for shape in shapes]
    return build().double(), [x.requires_grad_() for x in features], options, one_pass


def gradients(loss: Tensor, module: nn.Module, features: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [*features, *module.parameters()]))


@every_loss
def test_equals_the_weighted_sum(name: str, passes: Counter[str]) -> None:
    loss, features, options, one_pass = setting(name)
    dims, weights = [20, 5, 12], [1.0, 0.25, 0.5]
    out = MatryoshkaLoss(loss, dims, weights)(*features, **options)
    assert passes["forward"] == one_pass
    assert passes["teacher"] == (2 if name == "in-batch" else 0)
    each = [loss(*(normalize(x[..., :d], dim=-1) for x in features), **options) for d in dims]
    losses = [x if isinstance(x, Tensor) else x.loss for x in each]
    expected = sum(w * x for w, x in zip(weights, losses, strict=True))
    got = out if isinstance(out, Tensor) else out.loss
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    for a, b in zip(
        gradients(got, loss, features), gradients(expected, loss, features), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)
    # Type and accuracies are those of the widest prefix, whatever the order.
    assert type(out) is type(each[0])
    if not isinstance(out, Tensor):
        assert out[1:] == each[0][1:]


@every_loss
def test_reference_and_tiles_agree(name: str) -> None:
    loss, features, options, _ = setting(name)
    results = []
    for impl in ("reference", "tiled"):
        loss.impl = impl  # type: ignore[assignment]
        out = MatryoshkaLoss(loss, [3, 20])(*features, **options)
        results.append(out if isinstance(out, Tensor) else out.loss)
    torch.testing.assert_close(*results, rtol=1e-12, atol=0)


@every_loss
def test_features_by_name(name: str) -> None:
    """They are cut as by position; what is not a feature stays whole by position, too."""
    loss, features, options, _ = setting(name)
    whole = MatryoshkaLoss(loss, [3, D])
    expected = whole(*features, **options)
    named = dict(zip(loss.feature_arguments, features, strict=False))
    torch.testing.assert_close(whole(**named, **options), expected, rtol=0, atol=0)
    if isinstance(loss, (InBatchDistillationLoss, ScoreDistillationLoss, MaxSimDistillationLoss)):
        by_position = whole(*features, *options.values())
        torch.testing.assert_close(by_position, expected, rtol=0, atol=0)


def test_a_subclass_with_a_forward_of_its_own_is_not_passed_over(passes: Counter[str]) -> None:
    class Doubled(ClipLoss):
        def forward(self, image_features: Tensor, text_features: Tensor) -> Any:
            output = super().forward(image_features, text_features)
            return output._replace(loss=2 * output.loss)

    features = torch.randn(2, B, D, dtype=torch.float64)
    plain = sum(ClipLoss()(*(normalize(x[:, :d]) for x in features)).loss for d in (4, D))
    for loss in (Doubled(), torch.compile(Doubled(), backend="eager")):
        torch.testing.assert_close(MatryoshkaLoss(loss, [4, D])(*features).loss, 2 * plain)
    assert not passes
    compiled = torch.compile(ClipLoss(), backend="eager")
    torch.testing.assert_close(MatryoshkaLoss(compiled, [4, D])(*features).loss, plain)
    assert passes["forward"] == 1


def test_momentum_contrast_goes_around_it() -> None:
    queries, keys = torch.randn(2, B, D).unbind()
    queue = FeatureQueue(8, D)
    queue.fill_at_random()
    inner = InfoNCELoss()
    found = MoCoLoss(MatryoshkaLoss(inner, [4, D]), [queue])(queries, keys).loss
    parts = [[normalize(x[:, :d]) for x in (queries, keys, queue.features)] for d in (4, D)]
    ids = torch.arange(B + 8).clamp_max(B) // B
    expected = sum(inner(*each, ids=ids).loss for each in parts)
    torch.testing.assert_close(found, expected)


def test_one_full_width_is_the_wrapped_loss() -> None:
    loss, features, _, _ = setting("clip")
    torch.testing.assert_close(MatryoshkaLoss(loss, [D])(*features), loss(*features))


def test_the_scale_is_held_at_its_bound_and_may_be_the_callers() -> None:
    images, texts = torch.randn(2, B, D).unbind()
    loss = MatryoshkaLoss(ClipLoss(max_logit_scale=20.0), [4, D])
    with torch.no_grad():
        loss.loss.log_logit_scale.fill_(math.log(400.0))
    own = loss(images, texts, torch.tensor(3.0)).loss
    assert loss.logit_scale.item() == pytest.approx(400.0)
    bounded = loss(images, texts).loss
    assert loss.logit_scale.item() == pytest.approx(20.0)
    torch.testing.assert_close(bounded, loss(images, texts, torch.tensor(20.0)).loss)
    assert not torch.isclose(own, bounded)
    assert list(loss.state_dict()) == ["loss.log_logit_scale"]


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_fp16_features_whose_norm_overflows(name: str) -> None:
    images = (torch.randn(8, 512) * 5000).half()
    loss = MatryoshkaLoss(LOSSES[name][0](), [64, 512])
    got, expected = loss(images, images), loss(images.float(), images.float())
    torch.testing.assert_close(got.loss, expected.loss, rtol=2e-2, atol=1e-4)
    assert got.accuracy == 1


def linear(width: int) -> nn.Module:
    return nn.Linear(width, D).double()


def frozen(encoder: nn.Module) -> nn.Module:
    return encoder.double().requires_grad_(False)


# The loss, encoders, the shapes of their inputs, and arguments by name.
STEPS: dict[str, tuple[Callable[[], nn.Module], list[nn.Module], list[tuple[int, ...]], Any]] = {
    "clip": (ClipLoss, [linear(6), linear(9)], [(B, 6), (B, 9)], {}),
    "a teacher": (LOSSES["in-batch"][0], [linear(6), linear(9)], [(B, 6), (B, 9)], TEACHER),
    "a teacher's encoders": (
        LOSSES["in-batch"][0],
        [linear(6), linear(9), frozen(nn.Linear(6, 5)), frozen(nn.Linear(9, 5))],
        [(B, 6), (B, 9), (B, 6), (B, 9)],
        {},
    ),
    "scores": (
        ScoreDistillationLoss,
        [linear(6), linear(6), linear(6)],
        [(B, 6), (B, 6), (B, K, 6)],
        SCORES,
    ),
    "scores as an input": (
        MaxSimDistillationLoss,
        [linear(6), linear(6), linear(6), nn.Identity()],
        [(B, 3, 6), (B, 2, 6), (B, K, 2, 6), (B, 1 + K)],
        {},
    ),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_cached_step_equals_the_plain_one(name: str) -> None:
    torch.manual_seed(0)
    build, towers, shapes, options = STEPS[name]
    inputs = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    loss = MatryoshkaLoss(build(), [4, 12, D]).double()
    trained = [x for x in nn.ModuleList([*towers, loss]).parameters() if x.requires_grad]
    plain = loss(*(tower(x) for tower, x in zip(towers, inputs, strict=True)), **options)
    expected = torch.autograd.grad(plain.loss, trained)
    out = GradCache(towers, loss, chunk_size=5)(*inputs, loss_kwargs=options)
    torch.testing.assert_close(out.loss, plain.loss.detach())
    for parameter, gradient in zip(trained, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-10, atol=1e-13)


class Nameless(nn.Module):
    def forward(self, features: Tensor, scores: Tensor) -> Tensor:
        return features.sum() + scores.sum()


class Misnamed(Nameless):
    feature_arguments = "features", "documents"


class Variadic(nn.Module):
    def __init__(self, *feature_arguments: str) -> None:
        super().__init__()
        self.feature_arguments = feature_arguments

    def forward(self, features: Tensor, *scores: Tensor, others: Tensor) -> Tensor:
        return features.sum() + others.sum() + torch.cat(scores).sum()


class Parts(Nameless):
    feature_arguments = ("features",)

    def forward(self, features: Tensor, scores: Tensor) -> Any:
        return features.sum(), scores.sum()


class Embedding(Nameless):
    """As losses for sentence-transformers, which embed."""

    matryoshka_dims = None


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((ClipLoss, [4]), TypeError, r"loss: expected a module such as ClipLoss\(\), got"),
        ((ClipLoss(normalize=False), [4]), ValueError, "loss: expected one that normalises"),
        ((Nameless(), [4]), TypeError, "loss: expected one that names its features.*got Nameless"),
        ((Misnamed(), [4]), ValueError, "Misnamed, features, scores, got features, documents"),
        ((Variadic("scores"), [4]), ValueError, "of Variadic, features, others, got scores"),
        ((Embedding(), [4]), TypeError, "got Embedding, which embeds texts; pass it matryoshka_d"),
        (
            (MoCoLoss(InfoNCELoss(), [FeatureQueue(8, 4)]), [4]),
            TypeError,
            r"loss: expected the contrast alone.*MoCoLoss\(MatryoshkaLoss\(InfoNCELoss\(\), d",
        ),
        ((ClipLoss(), []), ValueError, r"dims: expected different widths.*got \[\]"),
        ((ClipLoss(), [4, 4]), ValueError, r"dims: expected different widths.*\[4, 4\]"),
        ((ClipLoss(), [0, 4]), ValueError, "dims: expected different widths of 1 or more"),
        ((ClipLoss(), [True, 4]), ValueError, r"dims: expected different widths.*\[True, 4\]"),
        ((ClipLoss(), [4], [float("nan")]), ValueError, "weights: expected a number above zero"),
        ((ClipLoss(), [4, 8], [1.0]), ValueError, "weights: expected one for each of the 2 dims"),
    ],
)
def test_bad_construction(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MatryoshkaLoss(*arguments)


@pytest.mark.parametrize("build", [ClipLoss, NTXentLoss, SigLipLoss, InfoNCELoss])
def test_dims_beyond_the_features(build: Callable[[], Any]) -> None:
    features, loss = torch.eye(4), MatryoshkaLoss(build(), [2, 5])
    first, second = loss.loss.feature_arguments[:2]
    with pytest.raises(ValueError, match=f"dims: expected at most the width of {first}, 4, got 5"):
        loss(features, features)
    with pytest.raises(ValueError, match=f"dims: expected at most the width of {second}, 4, got 5"):
        loss(torch.eye(5)[:4], **{second: features})


def test_positions_are_those_of_positional_arguments() -> None:
    loss, scores = MatryoshkaLoss(Variadic("features", "others"), [1]), torch.full((2, 3), 5.0)
    assert loss(scores, scores, others=scores) == 2 + 2 + scores.sum()


def test_what_it_cannot_cut_or_add() -> None:
    loss = MatryoshkaLoss(LateInteractionLoss(), [2])
    for tokens, got in (
        ([torch.ones(2, 4)] * 3, "list"),
        (torch.ones(3), r"torch.float32 of shape \(3,\)"),
        (torch.ones(3, 2, 4, dtype=torch.long), r"torch.int64 of shape \(3, 2, 4\)"),
    ):
        with pytest.raises(TypeError, match=f"text_tokens: expected a floating tensor.*got {got}"):
            loss(torch.ones(3, 2, 4), tokens)
    with pytest.raises(TypeError, match="loss: expected one that returns a tensor, or .*got tuple"):
        MatryoshkaLoss(Parts(), [2])(torch.ones(3, 4), torch.ones(3))


def test_it_says_what_it_is() -> None:
    assert "dims=[2, 4], weights=[0.5, 1.0]" in repr(MatryoshkaLoss(ClipLoss(), [4, 2], [1.0, 0.5]))
