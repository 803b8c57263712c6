"""Left padding, unpadded texts, images, adapters: the loss beside the library's uncached one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WORST_ERROR
from one_shot import twins
from torch import nn

pytest.importorskip("sentence_transformers")

from sentence_transformers.sentence_transformer import losses as theirs
from tiny_embedders import EMBEDDERS, in_double, qwen3, qwen3_vl
from tiny_sentences import columns, gradients, tiny_model, tokenized, worst_error

from gradcache_clip.integrations.sentence_transformers import CachedMultipleNegativesRankingLoss


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("embedders")


def preprocessed(name: str, model: Any) -> list[dict[str, Any]]:
    return [model.preprocess([*column]) for column in EMBEDDERS[name].columns()]


def given_to(model: Any) -> list[dict[str, Any]]:
    """What the first module of a model is given from here on."""
    seen: list[dict[str, Any]] = []
    model[0].register_forward_pre_hook(lambda _, given: seen.append(dict(given[0])))
    return seen


@pytest.mark.encoders
@pytest.mark.parametrize("budget", [None, 24], ids=["rows", "tokens"])
@pytest.mark.parametrize("name", EMBEDDERS)
def test_gradients_are_those_of_the_library(name, budget, folder, record_property):
    """Of its loss without caching, in fp64."""
    ours, plain = (EMBEDDERS[name].build(folder / name) for _ in range(2))
    features, seen = preprocessed(name, ours), given_to(ours)
    loss = CachedMultipleNegativesRankingLoss(ours, mini_batch_size=3, mini_batch_num_tokens=budget)
    with in_double(ours, plain):
        got = gradients(loss, features, 0.25)
        expected = gradients(theirs.MultipleNegativesRankingLoss(plain), features, 0.25)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    parameter, error = worst_error(ours, plain)
    by = "tokens" if budget else "rows"
    record_property(WORST_ERROR, (f"sentence-transformers, {name}, by {by}", parameter, error))
    assert error < 1e-10
    assert len(seen) > 2 * len(features)


@pytest.mark.parametrize("multiple", [1, 8])
def test_chunks_of_rows_padded_on_the_left_are_trimmed(multiple, folder):
    """By the first tokens, within the budget; with a multiple a step has few shapes."""
    model = qwen3(folder / "left padding")
    features = [model.preprocess(column) for column in columns(64).values()]
    lengths = torch.cat([each["attention_mask"].sum(1) for each in features])
    full, seen = {each["input_ids"].shape[1] for each in features}, given_to(model)
    loss = CachedMultipleNegativesRankingLoss(
        model, mini_batch_num_tokens=64, pad_to_multiple_of=multiple
    )
    gradients(loss, features)
    # The first step also compares features of a row with and without its padding.
    seen.clear()
    gradients(loss, features)
    shapes = [tuple(each["input_ids"].shape) for each in seen]
    assert all(each["attention_mask"].any(0)[-1] for each in seen)
    assert all(rows * width <= 64 for rows, width in shapes)
    if multiple == 1:
        assert all(each["attention_mask"].any(0).all() for each in seen)
        assert sum(rows * width for rows, width in shapes) < 1.2 * 2 * lengths.sum()
    else:
        assert all(width % 8 == 0 or width in full for _, width in shapes)
        assert len({*shapes}) <= 8


@pytest.mark.parametrize("options", [{"mini_batch_size": 1}, {"mini_batch_num_tokens": 60}])
def test_a_model_that_numbers_columns_gets_all_of_them(options, folder):
    """The first batch shows that its features move with the padding on the left."""
    ours, plain = (tiny_model(folder / "bert", padding_side="left").double() for _ in range(2))
    features, seen = tokenized(ours), given_to(ours)
    widths = [each["input_ids"].shape[1] for each in features]
    loss = CachedMultipleNegativesRankingLoss(ours, **options)
    with pytest.warns(UserWarning, match="padded on the left depend on their padding"):
        loss(features)
    seen.clear()
    gradients(loss, features)
    gradients(theirs.MultipleNegativesRankingLoss(plain), features)
    assert worst_error(ours, plain)[1] < 1e-10
    assert {each["input_ids"].shape[1] for each in seen} == {*widths}
    assert all(each["input_ids"].numel() <= 60 for each in seen)


def test_a_chunk_without_images_is_given_none(folder):
    model = qwen3_vl(folder / "images")
    features, seen = preprocessed("images", model), given_to(model)
    gradients(CachedMultipleNegativesRankingLoss(model, mini_batch_size=2), features)
    documents = [each for each in seen if "num_images_per_sample" in each]
    assert {int(each["num_images_per_sample"].sum()) > 0 for each in documents} == {False, True}
    for each in documents:
        grids = each.get("image_grid_thw", torch.empty(0, 3))
        assert len(grids) == each["num_images_per_sample"].sum()
        assert ("pixel_values" in each) == bool(len(grids))


class Collage(nn.Module):
    """Adds up images of a row, any number of them, as models without grids are given them."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.word = nn.Linear(12, 8), nn.EmbeddingBag(50, 8)

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        embedding = self.word(features["input_ids"])
        if "pixel_values" in features:
            counts = features["num_images_per_sample"]
            row = torch.arange(len(counts)).repeat_interleave(counts)
            images = self.image(features["pixel_values"].flatten(1)).tanh()
            embedding = embedding.index_add(0, row, images)
        return {**features, "sentence_embedding": embedding}


