"""What `GradCacheTrainer` refuses, before it would train with wrong gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_trainer import BATCH, Retriever, clip, pairs, siglip, train, trainer
from torch import nn
from transformers import default_data_collator

from gradcache_clip import ClipLoss
from gradcache_clip.integrations import transformers_checks as checks
from gradcache_clip.integrations.transformers import GradCacheTrainer


def refused(folder: Path, model: nn.Module | None = None, **more: Any) -> None:
    trainer(GradCacheTrainer, model or clip(), folder, pairs(), **more)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"torch_compile": True}, "torch_compile: expected False.*compile them in place"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor: expected 0, got 0.1; pass loss"),
        ({"compute_loss_func": max}, "compute_loss_func: expected None.*pass loss="),
        ({"chunk_size": 0}, "chunk_size: expected a positive integer"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refuses_settings_that_would_have_no_effect(more, message, tmp_path: Path):
    with pytest.raises(ValueError, match=message):
        refused(tmp_path, **more)


def test_refuses_a_loss_outside_of_the_model(tmp_path: Path):
    with pytest.raises(TypeError, match="loss: expected a function.*got ClipLoss.*submodule of"):
        refused(tmp_path, loss=ClipLoss())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("is_distributed_loading_by_transformers", True, "model: expected whole weights"),
        ("n_gpu", 2, "n_gpu: expected one GPU for each process, got 2; start with torchrun"),
        (
            "distributed_type",
            "FSDP",
            "distributed_type: expected one.*got FSDP, which frees.*leave",
        ),
        ("distributed_type", "DEEPSPEED", "distributed_type.*DeepSpeedStrategy in your own loop"),
        ("optim", "adalomo", "optim: expected.*steps after the backward, got adalomo"),
    ],
)
def test_refuses_engines_that_this_machine_cannot_start(name, value, message, monkeypatch):
    names = ("compute_loss_func", "is_distributed_loading_by_transformers")
    fine = dict.fromkeys(names)
    args = {"n_gpu": 1, "parallelism_config": None, "torch_compile": False, "optim": "sgd"}
    args |= {"label_smoothing_factor": 0.0, "distributed_type": "MULTI_GPU"}
    given = Settings({**args, **fine, name: value})
    with pytest.raises(ValueError, match=message):
        checks.refuse_settings(given)
    checks.refuse_settings(Settings({**args, **fine}))


class Settings:
    """What is read of a trainer."""

    def __init__(self, given: dict[str, Any]) -> None:
        vars(self).update(given)
        self.args = self.accelerator = self
        self.distributed_type = type("Engine", (), {"value": given["distributed_type"]})


def test_batches_and_models_that_fit_no_tower(tmp_path: Path):
    more = {"chunk_size": 5}
    odd = [{**row, "caption_id": torch.tensor(1)} for row in pairs()]
    with pytest.raises(ValueError, match="batch: expected arguments of.*got caption_id; leave it"):
        train(GradCacheTrainer, clip(), tmp_path, odd, remove_unused_columns=False, **more)
    with pytest.raises(TypeError, match="model: expected get_image_features.*got Retriever"):
        train(GradCacheTrainer, Retriever(), tmp_path, pairs(), **more)
    towers = {"towers": lambda m, batch: [(m.query, batch["query"])] * 2}
    rows = [{"query": torch.randn(5)} for _ in range(BATCH)]
    with pytest.raises(TypeError, match="model: expected a parameter logit_scale.*pass loss="):
        given = {**more, **towers, "data_collator": default_data_collator}
        train(GradCacheTrainer, Retriever(), tmp_path, rows, **given)


def test_refuses_a_last_batch_without_negatives(tmp_path: Path):
    data = pairs(count=BATCH + 1)
    with pytest.raises(ValueError, match="train_dataset: expected.*got 13 pairs in batches of 12"):
        refused(tmp_path, train_dataset=data)
    more = {"per_device_eval_batch_size": 4}
    with pytest.raises(ValueError, match="held: expected.*dataloader_drop_last=True"):
        refused(tmp_path, eval_dataset={"held": data}, **more)
    refused(tmp_path, eval_dataset=data, dataloader_drop_last=True, **more)
    refused(tmp_path, siglip(), eval_dataset=data, **more)
