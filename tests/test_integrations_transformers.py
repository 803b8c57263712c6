"""`GradCacheTrainer` beside the Trainer of transformers, and beside one graph."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import WORST_ERROR
from example_runs import run_example
from one_shot import gradient_errors, worst
from tiny_run import make_data
from tiny_trainer import (
    BATCH,
    STEPS,
    FirstGradients,
    Retriever,
    clip,
    collate,
    dual,
    first_gradients,
    one_graph,
    pairs,
    siglip,
    train,
    trainer,
    worst_of,
)
from torch import Tensor, nn
from transformers import Trainer, default_data_collator

from gradcache_clip.cache.batch_tree import take_rows
from gradcache_clip.integrations.transformers import GradCacheTrainer


def assert_same_weights(ours: nn.Module, theirs: nn.Module, start: nn.Module, atol: float):
    for name, expected in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], expected, rtol=0, atol=atol, msg=name)
    moved = [n for n, v in start.state_dict().items() if not torch.equal(v, ours.state_dict()[n])]
    assert "logit_scale" in moved and len(moved) > 20


@pytest.mark.parametrize("build", [clip, siglip, dual])
def test_gradients_equal_one_graph(build, tmp_path: Path, record_property):
    for dtype, limit in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        data = pairs(dtype)
        ours = first_gradients(GradCacheTrainer, build(dtype), tmp_path, data, chunk_size=5)
        truth = one_graph(build(dtype), data[:BATCH])
        assert ours.logit_scale.grad is not None
        name, error = worst_of(ours, truth)
        setting = f"GradCacheTrainer, {build.__name__}, {dtype}"
        record_property(WORST_ERROR, (setting, name, error))
        assert error < limit, name


@pytest.mark.parametrize(
    ("build", "more"),
    [
        (clip, {}),
        pytest.param(siglip, {}, marks=pytest.mark.slow),
        pytest.param(dual, {}, marks=pytest.mark.slow),
        (clip, {"gradient_accumulation_steps": 2}),
        (clip, {"max_grad_norm": 1e-3}),
        (clip, {"chunk_size": BATCH}),
    ],
    ids=["clip", "siglip", "dual", "accumulated", "clipped", "one-chunk"],
)
def test_steps_equal_the_trainer_of_transformers(build, more, tmp_path: Path):
    """In fp64, where AdamW does not blow rounding up to a whole step."""
    data = pairs(torch.float64, BATCH * STEPS * more.get("gradient_accumulation_steps", 1))
    ours = train(
        GradCacheTrainer, build(torch.float64), tmp_path, data, **{"chunk_size": 5, **more}
    )
    more.pop("chunk_size", None)
    theirs = train(Trainer, build(torch.float64), tmp_path, data, **more)
    assert_same_weights(ours, theirs, build(torch.float64), atol=1e-6)


def test_accumulated_batches_are_batches_of_their_own(tmp_path: Path):
    data = pairs(torch.float64)
    more = {"gradient_accumulation_steps": 2, "chunk_size": 5}
    ours = first_gradients(GradCacheTrainer, clip(torch.float64), tmp_path, data, **more)
    truth = clip(torch.float64)
    for start in (0, BATCH):
        (truth(**collate(data[start : start + BATCH])).loss / 2).backward()
    assert worst_of(ours, truth)[1] < 1e-10


def test_dropout_draws_what_one_graph_over_the_chunks_draws(tmp_path: Path):
    seen, size, data = FirstGradients(), BATCH // 3, pairs()
    more = {"chunk_size": size, "max_steps": 1, "max_grad_norm": 0.0, "callbacks": [seen]}
    ours = seen.given_to(train(GradCacheTrainer, clip(dropout=0.4), tmp_path, data, **more))
    truth, batch = clip(dropout=0.4).train(), default_data_collator(data[:BATCH])
    torch.set_rng_state(seen.random_state)
    images = {"pixel_values": batch.pop("pixel_values")}
    image, text = (
        torch.cat([tower(**take_rows(part, s, s + size)).pooler_output for s in (0, 4, 8)])
        for tower, part in ((truth.get_image_features, images), (truth.get_text_features, batch))
    )
    _clip_loss(image, text, truth.logit_scale).backward()
    assert worst_of(ours, truth)[1] < 1e-5
    # The draws matter: without dropout these gradients are others.
    other = one_graph(clip(), data[:BATCH])
    assert worst_of(ours, other)[1] > 1e-2


def _clip_loss(image: Tensor, text: Tensor, log_scale: Tensor) -> Tensor:
    logits = log_scale.exp() * F.normalize(image) @ F.normalize(text).T
    right = torch.arange(len(logits))
    return (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2


def test_bf16_is_as_near_to_fp32_as_that_of_transformers(tmp_path: Path):
    truth = one_graph(clip(), pairs()[:BATCH])
    ours = first_gradients(GradCacheTrainer, clip(), tmp_path, pairs(), chunk_size=5, bf16=True)
    theirs = first_gradients(Trainer, clip(), tmp_path, pairs(), bf16=True)
    error, allowed = _distance(ours, truth), _distance(theirs, truth)
    assert 1e-4 < error < 1.5 * allowed


def _distance(model: nn.Module, truth: nn.Module) -> float:
    ours, theirs = (torch.cat([p.grad.flatten() for p in m.parameters()]) for m in (model, truth))
    return float((ours - theirs).norm() / theirs.norm())


def test_resumes_as_if_it_had_not_stopped(tmp_path: Path):
    more = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "chunk_size": 5}
    more["train_sampling_strategy"] = "random"
    whole = train(GradCacheTrainer, clip(dropout=0.3), tmp_path, pairs(), **more)
    resumed = clip(dropout=0.3)
    again = trainer(GradCacheTrainer, resumed, tmp_path, pairs(), **more)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.state.global_step == 4
    for name, expected in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], expected), name


def test_logs_loss_and_accuracy_of_whole_batches(tmp_path: Path):
    model, data = clip(torch.float64), pairs(torch.float64)
    more = {"learning_rate": 0.0, "logging_strategy": "steps", "logging_steps": 3}
    ours = trainer(GradCacheTrainer, model, tmp_path, data, chunk_size=5, **more)
    ours.train()
    batches = [model(**collate(data[s : s + BATCH])) for s in range(0, len(data), BATCH)]
    (logged,) = [row for row in ours.state.log_history if "loss" in row]
    assert logged["loss"] == pytest.approx(_mean(b.loss for b in batches), rel=1e-5)
    assert logged["accuracy"] == pytest.approx(_mean(_accuracy(b) for b in batches), rel=1e-5)


def _mean(values: Iterable[Tensor]) -> float:
    return torch.stack(list(values)).mean().item()


def _accuracy(output: Any) -> Tensor:
    logits, right = output.logits_per_image, torch.arange(BATCH)
    hits = [(each.argmax(1) == right).double().mean() for each in (logits, logits.T)]
    return (hits[0] + hits[1]) / 2


def test_evaluates_the_loss_of_batches_and_hands_out_features(tmp_path: Path):
    model, data, seen = clip(torch.float64), pairs(torch.float64, 2 * BATCH), []

    def metrics(prediction: Any) -> dict[str, float]:
        seen.extend(prediction.predictions)
        return {"mark": 3.0}

    more = {"per_device_eval_batch_size": BATCH, "eval_dataset": data, "compute_metrics": metrics}
    found = trainer(GradCacheTrainer, model, tmp_path, data, chunk_size=5, **more).evaluate()
    outputs = [model(**collate(data[s : s + BATCH])) for s in (0, BATCH)]
    assert found["eval_loss"] == pytest.approx(_mean(o.loss for o in outputs), rel=1e-5)
    assert found["eval_mark"] == 3.0
    images = torch.cat([o.image_embeds for o in outputs])
    torch.testing.assert_close(F.normalize(torch.from_numpy(seen[0])), images.detach())
    assert seen[1].shape == (2 * BATCH, 12)
    assert all(p.grad is None for p in model.parameters())


def test_towers_and_loss_of_your_own(tmp_path: Path):
    """With a frozen tower, and a chunk size for each."""
    torch.manual_seed(2)
    model, truth = Retriever(), Retriever()
    truth.load_state_dict(model.state_dict())
    for each in (model, truth):
        each.document.requires_grad_(False)
    data = [{"query": torch.randn(5), "document": torch.randn(7)} for _ in range(BATCH)]
    first_gradients(
        GradCacheTrainer,
        model,
        tmp_path,
        data,
        chunk_size=(5, 3),
        data_collator=default_data_collator,
        towers=lambda m, batch: [(m.query, batch["query"]), (m.document, batch["document"])],
        loss=lambda m, query, document: m.loss(query, document).loss,
    )
    batch = default_data_collator(data)
    truth.loss(truth.query(batch["query"]), truth.document(batch["document"])).loss.backward()
    assert model.document.weight.grad is None
    assert worst(gradient_errors([model], [truth]))[1] < 1e-5


@pytest.mark.slow
def test_the_example_runs(tmp_path: Path):
    make_data(tmp_path, characters=220)
    result = run_example("trainer_training", str(tmp_path), "5", folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "'accuracy'" in result.stdout and "eval_image_to_text_recall_at_10" in result.stdout
