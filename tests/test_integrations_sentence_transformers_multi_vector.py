"""Losses over token vectors beside sentence-transformers' own, and those for PyLate's models."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("sentence_transformers")

from sentence_transformers.multi_vector_encoder import losses as theirs
from sentence_transformers.multi_vector_encoder import scoring
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss
from tiny_sentences import columns, sentences, tiny_model, worst_error
from tiny_tokens import (
    EXPANSION,
    SKIPLIST,
    exact_own_scores,
    exact_pair_scores,
    exact_scores,
    mean_over_tokens,
    tiny_tokens,
    token_columns,
)

from gradcache_clip.integrations import pylate
from gradcache_clip.integrations import sentence_transformers_multi_vector as ours

ROWS = 9
UNSEEN = {"query_expansion": {**EXPANSION, "attend": False}}
SEEN = {"query_expansion": {**EXPANSION, "attend": True}}
LEFT = {"processor_kwargs": {"padding_side": "left"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny_tokens")


def gradients(loss: Any, columns: list[dict[str, Any]], labels: Tensor | None = None) -> Tensor:
    """Fill `.grad`; the loss."""
    value = loss([dict(each) for each in columns], labels)
    (0.25 * value).backward()
    return value.detach()


def compare(mine: Any, plain: Any, columns: list[dict[str, Any]], labels: Any = None) -> None:
    """In fp64, to 1e-10."""
    got, expected = (gradients(each, columns, labels) for each in (mine, plain))
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    assert worst_error(mine.model, plain.model)[1] < 1e-10


def scores(candidates: int) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return 3 * torch.randn(ROWS, candidates, generator=generator).double()


# Their losses


@pytest.mark.parametrize(
    ("encoder", "count", "options"),
    [
        ({}, 2, {"mini_batch_size": 4}),
        ({}, 4, {"mini_batch_num_tokens": 40, "scale": 2.0}),
        (UNSEEN, 2, {"mini_batch_size": 5, "mean": True}),
        (UNSEEN, 3, {"mini_batch_num_tokens": 50}),
        (SEEN, 3, {"mini_batch_size": 32, "score_mini_batch_size": 2}),
    ],
    ids=["pairs", "negatives", "expansion, mean", "expansion, tokens", "attended expansion"],
)
def test_in_batch_negatives(
    folder: Path, encoder: dict[str, Any], count: int, options: dict[str, Any]
) -> None:
    mine, plain = (tiny_tokens(folder, **encoder) for _ in range(2))
    columns = token_columns(mine, count)
    assert not torch.equal(mine(dict(columns[1]))["attention_mask"], columns[1]["attention_mask"])
    mean, scale = options.pop("mean", False), options.get("scale", 1.0)
    if mean:
        options["similarity_fct"] = scoring.mean_colbert_scores
    exact = mean_over_tokens(exact_scores) if mean else exact_scores
    loss = ours.CachedMultiVectorMultipleNegativesRankingLoss(mine, **options)
    build = theirs.MultiVectorMultipleNegativesRankingLoss
    compare(loss, build(plain, scale=scale, similarity_fct=exact), columns)
    config = theirs.CachedMultiVectorMultipleNegativesRankingLoss(plain, **options)
    wanted = config.get_config_dict()
    wanted["score_mini_batch_size"] = options.get("score_mini_batch_size")
    assert loss.get_config_dict().items() >= wanted.items()


@pytest.mark.parametrize("similarity", ["maxsim", "meanmaxsim"])
@pytest.mark.parametrize(
    ("cached", "exact"),
    [
        (
            "CachedMultiVectorMultipleNegativesRankingLoss",
            "MultiVectorMultipleNegativesRankingLoss",
        ),
        ("CachedMultiVectorMarginMSELoss", "MultiVectorMarginMSELoss"),
        ("CachedMultiVectorDistillKLDivLoss", "MultiVectorDistillKLDivLoss"),
    ],
)
def test_in_fp32_it_is_the_loss_as_the_library_has_it(
    folder: Path, cached: str, exact: str, similarity: str
) -> None:
    """Without a `similarity_fct`, whose default depends on the version and on the model."""
    mine, plain = (tiny_tokens(folder).float() for _ in range(2))
    columns, labels = token_columns(mine, 3), scores(2).float()
    losses = getattr(ours, cached)(mine, mini_batch_size=4), getattr(theirs, exact)(plain)
    mine.similarity_fn_name = plain.similarity_fn_name = similarity
    got, expected = (gradients(each, columns, labels) for each in losses)
    torch.testing.assert_close(got, expected)
    assert worst_error(mine, plain)[1] < 1e-4


def test_chunks_of_tokens_padded_on_the_left_are_small_and_trimmed(folder: Path) -> None:
    mine, seen = tiny_tokens(folder, **LEFT), list[tuple[int, int]]()
    columns = token_columns(mine, 4)
    # Positions counted from the mask, as decoders count them.
    for each in columns:
        each["position_ids"] = (each["attention_mask"].cumsum(1) - 1).clamp_min(0)
    plain = tiny_tokens(folder, **LEFT)
    loss = ours.CachedMultiVectorMultipleNegativesRankingLoss(mine, mini_batch_num_tokens=24)
    exact = theirs.MultiVectorMultipleNegativesRankingLoss(plain, similarity_fct=exact_scores)
    compare(loss, exact, columns)
    mine[0].register_forward_pre_hook(lambda _, x: seen.append(tuple(x[0]["input_ids"].shape)))
    gradients(loss, columns)
    assert max(rows * width for rows, width in seen) <= 24
    assert len({width for _, width in seen}) > 4


@pytest.mark.parametrize("wrapped", [False, True])
def test_widths(folder: Path, wrapped: bool) -> None:
    """By `matryoshka_dims`, and from the library's `MatryoshkaLoss` around the loss."""
    mine, plain = (tiny_tokens(folder) for _ in range(2))
    widths = {"matryoshka_dims": [16, 8], "matryoshka_weights": [1.0, 0.5]}
    build = partial(ours.CachedMultiVectorMultipleNegativesRankingLoss, mine, mini_batch_size=4)
    loss = MatryoshkaLoss(mine, build(), **widths) if wrapped else build(**widths)
    # Without caching the library has no widths for token vectors.
    cached = theirs.CachedMultiVectorMultipleNegativesRankingLoss
    inner = cached(plain, mini_batch_size=4, similarity_fct=exact_scores)
    compare(loss, MatryoshkaLoss(plain, inner, **widths), token_columns(mine, 3))


