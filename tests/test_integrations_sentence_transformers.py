"""The loss for sentence-transformers' trainer beside the library's own, cached and not."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("sentence_transformers")

from sentence_transformers.sentence_transformer import losses as theirs
from sentence_transformers.util import dot_score
from tiny_sentences import BOTH_WAYS, gradients, tiny_model, tokenized, worst_error, wrapped

from gradcache_clip.integrations.sentence_transformers import CachedMultipleNegativesRankingLoss


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny_sentences")


@pytest.mark.parametrize("count", [2, 3, 4], ids=["pairs", "triplets", "two negatives"])
@pytest.mark.parametrize("options", [{}, BOTH_WAYS], ids=["one way", "both ways"])
@pytest.mark.parametrize("mini_batch_size", [3, 100])
def test_gradients_are_those_of_the_library(
    folder: Path, count: int, options: dict[str, Any], mini_batch_size: int
) -> None:
    """Of its loss without caching, in fp64; and its cached loss agrees."""
    ours, plain, cached = (tiny_model(folder).double() for _ in range(3))
    features = tokenized(ours, count)
    mine = CachedMultipleNegativesRankingLoss(ours, mini_batch_size=mini_batch_size, **options)
    got = gradients(mine, features, 0.25)
    expected = gradients(theirs.MultipleNegativesRankingLoss(plain, **options), features, 0.25)
    loss = theirs.CachedMultipleNegativesRankingLoss(cached, mini_batch_size=3, **options)
    gradients(loss, features, 0.25)
    torch.testing.assert_close(got, expected)
    assert worst_error(ours, plain)[1] < 1e-10
    assert worst_error(cached, plain)[1] < 1e-10


@pytest.mark.parametrize("count", [2, 3], ids=["pairs", "triplets"])
@pytest.mark.parametrize("options", [{}, BOTH_WAYS], ids=["one way", "both ways"])
@pytest.mark.parametrize("weights", [None, [1.0, 0.25, 2.0]], ids=["alike", "weighted"])
def test_widths_in_one_call_are_the_library_s_loss_around_its_loss(
    folder: Path, count: int, options: dict[str, Any], weights: list[float] | None
) -> None:
    ours, plain, cached = (tiny_model(folder).double() for _ in range(3))
    features, widths = tokenized(ours, count), [32, 3, 16]
    given = {"matryoshka_dims": widths, "matryoshka_weights": weights}
    mine = CachedMultipleNegativesRankingLoss(ours, mini_batch_size=4, **given, **options)
    got = gradients(mine, features, 0.25)
    loss = theirs.MultipleNegativesRankingLoss(plain, **options)
    expected = gradients(theirs.MatryoshkaLoss(plain, loss, **given), features, 0.25)
    loss = theirs.CachedMultipleNegativesRankingLoss(cached, mini_batch_size=4, **options)
    gradients(theirs.MatryoshkaLoss(cached, loss, **given), features, 0.25)
    torch.testing.assert_close(got, expected)
    assert worst_error(ours, plain)[1] < 1e-10
    assert worst_error(cached, plain)[1] < 1e-10


def test_widths_share_a_learned_scale(folder: Path) -> None:
    model = tiny_model(folder).double()
    options = {"matryoshka_dims": [32, 8], "learnable_scale": True}
    loss = CachedMultipleNegativesRankingLoss(model, 5.0, mini_batch_size=4, **options).double()
    (log_scale,) = (p for name, p in loss.named_parameters() if name.startswith("contrast"))
    features = tokenized(model)
    gradients(loss, features)
    truth = []
    for width in (32, 8):
        scale = nn.Parameter(log_scale.detach().exp())
        plain = theirs.MultipleNegativesRankingLoss(tiny_model(folder).double(), scale)
        gradients(theirs.MatryoshkaLoss(plain.model, plain, [width]), features)
        truth.append((scale.grad * scale).item())
    assert loss.scale == pytest.approx(5.0)
    assert log_scale.grad.item() == pytest.approx(sum(truth), rel=1e-10)


def test_in_single_precision(folder: Path) -> None:
    ours, plain = tiny_model(folder), tiny_model(folder)
    features = tokenized(ours)
    gradients(CachedMultipleNegativesRankingLoss(ours, mini_batch_size=4), features)
    gradients(theirs.MultipleNegativesRankingLoss(plain), features)
    assert worst_error(ours, plain)[1] < 1e-5


def test_a_learned_scale_gets_the_gradient_of_the_loss_times_any_factor(folder: Path) -> None:
    """In the library's cached loss the factor does not reach a scale that is learned."""
    ours, plain, cached = (tiny_model(folder).double() for _ in range(3))
    features = tokenized(ours)
    mine = CachedMultipleNegativesRankingLoss(ours, 5.0, mini_batch_size=4, learnable_scale=True)
    gradients(mine.double(), features, 0.25)
    (log_scale,) = (p for name, p in mine.named_parameters() if name.startswith("contrast"))
    scales = [nn.Parameter(log_scale.detach().exp()) for _ in range(2)]
    gradients(theirs.MultipleNegativesRankingLoss(plain, scales[0]), features, 0.25)
    loss = theirs.CachedMultipleNegativesRankingLoss(cached, scales[1], mini_batch_size=4)
    gradients(loss, features, 0.25)
    truth = scales[0].grad
    assert log_scale.grad.item() == pytest.approx((truth * scales[0]).item(), rel=1e-10)
    assert scales[1].grad.item() == pytest.approx(4 * truth.item(), rel=1e-10)
    assert worst_error(ours, plain)[1] < 1e-10


