"""recipes/text_embedding.yaml: the objective is the formula of its page, over texts alone."""

from __future__ import annotations

import json
import re
from contextlib import closing
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from processes import assert_same_run, in_processes
from recipe_runs import assert_trains_and_resumes, recipe, shortened
from text_files import make_teacher, make_texts, names, write_lines
from text_runs import SMALL, run_small
from tiny_run import logged
from torch import Tensor
from trainer_step import assert_step_equals, trainer_of

from gradcache_clip import RetrievalLoss
from gradcache_clip.cli import main
from gradcache_clip.losses.retrieval_contrasts import DIRECTIONS
from gradcache_clip.train import run as training
from gradcache_clip.train.config_errors import ConfigError
from gradcache_clip.train.config_file import load_config
from gradcache_clip.train.programs import program_of
from gradcache_clip.train.report.metrics_log import read_log

DROPOUT = "model.text_kwargs.hidden_dropout_prob=0.1"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_texts(tmp_path_factory.mktemp("texts"))


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
    trainer = trainer_of(recipe("text_embedding"), settings, tmp_path / "run")
    repeated = []

    def formula(*arguments) -> Tensor:
        *features, loss, texts = arguments
        assert len(features) == min(count, 3) and len(texts) == 24 * (count - 1)
        assert float(loss.logit_scale.detach()) == pytest.approx(20)
        repeated.append(len(texts) - len(set(texts)))
        scale, ignore = float(loss.logit_scale.detach()), positives == "ignore"
        return of_the_page(features, scale, widths or [16], texts, ignore)

    output = assert_step_equals(trainer, formula)
    assert repeated[0] > 0, "else nothing would be ignored"
    assert 0 <= output.accuracy <= 1


@pytest.mark.parametrize("count", [2, 4], ids=["pairs", "two negatives"])
def test_the_retrieval_loss_is_that_of_the_library(data, tmp_path, count):
    more = [f"data.text_fields=[{','.join(names(count))}]", "loss.name=retrieval"]
    more += ["loss.directions=[query_to_doc,doc_to_query,query_to_query,doc_to_doc]"]
    more += ["loss.hardness_mode=all_negatives", "loss.hardness_strength=3"]
    more += ["loss.positives=ignore", "loss.matryoshka=[]"]
    settings = shortened(data, tmp_path / "run", *SMALL, *more)
    trainer = trainer_of(recipe("text_embedding"), settings, tmp_path / "run")

    def formula(*arguments) -> Tensor:
        *features, loss, texts = arguments
        b, ids = len(features[0]), {text: number for number, text in enumerate(texts)}
        numbers = torch.tensor([ids[text] for text in texts[:b]])
        assert len(numbers.unique()) < b
        own = [each.unflatten(0, (b, count - 2)) for each in features[2:]]
        whole = RetrievalLoss(
            directions=DIRECTIONS,
            hardness_mode="all_negatives",
            hardness_strength=3.0,
            impl="reference",
        ).to(features[0].dtype)
        return whole(*features[:2], *own, logit_scale=loss.logit_scale.detach(), ids=numbers).loss

    assert_step_equals(trainer, formula)


def test_chunks_by_rows_or_tokens_are_the_same_step(data, tmp_path):
    losses = []
    for more in (
        ("train.chunk_tokens=70",),
        ("train.chunk_tokens=0",),
        ("train.chunk_tokens=0", "train.sort_by_length=false"),
        ("train.chunk_tokens=70", "train.memory_budget_gib=1", "train.batch_device=host"),
    ):
        run = tmp_path / str(len(losses))
        run_small(data, run, *more)
        losses.append(logged(run, "loss"))
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=2e-5)


def test_a_chunk_holds_as_many_tokens_as_asked_for(data, tmp_path):
    trainer = trainer_of(recipe("text_embedding"), shortened(data, tmp_path, *SMALL), tmp_path)
    sorting = trainer.program.sort_by_length
    assert [each.max_tokens for each in sorting] == [70, 70, 70]
    pairs = load_config(None, ["train.sort_by_length=true", "train.chunk_tokens=9"])
    images, texts = program_of(pairs).sort_by_length
    assert images is None and texts.max_tokens == 9


