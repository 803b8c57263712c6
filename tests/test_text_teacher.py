"""`loss.teacher`: a frozen model's features beside those of the texts program."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from recipe_runs import assert_trains_and_resumes, recipe, shortened
from safetensors.torch import save_file
from text_files import make_teacher, make_texts, names, taught
from text_runs import SMALL, run_small
from torch import Tensor
from trainer_step import assert_step_equals, trainer_of, unit

from gradcache_clip import RetrievalLoss
from gradcache_clip.train.checkpoint import CheckpointError
from gradcache_clip.train.config_errors import ConfigError
from gradcache_clip.train.config_file import load_config
from gradcache_clip.train.data import read_all_texts
from gradcache_clip.train.programs.teacher import TeacherFeatures, save_teacher_features

EXAMPLES = Path(__file__).parent.parent / "examples"

PROMPTS = "seek: ", "keep: "
WEIGHT = "loss.teacher_weight=0.7"
OBJECTIVE = (
    f"data.text_fields=[{','.join(names(3))}]",
    f"data.text_prompts=['{PROMPTS[0]}','{PROMPTS[1]}']",
    "loss.name=retrieval",
    "loss.directions=[query_to_doc,query_to_query]",
    "loss.hardness_mode=all_negatives",
    "loss.hardness_strength=3",
    "loss.positives=pair",
    "loss.learn_logit_scale=true",
    WEIGHT,
    "loss.teacher_scale=3",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def teacher(data: Path) -> Path:
    return make_teacher(data, data / "teacher.safetensors")


def test_the_step_is_the_retrieval_loss_and_the_cross_entropy_of_the_teacher(
    data, teacher, tmp_path
):
    settings = shortened(data, tmp_path, *SMALL, *OBJECTIVE, f"loss.teacher={teacher}")
    trainer = trainer_of(recipe("text_embedding"), settings, tmp_path)
    batches, inputs = [], trainer.program.inputs
    trainer.program.inputs = lambda batch, *more: (batches.append(batch), inputs(batch, *more))[1]

    def formula(queries: Tensor, documents: Tensor, negatives: Tensor, *rest) -> Tensor:
        scale, total = rest[0].logit_scale, 0.0
        sides = zip(("queries", "documents"), batches[0].texts, PROMPTS, strict=False)
        given = [
            torch.stack([taught(side, text.removeprefix(prompt)) for text in texts])
            for side, texts, prompt in sides
        ]
        u, v = (unit(each).double() for each in given)
        target = (3 * u @ v.T).softmax(1)
        plain = RetrievalLoss(
            directions=("query_to_doc", "query_to_query"),
            hardness_mode="all_negatives",
            hardness_strength=3.0,
            impl="reference",
        ).double()
        for width in (4, 8, 16):
            q, d, n = (unit(each, width) for each in (queries, documents, negatives))
            logs = (scale * q @ d.T).log_softmax(1)
            total = total + plain(q, d, n[:, None], scale).loss
            total = total - 0.7 * (target * logs).sum(1).mean()
        return total

    assert_step_equals(trainer, formula)
    assert trainer.program.chance_loss == pytest.approx(
        3 * (torch.tensor(48.0).log() + 0.7 * torch.tensor(24.0).log()).item()
    )


def test_a_run_with_a_teacher_resumes_exactly_and_beside_no_other(data, teacher, tmp_path):
    more = (*SMALL, WEIGHT, f"loss.teacher={teacher}")
    assert_trains_and_resumes("text_embedding", data, tmp_path, *more)
    resumed = (WEIGHT, "train.resume=true")
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes(teacher.read_bytes())
    assert run_small(data, tmp_path / "whole", *resumed, f"loss.teacher={moved}").finished
    other = make_teacher(data, tmp_path / "other.safetensors", ("positive", "anchor"))
    with pytest.raises(CheckpointError, match="loss.teacher: expected the teacher's features that"):
        run_small(data, tmp_path / "whole", *resumed, f"loss.teacher={other}")
    with pytest.raises(ConfigError, match="train.resume: .* loss.teacher_weight 0.7 -> 0.0"):
        run_small(data, tmp_path / "whole", "train.resume=true")


def test_the_example_embeds_the_texts_of_the_training_data(data, tmp_path, monkeypatch):
    pytest.importorskip("sentence_transformers")
    from tiny_sentences import tiny_model

    model = tiny_model(tmp_path / "tokens")
    model.save(str(tmp_path / "model"))
    out = tmp_path / "teacher.safetensors"
    given = [str(tmp_path / "model"), str(data / "train"), str(out)]
    monkeypatch.setattr(sys, "argv", ["teacher_features.py", *given])
    runpy.run_path(str(EXAMPLES / "teacher_features.py"), run_name="__main__")
    rows = [*read_all_texts(data / "train", names(2), max_broken_share=0.0)][:5]
    for side, texts in zip(("queries", "documents"), zip(*rows, strict=True), strict=True):
        expected = model.encode([*texts], convert_to_tensor=True, normalize_embeddings=True)
        torch.testing.assert_close(
            TeacherFeatures(out).of(side, texts), expected, rtol=1e-2, atol=1e-3
        )


def test_a_text_that_the_teacher_has_not_seen_is_named_before_the_step(data, tmp_path):
    few = tmp_path / "few.safetensors"
    save_teacher_features(few, (["a"], torch.ones(1, 2)), (["b"], torch.ones(1, 2)))
    message = re.escape(f"loss.teacher: expected features of all queries of data.train in {few}")
    with pytest.raises(ValueError, match=message):
        run_small(data, tmp_path / "run", WEIGHT, f"loss.teacher={few}")


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        (None, "No such file"),
        ({"a": torch.ones(1)}, "it has ['a']"),
        ({"queries_features": torch.ones(1, 3)}, "float32 (1, 3)"),
        ({"queries_features": torch.ones(2, 2)}, "float32 (2, 2)"),
        ({"queries_features": torch.ones(1, 2).long()}, "int64 (1, 2)"),
        ({"queries_ids": torch.zeros(1)}, "float32 (1,)"),
        ({"queries_ids": torch.tensor(0)}, "int64 ()"),
    ],
)
def test_what_are_no_features_of_a_teacher_is_refused_at_the_start(data, tmp_path, tensors, reason):
    path, ids, features = tmp_path / "teacher", torch.zeros(1, dtype=torch.int64), torch.ones(1, 2)
    whole = dict.fromkeys(("queries_ids", "documents_ids"), ids)
    whole |= dict.fromkeys(("queries_features", "documents_features"), features)
    if tensors is not None:
        saved = tensors if "a" in tensors else whole | tensors
        save_file({name: tensor.clone() for name, tensor in saved.items()}, path)
    with pytest.raises(ConfigError, match=re.escape(reason)):
        run_small(data, tmp_path / "run", WEIGHT, f"loss.teacher={path}")
    assert not (tmp_path / "run").exists()


def test_other_programs_have_no_teacher():
    for program in ("pairs", "views"):
        with pytest.raises(ConfigError, match="loss.teacher: no such key .* set program=texts"):
            load_config(None, [f"program={program}", "loss.teacher=teacher.safetensors"])


@pytest.mark.parametrize(
    ("given", "message"),
    [(WEIGHT, "expected 0 without a file"), ("loss.teacher=a", "expected more than 0 with a file")],
)
def test_a_teacher_and_its_weight_go_together(given, message):
    with pytest.raises(ConfigError, match=f"loss.teacher_weight: {message}"):
        load_config(None, ["program=texts", given])


@pytest.mark.parametrize("shape", [(1, 2), (2, 3)])
def test_each_text_needs_one_feature_of_one_width(tmp_path, shape):
    message = re.escape("documents: expected features of shape (2, 2), one for each text")
    with pytest.raises(ValueError, match=message):
        save_teacher_features(
            tmp_path / "teacher", (["a"], torch.ones(1, 2)), (["b", "c"], torch.ones(shape))
        )
