"""Distillation losses beside the whole matrices in fp64."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import kl_div, normalize

from gradcache_clip.losses import InBatchDistillationLoss, ScoreDistillationLoss
from gradcache_clip.ops import tiles

B, K, D, G = 7, 3, 8, 5
SCALE, TEACHER = 6.0, 11.0


def made(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def assert_same(loss: Any, got: Tensor, want: Tensor, leaves: list[Tensor]) -> None:
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    inputs = [*leaves, loss.log_logit_scale]
    for a, b in zip(
        torch.autograd.grad(got, inputs), torch.autograd.grad(want, inputs), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def kl(teacher: Tensor, student: Tensor) -> Tensor:
    logs = student.log_softmax(1), teacher.log_softmax(1)
    return kl_div(*logs, log_target=True, reduction="batchmean")


@pytest.mark.parametrize("small_tiles", [False, True])
@pytest.mark.parametrize("impl", ["reference", "tiled"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_in_batch_equals_the_whole_matrices(
    symmetric: bool, impl: str, small_tiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if small_tiles:
        shape = tiles.TileShape(3, 2)
        monkeypatch.setattr("gradcache_clip.losses.soft_average.DEFAULT_TILE", shape)
    *features, t, u = made((B, D), (B, D), (B, G), (B, G))
    leaves = [each.requires_grad_() for each in features]
    options = {"teacher_scale": TEACHER, "symmetric": symmetric, "impl": impl}
    loss = InBatchDistillationLoss(init_logit_scale=SCALE, **options).double()
    out = loss(*leaves, t, u)
    q, d = (normalize(each, dim=1) for each in leaves)
    student, teacher = loss.log_logit_scale.exp() * q @ d.T, TEACHER * t @ u.T
    want = kl(teacher, student)
    if symmetric:
        want = (want + kl(teacher.T, student.T)) / 2
    assert_same(loss, out.loss, want, leaves)
    right = student.argmax(1) == torch.arange(B)
    assert out.agreement == right.double().mean()


@pytest.mark.parametrize("impl", ["reference", "tiled"])
def test_a_cross_entropy_keeps_the_entropy_of_the_teacher(impl: str) -> None:
    *features, t, u = made((B, D), (B, D), (B, G), (B, G))
    leaves = [each.requires_grad_() for each in features]
    options = {"teacher_scale": TEACHER, "symmetric": True, "impl": impl}
    loss = InBatchDistillationLoss(cross_entropy=True, init_logit_scale=SCALE, **options).double()
    q, d = (normalize(each, dim=1) for each in leaves)
    student, teacher = loss.log_logit_scale.exp() * q @ d.T, TEACHER * t @ u.T
    both = (student, teacher), (student.T, teacher.T)
    want = sum(-(x.log_softmax(1) * y.softmax(1)).sum(1).mean() for x, y in both) / 2
    assert_same(loss, loss(*leaves, t, u).loss, want, leaves)


@pytest.mark.parametrize("objective", ["kl", "margin_mse"])
def test_scores_of_own_candidates(objective: str) -> None:
    queries, documents, negatives, scores = made((B, D), (B, D), (B, K, D), (B, 1 + K))
    leaves = [each.requires_grad_() for each in (queries, documents, negatives)]
    loss = ScoreDistillationLoss(objective, init_logit_scale=SCALE, teacher_scale=2.0).double()
    out = loss(*leaves, scores)
    q, d, n = (normalize(each, dim=-1) for each in leaves)
    candidates = torch.cat((d[:, None], n), 1)
    student = loss.log_logit_scale.exp() * torch.einsum("bd,bkd->bk", q, candidates)
    teacher = 2 * scores
    want = kl(teacher, student)
    if objective == "margin_mse":
        margins = [each[:, :1] - each[:, 1:] for each in (student, teacher)]
        want = (margins[0] - margins[1]).square().mean()
    assert_same(loss, out.loss, want, leaves)
    assert out.agreement == (student.argmax(1) == scores.argmax(1)).double().mean()
    flat = [queries, documents, negatives.flatten(0, 1), scores]
    assert loss(*flat, negatives_per_query=K).loss == out.loss


def test_a_sharp_teacher_far_from_zero_is_exact() -> None:
    """Logits in the hundreds, whose exponentials overflow."""
    q, d, t, u = made((B, D), (B, D), (B, G), (B, G))
    loss = InBatchDistillationLoss(teacher_scale=300.0, impl="tiled").double()
    student = loss.log_logit_scale.exp() * normalize(q, dim=1) @ normalize(d, dim=1).T
    torch.testing.assert_close(loss(q, d, t, u).loss, kl(300.0 * t @ u.T, student))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": torch.ones(B, K)}, "scores: expected constants of shape (7, 4), got (7, 3)"),
        ({"scores": torch.ones(B, 1 + K, requires_grad=True)}, "that require a gradient"),
        ({"hard_negatives": None}, "hard_negatives: expected some, got None"),
        ({"hard_negatives": torch.ones(B, D)}, "hard_negatives: expected (7, K, 8)"),
    ],
)
def test_wrong_scores(change: dict[str, Any], message: str) -> None:
    names = "queries", "documents", "hard_negatives", "scores"
    given = dict(zip(names, made((B, D), (B, D), (B, K, D), (B, 1 + K)), strict=True))
    change = {name: each if each is None else each.double() for name, each in change.items()}
    if "scores" in change and "gradient" in message:
        change = {"scores": change["scores"].detach().requires_grad_()}
    with pytest.raises(ValueError, match=re.escape(message)):
        ScoreDistillationLoss().double()(**given | change)


def test_wrong_teachers() -> None:
    q, d, t, u = made((B, D), (B, D), (B, G), (B, G))
    loss = InBatchDistillationLoss(teacher_scale=1.0).double()
    with pytest.raises(ValueError, match="teacher_queries: expected 7 rows as queries has, got 6"):
        loss(q, d, t[1:], u[1:])
    with pytest.raises(ValueError, match="teacher_queries: expected constants"):
        loss(q, d, t.requires_grad_(), u)
    for build in (InBatchDistillationLoss, ScoreDistillationLoss):
        with pytest.raises(ValueError, match="teacher_scale: expected a finite number, got nan"):
            build(teacher_scale=float("nan"))
    with pytest.raises(ValueError, match="objective: expected 'kl' or 'margin_mse', got 'mse'"):
        ScoreDistillationLoss("mse")
