"""Directions, hardness, a guide and distillation beside sentence-transformers' own losses."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("sentence_transformers")

from sentence_transformers.sentence_transformer import losses as theirs
from sentence_transformers.util import dot_score, pairwise_cos_sim, pairwise_dot_score
from tiny_sentences import columns, sentences, tiny_guide, tiny_model, worst_error

from gradcache_clip.integrations.sentence_transformers import (
    CachedDistillKLDivLoss,
    CachedGISTEmbedLoss,
    CachedMarginMSELoss,
    CachedMultipleNegativesRankingLoss,
)

ROWS = 9
ALL = ("query_to_doc", "doc_to_query", "query_to_query", "doc_to_doc")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny_sentences")


def texts(count: int) -> list[list[str]]:
    """Two rows have one positive."""
    made = [*columns(ROWS, count).values()]
    made[1][4] = made[1][2]
    return made


def gradients(loss: Any, count: int, labels: Any = None) -> Tensor:
    """Fill `.grad`; the loss."""
    features = [loss.model.preprocess(each) for each in texts(count)]
    value = loss(features, torch.empty(0) if labels is None else labels)
    (0.25 * value).backward()
    return value.detach()


def compare(ours: Any, plain: Any, count: int, labels: Any = None) -> None:
    """In fp64, to 1e-10."""
    got, expected = (gradients(each, count, labels) for each in (ours, plain))
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    assert worst_error(ours.model, plain.model)[1] < 1e-10


def doubles(folder: Path) -> list[Any]:
    return [tiny_model(folder).double() for _ in range(2)]


# In-batch negatives


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize(
    "options",
    [
        {"directions": ALL},
        {"directions": ALL[:2]},
        {"directions": ALL[::2], "hardness_mode": "in_batch_negatives", "hardness_strength": 9.0},
        {"hardness_mode": "hard_negatives", "hardness_strength": 5.0},
        {"directions": ALL, "hardness_mode": "all_negatives", "hardness_strength": 3.0},
    ],
    ids=["all", "joint", "in-batch", "hard", "all hard"],
)
def test_directions_and_hardness(folder: Path, options: dict[str, Any], count: int) -> None:
    ours, plain = doubles(folder)
    mine = CachedMultipleNegativesRankingLoss(ours, mini_batch_size=4, **options)
    compare(mine, theirs.MultipleNegativesRankingLoss(plain, **options), count)
    config = theirs.CachedMultipleNegativesRankingLoss(plain, **options).get_config_dict()
    assert mine.get_config_dict().items() >= {**config, "mini_batch_size": 4}.items()


def test_a_strength_without_a_mode_has_no_effect(folder: Path) -> None:
    ours, plain = doubles(folder)
    mine = CachedMultipleNegativesRankingLoss(ours, hardness_strength=4.0)
    compare(mine, theirs.MultipleNegativesRankingLoss(plain, hardness_strength=4.0), 3)


@pytest.mark.parametrize("wrapped", [False, True])
def test_widths_of_any_objective(folder: Path, wrapped: bool) -> None:
    """By `matryoshka_dims`, and from the library's `MatryoshkaLoss` around the loss."""
    ours, plain = doubles(folder)
    options = {"directions": ALL, "hardness_mode": "all_negatives", "hardness_strength": 3.0}
    widths = {"matryoshka_dims": [32, 8], "matryoshka_weights": [1.0, 0.5]}
    build = partial(CachedMultipleNegativesRankingLoss, ours, mini_batch_size=4, **options)
    mine = theirs.MatryoshkaLoss(ours, build(), **widths) if wrapped else build(**widths)
    inner = theirs.MultipleNegativesRankingLoss(plain, **options)
    compare(mine, theirs.MatryoshkaLoss(plain, inner, **widths), 3)


def test_progress_is_shown_on_request(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = tiny_model(folder)
    gradients(CachedMultipleNegativesRankingLoss(model, mini_batch_size=4), 2)
    assert "Embed" not in capfd.readouterr().err
    gradients(CachedMultipleNegativesRankingLoss(model, show_progress_bar=True), 2)
    assert "Embed" in capfd.readouterr().err


# A guide


def gist(
    folder: Path, count: int, options: dict[str, Any], guide: Any, **ours_too: Any
) -> tuple[Any, Any]:
    """Our loss and the library's."""
    ours, plain = doubles(folder)
    mine = CachedGISTEmbedLoss(ours, guide, mini_batch_size=4, **options, **ours_too)
    # The loss without caching takes three columns at most.
    if count > 3:
        return mine, theirs.CachedGISTEmbedLoss(plain, guide, mini_batch_size=4, **options)
    return mine, theirs.GISTEmbedLoss(plain, guide, **options)


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"margin": 0.05, "temperature": 0.05, "contrast_anchors": False},
        {"margin": 0.2, "margin_strategy": "relative", "contrast_positives": False},
    ],
    ids=["defaults", "absolute", "relative"],
)
def test_a_guide_with_the_tokens_of_the_model(
    folder: Path, options: dict[str, Any], count: int
) -> None:
    guide = tiny_guide(folder).double()
    compare(*gist(folder, count, options, guide), count)
    # The guide must matter.
    model = tiny_model(folder).double()
    off = CachedGISTEmbedLoss(model, guide, margin=-3.0, mini_batch_size=4)
    on = CachedGISTEmbedLoss(model, guide, mini_batch_size=4)
    assert gradients(on, count) < gradients(off, count) - 1e-3