@pytest.mark.parametrize("mean", [False, True], ids=["sum", "mean"])
def test_margins(folder: Path, mean: bool) -> None:
    mine, plain = (tiny_tokens(folder, **UNSEEN) for _ in range(2))
    chosen = {"similarity_fct": scoring.mean_colbert_scores_pairwise} if mean else {}
    loss = ours.CachedMultiVectorMarginMSELoss(mine, mini_batch_size=4, **chosen)
    exact = mean_over_tokens(exact_pair_scores) if mean else exact_pair_scores
    labels = scores(3)[:, : 2 + mean]
    compare(
        loss,
        theirs.MultiVectorMarginMSELoss(plain, similarity_fct=exact),
        token_columns(mine, 4),
        labels,
    )


@pytest.mark.parametrize(
    "options", [{"temperature": 2.0}, {"student_temperature": 0.5, "teacher_temperature": 3.0}]
)
def test_kl(folder: Path, options: dict[str, float]) -> None:
    mine, plain = (tiny_tokens(folder) for _ in range(2))
    loss = ours.CachedMultiVectorDistillKLDivLoss(mine, mini_batch_num_tokens=40, **options)
    exact = theirs.MultiVectorDistillKLDivLoss(plain, similarity_fct=exact_own_scores, **options)
    compare(loss, exact, token_columns(mine, 4), scores(3))
    assert loss.get_config_dict()["temperature"] == options.get("temperature", 1.0)


