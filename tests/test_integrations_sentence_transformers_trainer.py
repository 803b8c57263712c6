"""sentence-transformers' trainer with our loss beside the same trainer with the library's."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("sentence_transformers")
pytest.importorskip("accelerate", reason="the trainer of sentence-transformers needs accelerate")
pytest.importorskip("datasets", reason="the trainer of sentence-transformers needs datasets")

from datasets import Dataset
from example_runs import run_example
from sentence_transformers import (
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer import losses as theirs
from tiny_sentences import columns, tiny_model

from gradcache_clip.integrations.sentence_transformers import CachedMultipleNegativesRankingLoss


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny_sentences")


def train(loss_class: Any, folder: Path, output: Path, **settings: Any) -> tuple[Any, Any]:
    """A run of the trainer over 24 rows; the model and the loss."""
    loss_options = settings.pop("loss", {})
    model = tiny_model(folder)
    loss = loss_class(model, mini_batch_size=4, **loss_options)
    arguments = SentenceTransformerTrainingArguments(
        str(output),
        **{
            "per_device_train_batch_size": 8,
            "num_train_epochs": 1,
            "learning_rate": 1e-3,
            "use_cpu": True,
            "report_to": "none",
            "save_strategy": "no",
            "logging_steps": 1,
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            **settings,
        },
    )
    pairs = Dataset.from_dict(columns(24))
    trainer = SentenceTransformerTrainer(
        model, arguments, train_dataset=pairs, eval_dataset=pairs, loss=loss
    )
    trainer.train()
    return trainer, loss


def moved(model: Any, folder: Path) -> Tensor:
    """How far training took all weights."""
    pairs = zip(model.parameters(), tiny_model(folder).parameters(), strict=True)
    return torch.cat([(after - before).detach().flatten() for after, before in pairs])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_accumulation_steps": 3},
        {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1},
        {"bf16": True},
    ],
    ids=["fp32", "accumulation", "clipping", "bf16"],
)
def test_the_trainer_goes_the_way_it_goes_with_the_library(
    folder: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    mine, _ = train(CachedMultipleNegativesRankingLoss, folder, tmp_path, **settings)
    their, _ = train(theirs.CachedMultipleNegativesRankingLoss, folder, tmp_path, **settings)
    got, expected = moved(mine.model, folder), moved(their.model, folder)
    assert expected.norm() > 1e-2
    tolerance = 0.1 if "bf16" in settings else 2e-3
    assert (got - expected).norm() < tolerance * expected.norm()
    losses = [
        [entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (mine, their)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=2e-2 if "bf16" in settings else 1e-3)
    assert mine.evaluate()["eval_loss"] == pytest.approx(
        their.evaluate()["eval_loss"], rel=2e-2 if "bf16" in settings else 1e-3
    )


def test_the_trainer_learns_the_scale(folder: Path, tmp_path: Path) -> None:
    options = {"learnable_scale": True, "scale": 5.0}
    _, loss = train(CachedMultipleNegativesRankingLoss, folder, tmp_path, loss=options)
    assert abs(math.log(loss.scale / 5)) > 1e-3
    assert loss.get_config_dict()["scale"] == loss.scale


def test_the_model_card_names_the_loss(folder: Path, tmp_path: Path) -> None:
    trainer, loss = train(CachedMultipleNegativesRankingLoss, folder, tmp_path / "run")
    trainer.model.save(str(tmp_path / "saved"))
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "CachedMultipleNegativesRankingLoss" in card and "gao2021scaling" in card
    assert '"mini_batch_size": 4' in card
    wanted = set(theirs.CachedMultipleNegativesRankingLoss(trainer.model).get_config_dict())
    assert wanted <= set(loss.get_config_dict())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "steps", "kind"),
    [("sentence_transformers_training", 12, "pairs"), ("llm_embedder", 8, "triplets")],
)
def test_an_example_learns(name: str, steps: int, kind: str, tmp_path: Path) -> None:
    if name == "llm_embedder":
        pytest.importorskip("peft")
    result = run_example(name, str(tmp_path), str(steps), folder=tmp_path)
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if f" {kind}, loss " in line]
    before, after = (float(line.split()[-1]) for line in lines)
    assert after < before - 0.2
    # Chunks are trimmed on the left: the decoder's features do not move with their padding.
    assert "depend on their padding" not in result.stderr
