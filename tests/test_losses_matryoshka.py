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

from gradcache_clip import ClipLoss, GradCache, InfoNCELoss, NTXentLoss, SupConLoss
from gradcache_clip.losses.matryoshka import MatryoshkaLoss
from gradcache_clip.losses.siglip import SigLipLoss
from gradcache_clip.ops import contrast

B, D = 24, 20
LABELS, IDS = torch.arange(B) % 7, torch.arange(B) % 11


class Triplet(nn.Module):
    """A loss of a person's own, which returns a tensor."""

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
    "own": (Triplet, [(B, D)] * 2, {"margin": 0.3}, False),
}
every_loss = pytest.mark.parametrize("name", LOSSES)


@pytest.fixture
def passes() -> Iterator[Counter[str]]:
    """Counts passes over the tiles of several prefixes."""
    count: Counter[str] = Counter()
    original = contrast._PREFIX_STATISTICS["tiled"]

    def counted(*arguments: Any) -> Any:
        count["forward"] += 1
        return original(*arguments)

    with patch.dict(contrast._PREFIX_STATISTICS, tiled=counted):
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


def test_a_cached_step_equals_the_plain_one() -> None:
    torch.manual_seed(0)
    towers = [nn.Linear(6, D).double(), nn.Linear(9, D).double()]
    inputs = [torch.randn(B, 6).double(), torch.randn(B, 9).double()]
    loss = MatryoshkaLoss(ClipLoss(), [4, 12, D]).double()
    parameters = [*towers[0].parameters(), *towers[1].parameters(), *loss.parameters()]
    plain = loss(*(tower(x) for tower, x in zip(towers, inputs, strict=True)))
    expected = torch.autograd.grad(plain.loss, parameters)
    out = GradCache(towers, loss, chunk_size=5)(*inputs)
    torch.testing.assert_close(out.loss, plain.loss.detach())
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((ClipLoss, [4]), TypeError, r"loss: expected a module such as ClipLoss\(\), got"),
        ((ClipLoss(normalize=False), [4]), ValueError, "loss: expected one that normalises"),
        ((ClipLoss(), []), ValueError, r"dims: expected different widths.*got \[\]"),
        ((ClipLoss(), [4, 4]), ValueError, r"dims: expected different widths.*\[4, 4\]"),
        ((ClipLoss(), [0, 4]), ValueError, "dims: expected different widths of 1 or more"),
        ((ClipLoss(), [4, 8], [1.0]), ValueError, "weights: expected one for each of the 2 dims"),
    ],
)
def test_bad_construction(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MatryoshkaLoss(*arguments)


@pytest.mark.parametrize("build", [ClipLoss, NTXentLoss, SigLipLoss, InfoNCELoss])
def test_dims_beyond_the_features(build: Callable[[], nn.Module]) -> None:
    features = torch.eye(4)
    with pytest.raises(ValueError, match="dims: expected at most the width.*4, got 5"):
        MatryoshkaLoss(build(), [2, 5])(features, features)


def test_it_says_what_it_is() -> None:
    assert "dims=[2, 4], weights=[0.5, 1.0]" in repr(MatryoshkaLoss(ClipLoss(), [4, 2], [1.0, 0.5]))