def test_a_fixed_scale_is_no_parameter_that_trains(folder: Path) -> None:
    loss = CachedMultipleNegativesRankingLoss(tiny_model(folder), 14.2857)
    assert loss.scale == 14.2857 and loss.temperature == pytest.approx(1 / 14.2857)
    trained = [name for name, p in loss.named_parameters() if p.requires_grad]
    assert all(name.startswith("model.") for name in trained)


def test_dropout_is_replayed(folder: Path) -> None:
    """With room for all graphs nothing is replayed: that is one graph over the same chunks."""
    found = []
    for memory_budget in (None, 10**9):
        model = tiny_model(folder, dropout=0.3).double().train()
        features = tokenized(model)
        torch.manual_seed(1)
        loss = CachedMultipleNegativesRankingLoss(
            model, mini_batch_size=4, memory_budget=memory_budget
        )
        found.append((gradients(loss, features), model))
    (one, replayed), (other, kept) = found
    torch.testing.assert_close(one, other)
    assert worst_error(replayed, kept)[1] < 1e-10


def widths(model: Any) -> list[tuple[int, ...]]:
    """Shapes of what the transformer is given from here on."""
    seen: list[tuple[int, ...]] = []
    model[0].register_forward_pre_hook(lambda _, given: seen.append(given[0]["input_ids"].shape))
    return seen


@pytest.mark.parametrize("count", [2, 3])
def test_rows_of_similar_length_share_a_chunk(folder: Path, count: int) -> None:
    ours, cached = tiny_model(folder), tiny_model(folder)
    features = tokenized(ours, count, 64)
    tokens = sum(int(each["attention_mask"].sum()) for each in features)
    loss = CachedMultipleNegativesRankingLoss(ours, mini_batch_size=8)
    # The first step checks more.
    gradients(loss, features)
    mine, their = widths(ours), widths(cached)
    gradients(loss, features)
    gradients(theirs.CachedMultipleNegativesRankingLoss(cached, mini_batch_size=8), features)
    # One pass over all chunks, and a replay of all but the last, whose graph was kept.
    assert len(mine) == 2 * 8 * count - 1
    embedded = [sum(rows * width for rows, width in seen) / 2 for seen in (mine, their)]
    assert embedded[0] < 1.2 * tokens < embedded[1]


def test_a_chunk_may_be_measured_in_tokens(folder: Path) -> None:
    ours, plain = tiny_model(folder).double(), tiny_model(folder).double()
    features, seen = tokenized(ours, rows=40), widths(ours)
    gradients(CachedMultipleNegativesRankingLoss(ours, mini_batch_num_tokens=100), features)
    gradients(theirs.MultipleNegativesRankingLoss(plain), features)
    assert max(rows * width for rows, width in seen) <= 100 and len(seen) > 8
    assert worst_error(ours, plain)[1] < 1e-10


def test_columns_that_differ_are_embedded_one_by_one(folder: Path) -> None:
    ours, plain = tiny_model(folder).double(), tiny_model(folder).double()
    features = tokenized(ours)
    features[0]["prompt_length"] = 1
    gradients(CachedMultipleNegativesRankingLoss(ours, mini_batch_size=4), features)
    gradients(theirs.MultipleNegativesRankingLoss(plain), features)
    assert worst_error(ours, plain)[1] < 1e-10


def test_what_it_refuses(folder: Path) -> None:
    model = tiny_model(folder)
    build = partial(CachedMultipleNegativesRankingLoss, model)
    with pytest.raises(ValueError, match="similarity_fct: expected .*cos_sim, got dot_score"):
        build(similarity_fct=dot_score)
    with pytest.raises(ValueError, match="directions: expected query_to_doc, and any of"):
        build(directions=("query_to_query",))
    with pytest.raises(ValueError, match="partition_mode: expected .* got 'both'"):
        build(partition_mode="both")
    with pytest.raises(ValueError, match='partition_mode: expected "joint" with query_to_query'):
        build(directions=("query_to_doc", "query_to_query"), partition_mode="per_direction")
    with pytest.raises(ValueError, match="hardness_mode: expected None, 'in_batch"):
        build(hardness_mode="hard")
    with pytest.raises(ValueError, match="hardness_strength: expected 0 or more"):
        build(hardness_mode="all_negatives", hardness_strength=-1.0)
    with pytest.warns(UserWarning, match="hardness_strength: expected more than 0 with"):
        build(hardness_mode="all_negatives")
    with pytest.raises(TypeError, match="replay_chek: expected a keyword of the library's loss or"):
        build(replay_chek="off")
    with pytest.raises(ValueError, match="scale: expected a number above zero, got 0.0"):
        build(scale=0.0)
    with pytest.raises(ValueError, match="matryoshka_weights: expected None without"):
        build(matryoshka_weights=[1.0])
    with pytest.raises(ValueError, match=r"matryoshka_dims: expected different .* got \[8, 8\]"):
        build(matryoshka_dims=[8, 8])
    with pytest.raises(ValueError, match="matryoshka_dims: expected at most .* model, 32, got 64"):
        build(matryoshka_dims=[64])
    with pytest.raises(ValueError, match="at least 2 columns, anchors and positives, got 1"):
        build()(tokenized(model)[:1])
    with pytest.raises(ValueError, match="one process per GPU, got DataParallel"):
        wrapped(build(), nn.DataParallel(model))(tokenized(model))
    with pytest.raises(TypeError, match="one MatryoshkaLoss around it, with n_dims_per_step=-1"):
        theirs.MatryoshkaLoss(model, build(), [32, 16], n_dims_per_step=1)
    with pytest.raises(TypeError, match=r"matryoshka_dims=\[32\]; pass matryoshka_dims= alone"):
        theirs.MatryoshkaLoss(model, build(matryoshka_dims=[32]), [32, 16])
