"""Retrieval by the best matching tokens, and recall over folds, against plain loops."""

from __future__ import annotations

import doctest
from typing import Any

import pytest
import torch
from test_evaluation import LargestTensor
from torch import Tensor

from gradcache_clip.train.evaluation import features as features_module
from gradcache_clip.train.evaluation import folds as folds_module
from gradcache_clip.train.evaluation.features import (
    TokenFeatures,
    features_of,
    one_vector_each,
    scores_of,
)
from gradcache_clip.train.evaluation.folds import recall_in_folds
from gradcache_clip.train.evaluation.held_out import HeldOut
from gradcache_clip.train.evaluation.recall import RetrievalMetrics, recall_at_k, retrieve
from gradcache_clip.train.evaluation.zero_shot import prompts_of, zero_shot_by_tokens
from gradcache_clip.train.report.pictures import draw_gallery, draw_similarity


def tokens(rows: int, length: int, width: int = 6, *, seed: int = 0) -> TokenFeatures:
    """Unit vectors, the first `1 + row % length` of which count; those behind are misleading."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(rows, length, width, generator=generator)
    mask = torch.arange(length) <= (torch.arange(rows) % length)[:, None]
    vectors[~mask] = vectors.amax() * 9
    return TokenFeatures(torch.nn.functional.normalize(vectors, dim=-1), mask)


def score(query: TokenFeatures, candidate: TokenFeatures) -> float:
    """Of one sample with another, token by token."""
    looking, found = (side.vectors[0][side.mask[0]].double() for side in (query, candidate))
    best = [max(float(x @ y) for y in found) for x in looking]
    return sum(best) / len(best)


def matrix(queries: TokenFeatures, candidates: TokenFeatures) -> Tensor:
    rows = range(len(queries))
    columns = range(len(candidates))
    return torch.tensor([[score(queries[[i]], candidates[[j]]) for j in columns] for i in rows])


@pytest.mark.parametrize("held", [1, 40, 2**24])
def test_scores_are_those_of_plain_loops(held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features_module, "_MOST_SIMILARITIES", held)
    images, texts = tokens(7, 4), tokens(9, 5, seed=1)
    for one, other in ((images, texts), (texts, images)):
        torch.testing.assert_close(scores_of(one, other), matrix(one, other).float())
    assert not torch.allclose(scores_of(images, texts), scores_of(texts, images).T, atol=0.05)


@pytest.mark.parametrize("tile", [1, 5, 1024])
def test_recall_ranks_each_direction_by_its_own_score(tile: int) -> None:
    images, texts = tokens(12, 4), tokens(24, 5, seed=1)
    owners = torch.arange(12).repeat_interleave(2)
    metrics = recall_at_k(
        images, texts, image_ids=torch.arange(12), text_ids=owners, ks=(1, 3, 10), tile=tile
    )
    rows = torch.arange(12)
    for direction, scores, ids, others in (
        (metrics.image_to_text, matrix(images, texts), rows, owners),
        (metrics.text_to_image, matrix(texts, images), owners, rows),
    ):
        right = others == ids[:, None]
        best = scores.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
        ranks = 1 + ((scores >= best - 1e-7) & ~right).sum(1)
        assert direction.mean_rank == pytest.approx(ranks.double().mean().item())
        for k in (1, 3, 10):
            assert direction.recall[k] == pytest.approx((ranks <= k).double().mean().item())
    assert 0 < metrics.image_to_text.recall[3] < 1


def test_one_token_each_is_what_vectors_give() -> None:
    images, texts = torch.randn(20, 6), torch.randn(20, 6)
    whole = torch.ones(20, 1, dtype=torch.bool)
    as_tokens = [TokenFeatures(each[:, None], whole) for each in (images, texts)]
    assert recall_at_k(*as_tokens) == recall_at_k(images, texts)
    found, expected = retrieve(*as_tokens, 5, tile=7), retrieve(images, texts, 5, tile=7)
    assert torch.equal(found.indices, expected.indices)


def test_constant_tokens_earn_nothing() -> None:
    same = torch.nn.functional.normalize(torch.randn(1, 3, 50), dim=-1).expand(65, -1, -1)
    features = TokenFeatures(same, torch.ones(65, 3, dtype=torch.bool))
    metrics = recall_at_k(features, features, ks=(1, 10), tile=64)
    assert metrics.image_to_text.recall == {1: 0.0, 10: 0.0}


def test_no_more_similarities_at_once_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features_module, "_MOST_SIMILARITIES", 5000)
    images, texts = tokens(60, 4), tokens(80, 5, seed=1)
    with LargestTensor() as seen:
        scores_of(images, texts)
    assert 4000 < seen.largest <= 5000


def test_rows_are_taken_like_those_of_a_tensor() -> None:
    features = tokens(9, 4)
    assert [len(part) for part in features.split(4)] == [4, 4, 1]
    chosen = torch.tensor([5, 2])
    assert torch.equal(features[chosen].mask, features.mask[chosen])
    assert torch.equal(features[2:5].vectors, features.vectors[2:5])


def test_of_an_encoder_come_unit_vectors_in_fp32() -> None:
    vectors = torch.randn(3, 4, 5, dtype=torch.bfloat16, requires_grad=True)
    mask = torch.tensor([[True, False, False, False]]).expand(3, 4)
    whole, masked = features_of(vectors), features_of((vectors, mask))
    assert isinstance(whole, TokenFeatures) and isinstance(masked, TokenFeatures)
    assert whole.mask.all() and torch.equal(masked.mask, mask)
    assert whole.vectors.dtype == torch.float32 and not whole.vectors.requires_grad
    torch.testing.assert_close(whole.vectors.norm(dim=2), torch.ones(3, 4))
    pooled = features_of(torch.randn(3, 5))
    assert isinstance(pooled, Tensor) and pooled.shape == (3, 5)


def test_the_mean_of_the_tokens_that_count() -> None:
    features = tokens(5, 3)
    expected = [each.vectors[0][each.mask[0]].mean(0) for each in features.split(1)]
    torch.testing.assert_close(one_vector_each(features), torch.stack(expected))


@pytest.mark.parametrize(
    ("vectors", "mask", "message"),
    [
        (torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool), "mask: expected bool of shape"),
        (torch.ones(2, 3, 4), torch.ones(2, 4, dtype=torch.bool), r"\(2, 3\).*got.*\(2, 4\)"),
        (torch.ones(2, 3, 4), torch.ones(2, 3), "got torch.float32"),
        (torch.ones(2, 1, 4), torch.tensor([[True], [False]]), r"got none in 1 \(first: row 1\)"),
    ],
)
def test_masks_that_do_not_fit(vectors: Tensor, mask: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenFeatures(vectors, mask)


def test_tokens_and_vectors_are_not_compared() -> None:
    features = tokens(4, 3)
    with pytest.raises(ValueError, match="text_features: expected TokenFeatures as image_features"):
        recall_at_k(features, torch.ones(4, 6))
    broken = TokenFeatures(features.vectors.clone(), features.mask)
    broken.vectors[2, 0, 1] = torch.nan
    with pytest.raises(ValueError, match="image_features: expected finite numbers.* in row 2"):
        recall_at_k(broken, features)


class TestZeroShot:
    def test_a_class_scores_the_mean_of_its_texts(self) -> None:
        images, texts = tokens(30, 4), tokens(15, 5, seed=1)
        labels = torch.arange(30) % 5
        scores = matrix(images, texts).view(30, 5, 3).mean(2)
        first = scores.topk(2).indices
        accuracy = zero_shot_by_tokens(images, labels, texts, templates=3, ks=(1, 2), tile=7)
        for k in (1, 2):
            hits = (first[:, :k] == labels[:, None]).any(1)
            assert accuracy[k] == pytest.approx(hits.double().mean().item())
        assert 0 < accuracy[1] < accuracy[2]

    def test_equal_classes_earn_nothing(self) -> None:
        one = tokens(1, 1)[[0] * 4]
        assert zero_shot_by_tokens(one, torch.zeros(4, dtype=torch.long), one, ks=(1, 3)) == {
            1: 0.0,
            3: 0.0,
        }

    def test_prompts_that_do_not_divide(self) -> None:
        with pytest.raises(ValueError, match="expected a multiple of 2 texts.*got 5"):
            zero_shot_by_tokens(tokens(2, 2), torch.tensor([0, 1]), tokens(5, 2), templates=2)
        with pytest.raises(ValueError, match="labels: expected indices from 0 to 1, got 0 to 2"):
            zero_shot_by_tokens(tokens(2, 2), torch.tensor([0, 2]), tokens(4, 2), templates=2)
        with pytest.raises(ValueError, match="templates: .*got none"):
            prompts_of(["cat"], [])


class TestFolds:
    def features(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ten images of two captions each, texts in another order."""
        owners = torch.arange(10).repeat_interleave(2)[torch.randperm(20)]
        return torch.randn(10, 4), torch.randn(20, 4), owners

    @pytest.mark.parametrize("folds", [2, 3, 10])
    def test_each_part_is_a_set_of_its_own(self, folds: int) -> None:
        images, texts, owners = self.features()
        found = recall_in_folds(
            images, texts, image_ids=torch.arange(10), text_ids=owners, folds=folds, ks=(1, 2)
        )
        sizes = [10 // folds + (part < 10 % folds) for part in range(folds)]
        parts, start = list[RetrievalMetrics](), 0
        for size in sizes:
            own = (owners >= start) & (owners < start + size)
            parts.append(
                recall_at_k(
                    images[start : start + size],
                    texts[own],
                    image_ids=torch.arange(size),
                    text_ids=owners[own] - start,
                    ks=(1, 2),
                )
            )
            start += size
        for way in ("image_to_text", "text_to_image"):
            got, expected = getattr(found, way), [getattr(part, way) for part in parts]
            for figure in ("recall", "chance"):
                means = [sum(getattr(e, figure)[k] for e in expected) / folds for k in (1, 2)]
                assert list(getattr(got, figure).values()) == pytest.approx(means)
            assert got.median_rank == pytest.approx(sum(e.median_rank for e in expected) / folds)
            assert got.queries == (10 if way == "image_to_text" else 20)
        assert found.text_to_image.candidates == round(10 / folds)

    def test_one_fold_is_the_whole_set(self) -> None:
        images, texts, owners = self.features()
        ids: dict[str, Any] = {"image_ids": torch.arange(10), "text_ids": owners}
        assert recall_in_folds(images, texts, folds=1, **ids) == recall_at_k(images, texts, **ids)

    def test_of_tokens_as_well(self) -> None:
        images, texts = tokens(8, 3), tokens(8, 4, seed=1)
        ids = torch.arange(8)
        found = recall_in_folds(images, texts, image_ids=ids, text_ids=ids, folds=2)
        halves = [recall_at_k(images[part], texts[part]) for part in (ids[:4], ids[4:])]
        recalls = [half.image_to_text.recall[1] for half in halves]
        assert found.image_to_text.recall[1] == pytest.approx(sum(recalls) / 2)

    @pytest.mark.parametrize("folds", [0, 11])
    def test_more_folds_than_images(self, folds: int) -> None:
        images, texts, owners = self.features()
        with pytest.raises(ValueError, match=f"folds: expected 1 to 10.*got {folds}"):
            recall_in_folds(images, texts, image_ids=torch.arange(10), text_ids=owners, folds=folds)


def test_pictures_of_tokens(tmp_path: Any) -> None:
    ids, names = torch.arange(6), [f"text {n}" for n in range(6)]
    thumbnails = torch.zeros(6, 3, 8, 8, dtype=torch.uint8)
    sides = tokens(6, 4), tokens(6, 5, seed=1)
    pairs = HeldOut(*sides, ids, ids, names, names, thumbnails)
    for draw in (draw_similarity, draw_gallery):
        assert draw(pairs, tmp_path / "picture.png").stat().st_size > 5000


@pytest.mark.parametrize("module", [features_module, folds_module])
def test_examples_in_the_docstrings_run(module: Any) -> None:
    result = doctest.testmod(module)
    assert result.attempted > 1 and result.failed == 0