def test_widths_of_a_distillation(folder: Path) -> None:
    """Scores are no features, so they keep their width."""
    mine, plain = (tiny_tokens(folder) for _ in range(2))
    loss = ours.CachedMultiVectorDistillKLDivLoss(mine, matryoshka_dims=[16, 2])
    gradients(loss, token_columns(mine, 4), scores(3))
    for width in (16, 2):

        def prefix(*tokens: Tensor, width: int = width, **masks: Tensor) -> Tensor:
            cut = (F.normalize(each[..., :width], dim=-1) for each in tokens)
            return exact_own_scores(*cut, **masks)

        exact = theirs.MultiVectorDistillKLDivLoss(plain, similarity_fct=prefix)
        gradients(exact, token_columns(plain, 4), scores(3))
    assert worst_error(mine, plain)[1] < 1e-10


def test_two_losses_before_a_backward_keep_their_widths(folder: Path) -> None:
    mine, plain = (tiny_tokens(folder) for _ in range(2))
    loss = ours.CachedMultiVectorMultipleNegativesRankingLoss(mine, mini_batch_size=4)
    exact = theirs.MultiVectorMultipleNegativesRankingLoss(plain, similarity_fct=exact_scores)
    batches = token_columns(mine, 2), token_columns(mine, 3)[::2]
    assert batches[0][1]["input_ids"].shape[1] != batches[1][1]["input_ids"].shape[1]
    for each in (loss, exact):
        sum(each([dict(x) for x in batch], None) for batch in batches).backward()
    assert worst_error(mine, plain)[1] < 1e-10


def test_their_trainer_goes_the_same_way(folder: Path, tmp_path: Path) -> None:
    """With prompts for the columns, and checkpointed layers."""
    pytest.importorskip(
        "accelerate", reason="the trainer of sentence-transformers needs accelerate"
    )
    pytest.importorskip("datasets", reason="the trainer of sentence-transformers needs datasets")
    moved = []
    for library, exact in ((ours, {}), (theirs, {"similarity_fct": exact_scores})):
        model = tiny_tokens(folder)
        encoder = model[0].auto_model
        enable = getattr(encoder, "activation_checkpointing_enable", None)
        (enable or encoder.gradient_checkpointing_enable)()
        build = library.CachedMultiVectorMultipleNegativesRankingLoss
        train(model, build(model, mini_batch_size=3, **exact), tmp_path)
        moved.append(torch.cat([each.detach().flatten() for each in model.parameters()]))
    before = torch.cat([each.detach().flatten() for each in tiny_tokens(folder).parameters()])
    assert (moved[1] - before).norm() > 1e-2
    assert (moved[0] - moved[1]).norm() < 1e-8 * (moved[1] - before).norm()


def train(model: Any, loss: Any, output: Path) -> None:
    from datasets import Dataset
    from sentence_transformers import (
        MultiVectorEncoderTrainer,
        MultiVectorEncoderTrainingArguments,
    )

    arguments = MultiVectorEncoderTrainingArguments(
        str(output), per_device_train_batch_size=8, max_steps=2, learning_rate=1e-1, use_cpu=True,
        optim="sgd", max_grad_norm=0.0, report_to="none",
        save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
        prompts={"anchor": "small ", "positive": "large mark ", "negative_1": "mark "},
    )  # fmt: skip
    data = Dataset.from_dict(columns(16, 3))
    MultiVectorEncoderTrainer(model, arguments, train_dataset=data, loss=loss).train()