def test_a_guide_with_tokens_of_its_own(folder: Path, tmp_path: Path) -> None:
    guide = tiny_guide(tmp_path, vocab_size=300).double()
    mine, plain = gist(folder, 3, {"margin": 0.05}, guide)
    assert mine.must_retokenize and plain.must_retokenize
    compare(mine, plain, 3)
    assert all(parameter.grad is None for parameter in guide.parameters())


def test_an_anchor_that_is_its_positive_is_no_negative_of_itself(folder: Path) -> None:
    """Its similarity to itself is the pair's: in the library rounding decides."""
    guide, same = tiny_guide(folder).double(), sentences(ROWS, 9, seed=5)
    mine, _ = gist(folder, 2, {}, guide)
    # The smallest margin that leaves it out.
    _, plain = gist(folder, 2, {"margin": 1e-9}, guide)
    got, expected = (
        loss([loss.model.preprocess(same) for _ in range(2)], torch.empty(0))
        for loss in (mine, plain)
    )
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_widths_and_token_budgets_with_a_guide(folder: Path) -> None:
    guide, widths = tiny_guide(folder).double(), {"matryoshka_dims": [32, 8]}
    mine, plain = gist(folder, 3, {}, guide, **widths, mini_batch_num_tokens=60)
    compare(mine, theirs.MatryoshkaLoss(plain.model, plain, **widths), 3)


def test_a_guide_evaluates_and_goes_on_as_it_was(folder: Path) -> None:
    """The library's guide draws dropout masks while it trains."""
    guide = tiny_guide(folder, dropout=0.5).double().train()
    guide[1].eval()
    mine, plain = gist(folder, 2, {}, guide)
    got = gradients(mine, 2)
    assert guide[0].training and not guide[1].training
    torch.testing.assert_close(got, gradients(plain_with(plain, guide.eval()), 2))


def plain_with(loss: Any, guide: Any) -> Any:
    loss.guide = guide
    return loss


def test_a_model_guides_itself(folder: Path) -> None:
    ours, plain = doubles(folder)
    mine = CachedGISTEmbedLoss(ours, ours, mini_batch_size=4)
    compare(mine, theirs.GISTEmbedLoss(plain, plain), 3)


# Scores of a teacher