def test_a_short_run_resumes_exactly(data, tmp_path):
    summary = assert_trains_and_resumes("text_embedding", data, tmp_path, *SMALL, DROPOUT)
    # At the start and at the end, each once although the other run was stopped in between.
    for run in ("whole", "parts"):
        rows = read_log(tmp_path / run)
        evaluated = [row["step"] for row in rows if "query_to_document_mean_rank" in row]
        assert evaluated == [0, 4], run
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
        "program=texts", *SMALL, "data.text_fields=[anchor,positive,negative]",
        "loss.positives=ignore", "train.sort_by_length=true", "train.batch_size=64",
        "train.steps=3", "train.ema_decay=0", "train.checkpoint_every=0",
        "model.text_pool=mean", "evaluation.at_start=true",
        # Adam makes a full step of a gradient that rounding alone leaves.
        "optimizer.learning_rate=0.0001",
    ]  # fmt: skip
    if engine == "deepspeed":
        pytest.importorskip("deepspeed")
    if engine == "ddp":
        teacher = make_teacher(data, tmp_path / "teacher.safetensors")
        more += [f"loss.teacher={teacher}", "loss.teacher_weight=0.5"]
    else:
        more.append("train.chunk_tokens=0")
    one, two = tmp_path / "one", tmp_path / "two"
    assert in_processes(1, data, one, *more) == ["finished"]
    assert in_processes(2, data, two, *more, f"distributed.strategy={engine}") == ["finished"] * 2
    assert_same_run(two, one)
    summaries = [json.loads((run / "summary.json").read_text()) for run in (one, two)]
    assert summaries[0]["metrics"] == pytest.approx(summaries[1]["metrics"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data.text_fields=[a]", "data.text_fields: expected two or more different names"),
        ("data.text_fields=[a,a]", "data.text_fields: expected two or more different names"),
        ("loss.name=clip", "loss.name: expected one of info_nce, retrieval, got 'clip'"),
        ("loss.positives=group", "loss.positives: expected one of pair, ignore, got 'group'"),
        ("loss.directions=[query_to_doc]", "loss.directions: no such key with loss.name=info_nce"),
        ("loss.label_smoothing=0.1", "loss.label_smoothing: no such key"),
        ("program=views", "data.text_fields: no such key"),
        ("data.random_crop=0.5", "data.random_crop: no such key"),
        ("data.allow_url_schemes=[https]", "data.allow_url_schemes: no such key"),
        ("model.image_pretrained=true", "model.image_pretrained: no such key"),
        ("data.text_prompts=[a]", "data.text_prompts: expected none, or one for queries and one"),
        ("data.validation=", "data.validation: expected something to evaluate on with evaluation"),
        ("model.freeze=text", "model.freeze: no such key"),
        ("train.grad_cache=false", "train.grad_cache: expected true with train.chunk_tokens"),
        ("evaluation.folds=2", "evaluation.folds: no such key"),
        ("train.sort_by_length=false", "train.sort_by_length: expected true with train.chunk_tok"),
        ("train.chunk_tokens=-1", "train.chunk_tokens: expected at least 0, got -1"),
        (
            "distributed.strategy=fsdp",
            "train.chunk_tokens: expected 0 with distributed.strategy=fsdp",
        ),
        (
            "loss.matryoshka=[4,8]",
            "loss.matryoshka: expected increasing widths that end with the",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(data, tmp_path, change, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        run_small(data, tmp_path / "run", change)
    assert not (tmp_path / "run").exists()


def test_the_widest_prefix_is_that_of_the_model(data, tmp_path):
    with pytest.raises(ConfigError, match="loss.matryoshka: .* feature width 16"):
        run_small(data, tmp_path / "run", "loss.matryoshka=[8]")
    assert not (tmp_path / "run").exists()


def test_a_missing_validation_file_is_found_before_training(data, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected a local \.jsonl, .* file"):
        run_small(data, tmp_path / "run", f"data.validation={tmp_path}/none.jsonl")
    assert not (tmp_path / "run").exists()


def test_plan_says_what_bounds_the_memory(capsys):
    assert main(["plan", str(recipe("text_embedding")), "--gpu", "24GB"]) == 2
    assert "train.chunk_tokens" in capsys.readouterr().err


def test_fields_that_no_line_has_are_found_before_training(data, tmp_path):
    message = r"data.text_fields: expected fields of the lines of .*, which have anchor, positive, "
    for change in ("data.text_fields=[query,positive]", "data.text_fields=[anchor,positive,none]"):
        with pytest.raises(ConfigError, match=message):
            run_small(data, tmp_path / "run", change)
    write_lines(tmp_path / "v.jsonl", [{"query": "a", "positive": "b"}])
    with pytest.raises(ConfigError, match="text_fields: .*which have query, positive, got anchor,"):
        run_small(data, tmp_path / "run", f"data.validation={tmp_path}/v.jsonl")
    assert not (tmp_path / "run").exists()


def test_held_out_lines_are_no_training_lines(data, tmp_path):
    more = f"data.train={data}/validation", f"data.validation={data}/validation/*.jsonl"
    with pytest.raises(ConfigError, match="data.validation: expected other files than data.train"):
        run_small(data, tmp_path / "run", *more)
    assert not (tmp_path / "run").exists()


def test_a_first_step_that_fails_leaves_nothing_in_the_way(data, tmp_path):
    """The evaluation before it is no step that could be lost."""
    with (
        mock.patch.object(training, "take_step", side_effect=ValueError("no memory")),
        pytest.raises(ValueError, match="no memory"),
    ):
        run_small(data, tmp_path / "run")
    assert logged(tmp_path / "run", "query_to_document_mean_rank").keys() == {0}
    run_small(data, tmp_path / "run", "train.chunk_tokens=50")
    assert [row["step"] for row in read_log(tmp_path / "run")] == [0, 1, 2, 3, 4, 4]


def test_every_parameter_gets_a_gradient(data, tmp_path):
    """As DDP wants it."""
    trainer = trainer_of(recipe("text_embedding"), shortened(data, tmp_path, *SMALL), tmp_path)
    with closing(trainer.batches()) as batches:
        inputs, loss_kwargs = trainer.inputs_of(next(batches))
    trainer.backward()(*inputs, loss_kwargs=loss_kwargs)
    without = [name for name, p in trainer.encoder.named_parameters() if p.grad is None]
    assert without == []


def test_prompts_stand_before_queries_and_before_all_that_answers(data, tmp_path):
    more = "data.text_prompts=['seek: ','keep: ']", "data.text_fields=[anchor,positive,negative]"
    settings = shortened(data, tmp_path, *SMALL, *more)
    trainer = trainer_of(recipe("text_embedding"), settings, tmp_path)
    with closing(trainer.batches()) as batches:
        queries, documents, negatives = next(batches).texts
    assert all(text.startswith("seek: ") and text != "seek: " for text in queries)
    assert all(text.startswith("keep: ") for text in (*documents, *negatives))