def test_what_it_refuses(folder: Path) -> None:
    model = tiny_tokens(folder)
    build = ours.CachedMultiVectorMultipleNegativesRankingLoss
    with pytest.raises(TypeError, match="model: expected a MultiVectorEncoder, got Sentence"):
        build(tiny_model(folder))
    with pytest.raises(ValueError, match="similarity_fct: expected colbert_scores or mean_"):
        build(model, similarity_fct=scoring.XTRScores())
    with pytest.raises(ValueError, match="score_mini_batch_size: expected a positive integer"):
        build(model, score_mini_batch_size=0)
    columns = token_columns(model, 3)
    with pytest.raises(ValueError, match="at least 2 columns"):
        build(model)(columns[:1])
    with pytest.raises(TypeError, match="token_embeddings and attention_mask, got input_ids"):
        build(_Ids())(columns)
    kl = ours.CachedMultiVectorDistillKLDivLoss(model)
    with pytest.raises(ValueError, match=r"labels: expected \(9, 2\) scores"):
        kl(columns, scores(3))
    with pytest.raises(TypeError, match="labels: expected a tensor of scores"):
        ours.CachedMultiVectorMarginMSELoss(model)(columns)
    assert all(parameter.grad is None for parameter in model.parameters())


class _Ids(torch.nn.Module):
    def forward(self, input: dict[str, Any], task: str) -> dict[str, Any]:
        return {"input_ids": input["input_ids"]}


# PyLate's models, whose losses normalise and mask


def colbert(folder: Path, expansion: bool) -> Any:
    """A stand-in with what the losses read of a `ColBERT`; it takes no task."""
    model = tiny_tokens(folder, bare=True)
    model.skiplist = model.tokenizer.convert_tokens_to_ids(SKIPLIST)
    model.do_query_expansion = expansion
    return model


def without_tasks(columns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    left_out = "task", "query_expansion_positions"
    return [{k: x for k, x in each.items() if k not in left_out} for each in columns]


@pytest.mark.parametrize("expansion", [False, True])
def test_pylate_in_batch_negatives(folder: Path, expansion: bool) -> None:
    mine, plain = colbert(folder, expansion), tiny_tokens(folder, **UNSEEN if expansion else {})
    columns = token_columns(plain, 4)
    loss = pylate.CachedContrastive(mine, mini_batch_size=4, temperature=0.5)
    build = theirs.MultiVectorMultipleNegativesRankingLoss
    exact = build(plain, scale=2.0, similarity_fct=exact_scores)
    torch.testing.assert_close(
        gradients(loss, without_tasks(columns)), gradients(exact, columns), rtol=1e-10, atol=0
    )
    assert worst_error(mine, plain)[1] < 1e-10


@pytest.mark.parametrize("normalize", [True, False])
def test_pylate_distillation(folder: Path, normalize: bool) -> None:
    """Documents lie query by query in one column; scores are moved to [0, 1] unless told not to."""
    mine, plain = colbert(folder, False), tiny_tokens(folder)
    queries = token_columns(plain)[0]
    documents = {**plain.preprocess(sentences(3 * ROWS, 12, 7), task="document")}
    given, labels = without_tasks([queries, documents]), scores(3)
    loss = pylate.Distillation(mine, normalize_scores=normalize, mini_batch_size=4)
    got = gradients(loss, given, labels)
    outputs = [plain(dict(queries), task="query"), plain(dict(documents), task="document")]
    tokens, masks = (
        [each[key] for each in outputs] for key in ("token_embeddings", "attention_mask")
    )
    own = [each.unflatten(0, (ROWS, 3)) for each in (tokens[1], masks[1])]
    student = exact_own_scores(tokens[0], own[0], masks[0].bool(), own[1].bool())
    if normalize:
        least, most = student.amin(1, keepdim=True), student.amax(1, keepdim=True)
        student = (student - least) / (most - least + 1e-8)
    targets = labels.log_softmax(1)
    expected = F.kl_div(student.log_softmax(1), targets, reduction="batchmean", log_target=True)
    (0.25 * expected).backward()
    torch.testing.assert_close(got, expected.detach(), rtol=1e-10, atol=0)
    assert worst_error(mine, plain)[1] < 1e-10


def test_pylate_refuses_other_models_and_metrics(folder: Path) -> None:
    with pytest.raises(TypeError, match="model: expected PyLate's ColBERT, got MultiVector"):
        pylate.CachedContrastive(tiny_tokens(folder))
    with pytest.raises(ValueError, match="score_metric: expected None"):
        pylate.Distillation(colbert(folder, True), score_metric=exact_scores)
