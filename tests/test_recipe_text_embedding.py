"""recipes/text_embedding.yaml: the objective is the formula of its page, over texts alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from processes import assert_same_run, in_processes
from recipe_runs import assert_trains_and_resumes, recipe, run_recipe, shortened
from rich.console import Console
from text_files import make_texts, names, write_lines
from tiny_run import logged
from torch import Tensor, nn
from trainer_step import assert_step_equals, session_of

from gradcache_clip.cli import main
from gradcache_clip.train import loop
from gradcache_clip.train.config import ConfigError
from gradcache_clip.train.config_file import load_config
from gradcache_clip.train.evaluation.evaluate_run import evaluate_run
from gradcache_clip.train.evaluation.held_out_texts import HeldOutTexts
from gradcache_clip.train.objective import build_objective
from gradcache_clip.train.report.pictures import draw_run, run_curve
from gradcache_clip.train.report.text_gallery import draw_text_gallery
from gradcache_clip.train.run_folder import RunFolder

TINY_BERT = (
    "{hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 32,"
    " hidden_dropout_prob: 0, attention_probs_dropout_prob: 0, initializer_range: 0.25}"
)
SMALL = (
    "data.tokenizer=train",
    "data.context_length=24",
    "data.vocab_size=400",
    "model.text=bert",
    "model.text_pretrained=false",
    f"model.text_kwargs={TINY_BERT}",
    "model.feature_dim=16",
    "loss.matryoshka=[4,8,16]",
    "train.chunk_tokens=70",
)
DROPOUT = "model.text_kwargs.hidden_dropout_prob=0.1"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_texts(tmp_path_factory.mktemp("texts"))


def run_small(data: Path, output: Path, *more: str) -> loop.RunSummary:
    return run_recipe("text_embedding", data, output, *SMALL, *more)


def of_the_page(
    features: list[Tensor], scale: float, widths: list[int], texts: list[str], ignore: bool
) -> Tensor:
    """sum over widths of -1/B sum_i log(exp(s cos(q_i, d_i)) / Z_i), one i and one j at a time."""
    queries, candidates = features[0], torch.cat(features[1:])
    total = torch.zeros((), dtype=queries.dtype)
    for width in widths:
        for i, query in enumerate(queries):
            cosines = F.cosine_similarity(query[None, :width], candidates[:, :width])
            logits = scale * cosines
            others = [
                logits[j].exp()
                for j in range(len(candidates))
                if j == i or not (ignore and texts[j] == texts[i])
            ]
            total = total - (logits[i].exp() / torch.stack(others).sum()).log() / len(queries)
    return total


@pytest.mark.parametrize("count", [2, 3, 4], ids=["pairs", "triplets", "two negatives"])
@pytest.mark.parametrize("positives", ["pair", "ignore"])
@pytest.mark.parametrize("widths", [[4, 8, 16], []], ids=["three widths", "one width"])
def test_the_step_is_the_formula(data, tmp_path, count, positives, widths):
    fields = ",".join(names(count))
    more = (f"data.text_fields=[{fields}]", f"loss.positives={positives}")
    settings = shortened(data, tmp_path / "run", *SMALL, *more, f"loss.matryoshka={widths}")
    session = session_of(recipe("text_embedding"), settings, tmp_path / "run")
    repeated = []

    def formula(*arguments) -> Tensor:
        *features, loss, texts = arguments
        assert len(features) == min(count, 3) and len(texts) == 24 * (count - 1)
        assert float(loss.logit_scale.detach()) == pytest.approx(20)
        repeated.append(len(texts) - len(set(texts)))
        scale, ignore = float(loss.logit_scale.detach()), positives == "ignore"
        return of_the_page(features, scale, widths or [16], texts, ignore)

    output = assert_step_equals(session, formula)
    assert repeated[0] > 0, "else nothing would be ignored"
    assert 0 <= output.accuracy <= 1


def test_chunks_by_rows_or_tokens_are_the_same_step(data, tmp_path):
    losses = []
    for more in (
        ("train.chunk_tokens=70",),
        ("train.chunk_tokens=0",),
        ("train.chunk_tokens=0", "train.sort_by_length=false"),
        ("train.chunk_tokens=70", "train.memory_budget_gib=1", "train.inputs=host"),
    ):
        run = tmp_path / str(len(losses))
        run_small(data, run, *more)
        losses.append(logged(run, "loss"))
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=2e-5)


def test_a_chunk_holds_as_many_tokens_as_asked_for(data, tmp_path):
    session = session_of(recipe("text_embedding"), shortened(data, tmp_path, *SMALL), tmp_path)
    sorting = session.objective.sort_by_length
    assert [each.max_tokens for each in sorting] == [70, 70, 70]
    pairs = load_config(None, ["train.sort_by_length=true", "train.chunk_tokens=9"])
    images, texts = build_objective(pairs).sort_by_length
    assert images is None and texts.max_tokens == 9


def test_a_short_run_resumes_exactly(data, tmp_path):
    summary = assert_trains_and_resumes(
        "text_embedding", data, tmp_path, *SMALL, DROPOUT, "evaluation.at_start=false"
    )
    recalls = {f"recall_at_{k}{end}" for k in (1, 5, 10) for end in ("", "_chance")}
    shorter = {f"recall_at_{k}_of_{width}_numbers" for k in (1, 5, 10) for width in (4, 8)}
    expected = {*recalls, *shorter, "median_rank", "mean_rank"}
    assert set(summary.metrics) == {f"query_to_document_{name}" for name in expected}
    assert logged(tmp_path / "whole", "logit_scale")[4] == pytest.approx(20)


def test_the_run_learns_and_shows_what_it_knew_before(data, tmp_path):
    more = ("train.steps=40", "optimizer.learning_rate=0.01", "train.batch_size=64")
    summary = run_small(data, tmp_path / "run", *more)
    losses, name = logged(tmp_path / "run", "loss"), "query_to_document_recall_at_1"
    assert losses[40] < 0.8 * losses[1]
    recall = logged(tmp_path / "run", name)
    assert sorted(recall) == [0, 40] and recall[40] == summary.metrics[name]
    assert recall[40] > 3 * summary.metrics[f"{name}_chance"] and recall[40] > recall[0]


def test_pictures(data, tmp_path):
    config = load_config(recipe("text_embedding"), shortened(data, tmp_path / "run", *SMALL))
    loop.train(config, console=Console(quiet=True))
    run = RunFolder(tmp_path / "run")
    assert {path.name for path in run.pictures.iterdir()} == {"curves.png", "gallery.png"}
    for path in run.pictures.iterdir():
        assert path.stat().st_size > 10_000
    curve = run_curve(run, config)
    assert curve.candidates == 2 * 24
    assert curve.guessed_loss == pytest.approx(3 * torch.tensor(48.0).log().item(), rel=1e-6)
    assert len(draw_run(run, config, None, None)) == 1


def held_out() -> HeldOutTexts:
    """Two queries of three documents; the second is right by its first two numbers alone."""
    queries = torch.tensor([[3.0, 0, 0, 0], [0, 1, 0, 5]])
    documents = torch.tensor([[1.0, 0, 0, 0], [0, 2, 0, 0], [0, 0, 0, 2]])
    texts = ["a long question " * 20, "b"], ["one", "two " * 40, "three"]
    return HeldOutTexts(queries, documents, *texts, torch.tensor([0, 1]), widths=(2,))


def test_recall_is_by_cosine_of_each_width():
    scalars = held_out().metrics([1, 2]).to_scalars()
    assert scalars["query_to_document_recall_at_1"] == 0.5
    assert scalars["query_to_document_recall_at_2"] == 1.0
    assert scalars["query_to_document_recall_at_1_of_2_numbers"] == 1.0
    assert scalars["query_to_document_recall_at_1_chance"] == pytest.approx(1 / 3)
    assert scalars["query_to_document_mean_rank"] == 1.5


def test_the_gallery_shows_few_texts_and_long_ones(tmp_path):
    path = draw_text_gallery(held_out(), tmp_path / "gallery.png", rows=6)
    assert path.stat().st_size > 5_000
    with pytest.raises(ValueError, match="rows, depth"):
        draw_text_gallery(held_out(), path, depth=6)


def test_equal_documents_are_one_candidate(data, tmp_path):
    rows = [{"anchor": f"red {i}", "positive": "dot", "negative": "bar"} for i in range(3)]
    write_lines(tmp_path / "v.jsonl", [*rows, {**rows[0], "positive": "hook"}])
    summary = run_small(
        data, tmp_path / "run", f"data.validation={tmp_path}/v.jsonl", "train.steps=2"
    )
    assert summary.metrics["query_to_document_recall_at_1_chance"] == pytest.approx(1 / 2)
    assert summary.metrics["query_to_document_recall_at_5"] == 1.0


def test_verify_says_that_it_is_exact(data, tmp_path, capsys):
    settings = shortened(data, tmp_path / "run", *SMALL)
    assert main(["verify", str(recipe("text_embedding")), *settings, "--rows", "12"]) == 0
    assert "exact" in capsys.readouterr().out


def test_evaluate_prints_a_row_for_each_width(data, tmp_path, capsys):
    summary = run_small(data, tmp_path / "run", "train.steps=2")
    found = evaluate_run(tmp_path / "run", device="cpu")
    assert found.to_scalars() == summary.metrics
    out = capsys.readouterr().out
    assert all(f"first {width}" in out for width in (16, 8, 4))
    with pytest.raises(ConfigError, match="templates: expected none"):
        evaluate_run(tmp_path / "run", templates=("a {}",))


def test_a_pretrained_tower_and_the_exported_one_are_what_sentence_transformers_say(
    data, tmp_path, capsys
):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from tiny_sentences import sentences, tiny_model

    theirs = tiny_model(tmp_path / "model")
    model = tmp_path / "model"
    more = (
        *(f"data.tokenizer={model}", f"model.text={model}", "model.text_pretrained=true"),
        *("model.text_kwargs={}", "model.feature_dim=32", "loss.matryoshka=[8,32]"),
    )
    settings = shortened(data, tmp_path / "run", *SMALL, *more)
    session = session_of(recipe("text_embedding"), settings, tmp_path / "new")
    session.encoder.float().eval()
    texts = sentences(9, 20, seed=3)
    assert session.tokenizer is not None
    got = session.encoder(2, session.tokenizer(texts))
    got = got.detach()
    torch.testing.assert_close(got, torch.tensor(theirs.encode(texts)), atol=1e-6, rtol=1e-5)

    run_small(data, tmp_path / "run", *more)
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    assert str(tmp_path / "out") in capsys.readouterr().out
    exported = sentence_transformers.SentenceTransformer(str(tmp_path / "out"), device="cpu")
    from gradcache_clip.train.session import load_trained

    run = RunFolder(tmp_path / "run")
    encoder, tokenizer, _ = load_trained(load_config(run.config), run)
    assert tokenizer is not None
    trained = F.normalize(encoder.eval()(0, tokenizer(texts)), dim=1).detach()
    said = torch.tensor(exported.encode(texts))
    torch.testing.assert_close(said, trained, atol=1e-6, rtol=1e-5)
    assert float((said - F.normalize(got, dim=1)).abs().max()) > 1e-3, "it has learned"
    assert exported.max_seq_length == 24
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 2
    assert "out: expected a new or empty folder" in capsys.readouterr().err


def test_what_cannot_be_exported(data, tmp_path, capsys):
    from gradcache_clip.train.config_file import save_config

    (tmp_path / "images").mkdir()
    save_config(load_config(), tmp_path / "images" / "config.yaml")
    assert main(["export", str(tmp_path / "images"), str(tmp_path / "out")]) == 2
    assert "run: expected one over texts" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "none"), str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.distributed
@pytest.mark.parametrize(
    "engine",
    [
        "ddp",
        pytest.param("fsdp", marks=pytest.mark.slow),
        pytest.param("deepspeed", marks=pytest.mark.slow),
    ],
)
def test_two_processes_are_one(data, tmp_path, engine):
    """Both read one order, so that two ranks of 32 rows hold what one process holds of 64."""
    more = [
        *SMALL, "data.text_fields=[anchor,positive,negative]", "loss.name=info_nce",
        "loss.positives=ignore", "train.sort_by_length=true", "train.batch_size=64",
        "train.steps=3", "train.ema_decay=0", "train.checkpoint_every=0", "data.random_crop=1",
        "model.image_kwargs={}", "model.text_pool=mean", "evaluation.at_start=true",
    ]  # fmt: skip
    if engine == "deepspeed":
        pytest.importorskip("deepspeed")
    if engine != "ddp":
        more.append("train.chunk_tokens=0")
    one, two = tmp_path / "one", tmp_path / "two"
    assert in_processes(1, data, one, *more) == ["finished"]
    assert in_processes(2, data, two, *more, f"distributed.engine={engine}") == ["finished"] * 2
    assert_same_run(two, one)
    summaries = [json.loads((run / "summary.json").read_text()) for run in (one, two)]
    assert summaries[0]["metrics"] == pytest.approx(summaries[1]["metrics"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data.text_fields=[]", "data.text_fields: expected the fields of queries and documents"),
        ("data.text_fields=[a]", "data.text_fields: expected two or more different names"),
        ("data.text_fields=[a,a]", "data.text_fields: expected two or more different names"),
        ("loss.name=clip", "loss.name: expected 'info_nce' with data.text_fields, got 'clip'"),
        ("loss.positives=group", "loss.positives: expected pair or ignore with loss.name=info_nce"),
        ("loss.label_smoothing=0.1", "loss.label_smoothing: expected 0.0 with loss.name=info_nce"),
        ("data.views=2", "data.views: expected 1 with data.text_fields, got 2"),
        ("model.freeze=text", "model.freeze: expected '' with data.text_fields, got 'text'"),
        ("train.negatives=chunk", "train.negatives: expected 'batch' with data.text_fields"),
        ("evaluation.folds=2", "evaluation.folds: expected 1 with data.text_fields, got 2"),
        ("train.sort_by_length=false", "train.sort_by_length: expected true with train.chunk_tok"),
        ("train.chunk_tokens=-1", "train.chunk_tokens: expected at least 0, got -1"),
        (
            "distributed.engine=fsdp",
            "train.chunk_tokens: expected 0 without distributed.engine=ddp",
        ),
        ("loss.matryoshka=[4,8]", "loss.matryoshka: expected rising widths that end with model"),
    ],
)
def test_what_does_not_go_together_is_refused(data, tmp_path, change, message):
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
        run_small(data, tmp_path / "run", change)
    assert not (tmp_path / "run").exists()


def test_the_width_is_that_of_the_model(data, tmp_path):
    with pytest.raises(ConfigError, match="model.feature_dim: expected the width of 'bert', which"):
        run_small(data, tmp_path / "run", "model.feature_dim=8", "loss.matryoshka=[8]")
    assert not (tmp_path / "run").exists()


def test_a_missing_validation_file_is_found_before_training(data, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected a \.jsonl file"):
        run_small(data, tmp_path / "run", f"data.validation={tmp_path}/none.jsonl")
    assert not (tmp_path / "run").exists()


def test_plan_says_what_bounds_the_memory(capsys):
    assert main(["plan", str(recipe("text_embedding")), "--gpu", "24GB"]) == 2
    assert "train.chunk_tokens" in capsys.readouterr().err


def test_no_module_of_the_encoder_is_left_without_a_gradient(data, tmp_path):
    session = session_of(recipe("text_embedding"), shortened(data, tmp_path, *SMALL), tmp_path)
    assert isinstance(session.encoder, nn.Module)
    names_of = [name for name, p in session.encoder.named_parameters() if not p.requires_grad]
    assert names_of == [] and not hasattr(session.encoder, "image_tower")
