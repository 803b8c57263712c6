"""Retrieval figures against a brute force over the whole matrix, and what they must not hide."""

from __future__ import annotations

import doctest
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

from gradcache_clip.train.evaluation import (
    ranking,
    recall,
    recall_at_k,
    retrieve,
    zero_shot,
    zero_shot_classification,
    zero_shot_classifier,
)


def brute_force_ranks(
    queries: Tensor, query_ids: Tensor, candidates: Tensor, candidate_ids: Tensor
) -> Tensor:
    """By the definition, query by query, over the full fp64 matrix."""
    scores = queries.double() @ candidates.double().T
    ranks = []
    for row, query_id in zip(scores, query_ids, strict=True):
        right = candidate_ids == query_id
        ranks.append(1 + int((row[~right] >= row[right].max() - 1e-7).sum()))
    return torch.tensor(ranks)


def brute_force_recall(ranks: Tensor, k: int) -> float:
    return sum(rank <= k for rank in ranks.tolist()) / len(ranks)


def data(images: int, captions: int, *, width: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy pairs, several captions an image in shuffled order, some rows duplicated exactly."""
    image_features = normalize(torch.randn(images, width), dim=1)
    # Unrelated images with equal features: whoever asks for one ties with the other.
    image_features[images // 2 :: 3] = image_features[0].clone()
    owners = torch.arange(images).repeat_interleave(captions)[torch.randperm(images * captions)]
    text_features = normalize(image_features[owners] + 0.4 * torch.randn(len(owners), width), dim=1)
    text_features[::5] = text_features[-1].clone()
    return image_features, text_features, owners


class TestRecall:
    @pytest.mark.parametrize("tile", [1, 7, 16, 1024])
    @pytest.mark.parametrize(("images", "captions"), [(1, 1), (23, 1), (23, 3), (32, 5)])
    def test_equals_brute_force(self, images: int, captions: int, tile: int) -> None:
        image_features, text_features, owners = data(images, captions)
        metrics = recall_at_k(
            image_features,
            text_features,
            image_ids=torch.arange(images),
            text_ids=owners,
            ks=(1, 3, 10),
            tile=tile,
        )
        rows = torch.arange(images)
        for direction, ranks in (
            (
                metrics.image_to_text,
                brute_force_ranks(image_features, rows, text_features, owners),
            ),
            (
                metrics.text_to_image,
                brute_force_ranks(text_features, owners, image_features, rows),
            ),
        ):
            for k in (1, 3, 10):
                assert direction.recall[k] == pytest.approx(brute_force_recall(ranks, k), abs=1e-12)
            assert direction.mean_rank == pytest.approx(ranks.double().mean().item())
            assert direction.median_rank == ranks.median().item()
            assert direction.queries == len(ranks)

    def test_several_images_a_caption(self) -> None:
        image_ids = torch.randint(0, 9, (40,))
        image_ids[:9] = torch.arange(9)
        text_ids = torch.randint(0, 9, (30,))
        text_ids[-9:] = torch.arange(9)
        images, texts = torch.randn(40, 6), torch.randn(30, 6)
        metrics = recall_at_k(images, texts, image_ids=image_ids, text_ids=text_ids, tile=7)
        ranks = brute_force_ranks(texts, text_ids, images, image_ids)
        assert metrics.text_to_image.recall[5] == pytest.approx(brute_force_recall(ranks, 5))
        assert 0 < metrics.text_to_image.recall[1] < 1

    def test_rows_are_pairs_where_nothing_is_said(self) -> None:
        features = normalize(torch.randn(50, 16), dim=1)
        assert recall_at_k(features, features).image_to_text.recall == {1: 1.0, 5: 1.0, 10: 1.0}
        rolled = recall_at_k(features, features.roll(1, 0)).image_to_text
        assert rolled.recall[1] == 0.0

    @pytest.mark.parametrize("count", [1000, 1025, 65])
    @pytest.mark.parametrize("tile", [64, 1000, 1024])
    def test_constant_features_earn_nothing(self, count: int, tile: int) -> None:
        # An edge tile takes another path through the matrix product and may round differently.
        one = normalize(torch.randn(1, 507), dim=1).expand(count, -1).contiguous()
        metrics = recall_at_k(one, one.clone(), ks=(1, 10), tile=tile)
        assert metrics.image_to_text.recall == {1: 0.0, 10: 0.0}
        assert metrics.text_to_image.median_rank == count

    def test_zero_features_earn_nothing(self) -> None:
        zero = torch.zeros(20, 4)
        assert recall_at_k(zero, zero, ks=(1, 19)).image_to_text.recall == {1: 0.0, 19: 0.0}

    def test_a_duplicate_of_the_right_answer_costs_a_rank(self) -> None:
        images, texts = torch.eye(4), torch.eye(4)
        texts[3] = texts[0]
        metrics = recall_at_k(images, texts, ks=(1, 2))
        # Text 0 ties for image 0; image 3 scores 0 with all; texts 0 and 3 both point to image 0.
        assert metrics.image_to_text.recall == {1: 0.5, 2: 0.75}
        assert metrics.text_to_image.recall[1] == 0.75

    def test_right_answers_do_not_push_each_other_down(self) -> None:
        image = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        texts = image[[0, 0, 0, 0, 0, 1]]
        metrics = recall_at_k(
            image,
            texts,
            image_ids=torch.arange(2),
            text_ids=torch.tensor([0, 0, 0, 0, 0, 1]),
            ks=(1,),
        )
        assert metrics.image_to_text.recall[1] == 1.0

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
    def test_other_dtypes(self, dtype: torch.dtype) -> None:
        image_features, text_features, owners = data(23, 2)
        image_features, text_features = image_features.to(dtype), text_features.to(dtype)
        metrics = recall_at_k(
            image_features, text_features, image_ids=torch.arange(23), text_ids=owners, tile=8
        )
        ranks = brute_force_ranks(text_features, owners, image_features, torch.arange(23))
        assert metrics.text_to_image.recall[1] == pytest.approx(brute_force_recall(ranks, 1))

    def test_autocast_and_reduced_precision_of_training_do_not_reach_it(self) -> None:
        features = normalize(torch.randn(400, 64) * 0.03 + torch.randn(1, 64), dim=1)
        expected = recall_at_k(features, features)
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("medium")
        try:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert recall_at_k(features, features) == expected
                assert retrieve(features, features, 1).scores.dtype == torch.float32
            assert torch.get_float32_matmul_precision() == "medium"
        finally:
            torch.set_float32_matmul_precision(before)
        assert expected.image_to_text.recall[1] == 1.0

    def test_no_graph_and_no_change_of_the_input(self) -> None:
        features = torch.randn(9, 4, requires_grad=True)
        copy = features.detach().clone()
        recall_at_k(features, features * 1.0)
        assert not retrieve(features, features, 2).scores.requires_grad
        assert torch.equal(features, copy)

    def test_depths_beyond_the_candidates_are_certain_and_so_is_chance(self) -> None:
        direction = recall_at_k(torch.randn(3, 4), torch.randn(3, 4), ks=(3, 50)).image_to_text
        assert direction.recall == {3: 1.0, 50: 1.0} == dict(direction.chance)

    def test_scalars_have_flat_names(self) -> None:
        scalars = recall_at_k(torch.eye(4), torch.eye(4), ks=(1,)).to_scalars()
        assert scalars["image_to_text_recall_at_1"] == 1.0
        assert scalars["text_to_image_recall_at_1_chance"] == pytest.approx(0.25)
        assert scalars["image_to_text_mean_rank"] == 1.0
        assert all(type(value) is float for value in scalars.values()) and len(scalars) == 8


class TestChance:
    def test_counts_against_random_orders(self) -> None:
        query_ids = torch.tensor([0, 0, 1, 2, 5])
        candidate_ids = torch.tensor([0, 1, 1, 1, 2, 7, 7, 5])
        orders = torch.stack([torch.randperm(8) for _ in range(4000)])
        for k in (1, 2, 5):
            first = candidate_ids[orders[:, :k]]
            hits = torch.stack([(first == query).any(1) for query in query_ids])
            chance = ranking.chance_of_hit(query_ids, candidate_ids, k)
            assert chance == pytest.approx(hits.double().mean().item(), abs=0.02)

    def test_exact_for_pairs(self) -> None:
        ids = torch.randperm(1000)
        for k in (1, 10, 1000):
            assert ranking.chance_of_hit(ids, ids, k) == pytest.approx(k / 1000, rel=1e-9)

    def test_random_features_reach_it(self) -> None:
        owners = torch.arange(300).repeat_interleave(3)
        metrics = recall_at_k(
            torch.randn(300, 8), torch.randn(900, 8), image_ids=torch.arange(300), text_ids=owners
        )
        for direction in (metrics.image_to_text, metrics.text_to_image):
            for k, chance in direction.chance.items():
                spread = math.sqrt(chance * (1 - chance) / direction.queries)
                assert abs(direction.recall[k] - chance) < 5 * spread


class LargestTensor(TorchDispatchMode):
    """The element count of the largest tensor made inside."""

    largest = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for made in out if isinstance(out, tuple | list) else [out]:
            if isinstance(made, Tensor) and not made._is_view():
                self.largest = max(self.largest, made.numel())
        return out


def test_never_more_than_a_tile() -> None:
    images, texts = torch.randn(200, 8), torch.randn(260, 8)
    owners = torch.arange(260) % 200
    classes = torch.randn(90, 8)
    with LargestTensor() as seen:
        recall_at_k(images, texts, image_ids=torch.arange(200), text_ids=owners, tile=32)
        retrieve(images, texts, 3, tile=32)
        zero_shot_classification(images, owners[:200] % 90, classes, tile=32)
    # The results themselves, 200 x 3 and 260 numbers, are smaller than a tile too.
    assert 600 <= seen.largest <= 32 * 32


NAN, INFINITY = float("nan"), float("inf")
PAIR = torch.ones(4, 2)


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"image_features": torch.ones(0, 2)}, "image_features: expected at least one row"),
            ({"text_features": torch.ones(0, 2)}, "text_features: expected at least one row"),
            ({"text_features": torch.ones(4, 3)}, "text_features: expected width 2 .* got width 3"),
            ({"text_features": torch.ones(5, 2)}, "expected 4 rows.*got 5; pass image_ids"),
            ({"image_features": torch.ones(4)}, r"image_features: .*\(rows, width\), got \(4,\)"),
            ({"image_features": torch.ones(4, 0)}, "image_features: expected a floating-point"),
            ({"image_features": torch.ones(4, 2).long()}, "image_features: expected a floating-po"),
            ({"image_ids": torch.arange(4)}, "image_ids, text_ids: expected both or none"),
            (
                {"image_ids": torch.arange(4.0), "text_ids": torch.arange(4)},
                "image_ids: expected 4 integers",
            ),
            (
                {"image_ids": torch.arange(4), "text_ids": torch.tensor([0, 1, 2, 9])},
                "each image to have its text, got 1 without .first: row 3.",
            ),
            (
                {"image_ids": torch.tensor([0, 1, 2, 2]), "text_ids": torch.tensor([0, 1, 2, 9])},
                "each text to have its image",
            ),
            ({"image_ids": torch.arange(5), "text_ids": torch.arange(4)}, "image_ids: expected 4"),
            ({"ks": (0,)}, "ks: expected depths of 1 or more"),
            ({"ks": ()}, "ks: expected depths"),
            ({"tile": 0}, "tile: expected a positive integer, got 0"),
        ],
    )
    def test_is_named(self, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            recall_at_k(**({"image_features": PAIR, "text_features": PAIR} | arguments))

    @pytest.mark.parametrize("bad", [NAN, INFINITY, -INFINITY])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_non_finite_features_name_their_row(self, bad: float, dtype: torch.dtype) -> None:
        broken = torch.ones(40, 3, dtype=dtype)
        broken[37, 1] = bad
        with pytest.raises(ValueError, match=r"text_features: expected finite .* in row 37"):
            recall_at_k(torch.ones(40, 3, dtype=dtype), broken, tile=8)
        with pytest.raises(ValueError, match=r"query_features: .* row 37"):
            retrieve(broken, broken, 1)

    def test_large_finite_features_are_no_infinity(self) -> None:
        ranking.check_features("x", torch.full((3, 100), 3e38), 2)


class TestRetrieve:
    @pytest.mark.parametrize("tile", [1, 5, 7, 100])
    def test_equals_a_sort_of_the_whole_matrix(self, tile: int) -> None:
        queries, candidates = torch.randn(13, 4), torch.randn(31, 4)
        found = retrieve(queries, candidates, 6, tile=tile)
        scores, indices = (queries.double() @ candidates.double().T).sort(1, descending=True)
        assert torch.equal(found.indices, indices[:, :6])
        torch.testing.assert_close(found.scores, scores[:, :6].float())

    def test_equals_come_in_order_across_tiles(self) -> None:
        found = retrieve(torch.ones(1, 2), torch.ones(10, 2), 7, tile=4)
        assert found.indices.tolist() == [[0, 1, 2, 3, 4, 5, 6]]

    def test_fewer_candidates_than_k(self) -> None:
        assert retrieve(torch.randn(5, 2), torch.randn(3, 2), 10).indices.shape == (5, 3)

    def test_k_below_one(self) -> None:
        with pytest.raises(ValueError, match="depths of 1 or more"):
            retrieve(PAIR, PAIR, 0)


class TestZeroShot:
    def test_accuracy_equals_topk(self) -> None:
        images, classes = torch.randn(200, 6), torch.randn(17, 6)
        labels = torch.randint(0, 17, (200,))
        found = (images @ classes.T).topk(5).indices
        accuracy = zero_shot_classification(images, labels, classes, ks=(1, 5), tile=6)
        assert accuracy[1] == pytest.approx((found[:, 0] == labels).double().mean().item())
        assert accuracy[5] == pytest.approx(
            (found == labels[:, None]).any(1).double().mean().item()
        )

    def test_equal_classes_earn_nothing(self) -> None:
        labels = torch.zeros(5, dtype=torch.long)
        assert zero_shot_classification(torch.ones(5, 2), labels, PAIR, ks=(1,)) == {1: 0.0}

    def test_labels_outside_the_classes(self) -> None:
        with pytest.raises(ValueError, match="labels: expected indices from 0 to 3, got 0 to 4"):
            zero_shot_classification(torch.ones(2, 2), torch.tensor([0, 4]), PAIR)

    @pytest.mark.parametrize("batch_size", [1, 4, 256])
    def test_classifier_is_the_mean_of_unit_features(self, batch_size: int) -> None:
        seen: list[str] = []

        def encode(texts: list[str]) -> Tensor:
            seen.extend(texts)
            # Lengths differ widely, so a mean before the normalisation would not pass.
            return torch.tensor([[len(t) ** 3.0, float(ord(t[0])), 1.0] for t in texts])

        names, templates = ["cat", "{0.x}", "a brace }"], ["{}", "photo of {}, in colour"]
        found = zero_shot_classifier(encode, names, templates, batch_size=batch_size)
        assert seen[:4] == ["cat", "photo of cat, in colour", "{0.x}", "photo of {0.x}, in colour"]
        expected = [
            normalize(normalize(encode([t.replace("{}", name) for t in templates])).mean(0), dim=0)
            for name in names
        ]
        torch.testing.assert_close(found, torch.stack(expected))

    def test_bad_templates(self) -> None:
        with pytest.raises(ValueError, match=r"templates: .*got \['a photo'\]"):
            zero_shot_classifier(lambda texts: PAIR, ["a"], ["a photo", "{}"])
        with pytest.raises(ValueError, match="templates: .*got none"):
            zero_shot_classifier(lambda texts: PAIR, ["a"], [])
        with pytest.raises(ValueError, match="class_names: expected at least one"):
            zero_shot_classifier(lambda texts: PAIR, [])


@pytest.mark.parametrize("module", [recall, zero_shot])
def test_examples_in_the_docstrings_run(module: Any) -> None:
    result = doctest.testmod(module)
    assert result.attempted > 1 and result.failed == 0