def scores(K: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return 4 * torch.randn(ROWS, 1 + K, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("K", [1, 3])
@pytest.mark.parametrize("similarity", [pairwise_dot_score, pairwise_cos_sim])
def test_margins(folder: Path, K: int, similarity: Any) -> None:
    given = scores(K)
    labels = [given, given[:, :1] - given[:, 1:]]
    for each in labels + [labels[1][:, 0]] * (K == 1):
        ours, plain = doubles(folder)
        mine = CachedMarginMSELoss(ours, similarity, mini_batch_size=4)
        compare(mine, theirs.MarginMSELoss(plain, similarity), 2 + K, each)


@pytest.mark.parametrize("K", [1, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 2.0, "similarity_fct": pairwise_cos_sim},
        {"student_temperature": 0.5, "teacher_temperature": 3.0},
    ],
)
def test_kl(folder: Path, K: int, options: dict[str, Any]) -> None:
    given = scores(K)
    given[2, 1] = -torch.inf
    ours, plain = doubles(folder)
    mine = CachedDistillKLDivLoss(ours, mini_batch_size=4, **options)
    compare(mine, theirs.DistillKLDivLoss(plain, **options), 2 + K, given)
    config = theirs.DistillKLDivLoss(plain, **options).get_config_dict()
    names = config.keys() - {"similarity_fct"}
    assert all(mine.get_config_dict()[name] == config[name] for name in names)


class Sum(nn.Module):
    """Two of the library's losses."""

    def __init__(self, model: Any, losses: Sequence[Any], weights: Sequence[float]) -> None:
        super().__init__()
        self.model, self.losses, self.weights = model, losses, weights

    def forward(self, features: list[dict[str, Any]], labels: Tensor) -> Tensor:
        pairs = zip(self.losses, self.weights, strict=True)
        return sum(w * loss([{**each} for each in features], labels) for loss, w in pairs)


@pytest.mark.parametrize(
    ("widths", "wrapped"), [(None, False), ([32, 8], False), ([32, 8, 3], True)]
)
def test_in_batch_negatives_beside_the_scores(
    folder: Path, widths: list[int] | None, wrapped: bool
) -> None:
    """Of three candidates the scores stay whole, at any width."""
    ours, plain = doubles(folder)
    options = {"in_batch_weight": 0.3, "in_batch_scale": 10.0}
    parts = [theirs.MarginMSELoss(plain), theirs.MultipleNegativesRankingLoss(plain, 10.0)]
    if widths is not None:
        parts = [theirs.MatryoshkaLoss(plain, each, widths) for each in parts]
    build = partial(CachedMarginMSELoss, ours, mini_batch_size=4, **options)
    mine = (
        theirs.MatryoshkaLoss(ours, build(), widths) if wrapped else build(matryoshka_dims=widths)
    )
    compare(mine, Sum(plain, parts, [1.0, 0.3]), 4, scores(2))


# Errors


def test_what_they_refuse(folder: Path) -> None:
    model = tiny_model(folder)
    build = partial(CachedGISTEmbedLoss, model)
    with pytest.raises(TypeError, match="guide: expected a SentenceTransformer, got 'mpnet'"):
        build("mpnet")
    with pytest.raises(ValueError, match="guide: expected one with a tokenizer of transformers"):
        build(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="margin_strategy: expected"):
        build(model, margin_strategy="some")
    with pytest.raises(ValueError, match="margin: expected a finite number, got nan"):
        build(model, margin=float("nan"))
    with pytest.raises(ValueError, match="temperature: expected a number above zero, got 0"):
        build(model, temperature=0)
    with pytest.raises(ValueError, match="in_batch_weight: expected a number above zero, got -1"):
        CachedMarginMSELoss(model, in_batch_weight=-1)
    with pytest.raises(ValueError, match="similarity_fct: .*_dot_score or pairwise_cos_sim, got"):
        CachedMarginMSELoss(model, dot_score)
    with pytest.raises(ValueError, match="teacher_temperature: expected a number above zero"):
        CachedDistillKLDivLoss(model, teacher_temperature=-1.0)
    for loss in (CachedMarginMSELoss(model), CachedDistillKLDivLoss(model)):
        with pytest.raises(
            ValueError, match="at least 3 columns, anchors, positives and negatives"
        ):
            gradients(loss, 2, scores(1))
        with pytest.raises(ValueError, match=r"labels: expected \(9, 3\) scores.* shape \(9, 4\)"):
            gradients(loss, 4, scores(3))
        with pytest.raises(TypeError, match="labels: expected a tensor of scores, got NoneType"):
            loss([model.preprocess(each) for each in texts(3)])
    with pytest.raises(ValueError, match="teacher scores contain NaN"):
        gradients(CachedDistillKLDivLoss(model), 3, torch.full((ROWS, 2), torch.nan))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_options_cannot_be_replaced_without_effect(folder: Path) -> None:
    model = tiny_model(folder)
    loss = CachedMultipleNegativesRankingLoss(model)
    for name, value in (("directions", ALL), ("matryoshka_dims", [8])):
        with pytest.raises(AttributeError, match=f"{name}: expected that of the constructor"):
            setattr(loss, name, value)
    guided = CachedGISTEmbedLoss(model, tiny_guide(folder))
    guided.temperature = 0.0
    with pytest.raises(ValueError, match="temperature: expected a number above zero, got 0.0"):
        gradients(guided, 2)
    loss.scale = 5.0
    got, expected = (
        gradients(loss, 2),
        gradients(theirs.MultipleNegativesRankingLoss(model, 5.0), 2),
    )
    torch.testing.assert_close(got, expected)
    with pytest.raises(ValueError, match="scale: expected a fixed one, got learnable_scale=True"):
        CachedMultipleNegativesRankingLoss(model, learnable_scale=True).scale = 5.0


def test_texts_that_a_guide_cannot_tokenize_again(folder: Path, tmp_path: Path) -> None:
    loss = CachedGISTEmbedLoss(tiny_model(folder), tiny_guide(tmp_path, vocab_size=300))
    with pytest.raises(ValueError, match="guide: expected texts, to tokenize them again, got"):
        loss([{"pixel_values": torch.zeros(2, 3)}] * 2)


def test_unpadded_texts_are_decoded_row_by_row(folder: Path, tmp_path: Path) -> None:
    model, guide = tiny_model(folder), tiny_guide(tmp_path, vocab_size=300)
    loss, given = CachedGISTEmbedLoss(model, guide), sentences(5, 12, seed=4)
    seen = []
    guide.preprocess = lambda decoded: seen.append(decoded) or {}
    ids = [torch.tensor(model.tokenizer(each)["input_ids"]) for each in given]
    bounds = torch.tensor([0, *map(len, ids)]).cumsum(0)
    loss._retokenized({"input_ids": torch.cat(ids)[None], "cu_seq_lens_q": bounds})
    loss._retokenized(model.preprocess(given))
    assert [each.strip() for each in seen[0]] == [each.strip() for each in seen[1]] == given