def test_images_without_grids_follow_their_counts():
    (ours,), (plain,) = twins(nn.Sequential(Collage()).double())
    ids, counts = torch.randint(50, (2, 6, 4)), torch.tensor([2, 0, 0, 1, 3, 1])
    documents = {
        "input_ids": ids[1],
        "pixel_values": torch.randn(7, 3, 2, 2).double(),
        "num_images_per_sample": counts,
        "modality": ("image", "text"),
        "prompt_length": torch.tensor([3]),
    }
    features = [{"input_ids": ids[0], "modality": "text"}, documents]
    gradients(CachedMultipleNegativesRankingLoss(ours, mini_batch_size=2), features)
    gradients(theirs.MultipleNegativesRankingLoss(plain), features)
    assert worst_error(ours, plain)[1] < 1e-10


def test_a_tensor_as_wide_as_the_mask_keeps_its_columns(folder):
    """It may hold anything; nothing is trimmed then."""
    ours, plain = (tiny_model(folder / "bert").double() for _ in range(2))
    features, seen = tokenized(ours), given_to(ours)
    for each in features:
        each["noise"] = torch.randn(each["input_ids"].shape)
    widths = {each["input_ids"].shape[1] for each in features}
    loss = CachedMultipleNegativesRankingLoss(ours, mini_batch_num_tokens=60)
    gradients(loss, features)
    gradients(theirs.MultipleNegativesRankingLoss(plain), features)
    assert {each["input_ids"].shape[1] for each in seen} == widths
    assert all(each["input_ids"].numel() <= 60 for each in seen)
    assert worst_error(ours, plain)[1] < 1e-10


def test_what_it_refuses(folder):
    model = nn.Sequential(Collage())
    pixels = [{"pixel_values": torch.randn(4, 12)}] * 2
    loss = CachedMultipleNegativesRankingLoss(model, mini_batch_num_tokens=10)
    message = r"mini_batch_num_tokens: expected .* got \['pixel_values'\] under 10; cut by"
    with pytest.raises(ValueError, match=message):
        loss(pixels)
    grids = {"input_ids": torch.ones(4, 3).long(), "image_grid_thw": torch.ones(4, 3).long()}
    uncounted = [{**grids, "pixel_values": torch.randn(4, 12)}] * 2
    with pytest.raises(ValueError, match=r"keep mm_token_type_ids.*pass num_images_per_sample$"):
        CachedMultipleNegativesRankingLoss(model)(uncounted)
    with pytest.raises(ValueError, match="pad_to_multiple_of: expected a positive integer, got 0"):
        CachedMultipleNegativesRankingLoss(model, pad_to_multiple_of=0)
