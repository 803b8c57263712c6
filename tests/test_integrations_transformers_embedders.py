"""`GradCacheTrainer` with decoders, LoRA, packed images and losses of the encoder."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from auxiliary_models import WEIGHT, WithRouter
from example_runs import run_example
from lora_models import LENGTH, contrast, decoder, info_nce, texts, with_lora
from one_shot import gradient_errors, twins, worst
from packed_inputs import compute_in_double, vision_batch, vision_models
from tiny_trainer import BATCHES, STEPS, Retriever, first_gradients, trainer
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from gradcache_clip import ByLength, PackedPatches, PackedTokens
from gradcache_clip.integrations.pooling import entries_of_batch, pool
from gradcache_clip.integrations.transformers import GradCacheTrainer


def embed_row_by_row(pooling: str, hidden: Tensor, mask: Tensor) -> Tensor:
    kept = [row[keep.bool()] for row, keep in zip(hidden, mask, strict=True)]
    choose: dict[str, Callable[[Tensor], Tensor]] = {
        "last": lambda row: row[-1],
        "cls": lambda row: row[0],
        "mean": lambda row: row.mean(0),
    }
    return torch.stack([choose[pooling](row) for row in kept])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pooling", ["last", "mean", "cls"])
def test_pools_the_tokens_of_either_side(pooling, side):
    mask, hidden = texts(9, side)["attention_mask"], torch.randn(9, LENGTH, 4).double()
    spoilt = hidden.masked_fill(mask[..., None] == 0, float("nan"))
    torch.testing.assert_close(pool(spoilt, mask, pooling), embed_row_by_row(pooling, hidden, mask))
    everything = embed_row_by_row(pooling, hidden, torch.ones(9, LENGTH))
    torch.testing.assert_close(pool(hidden, None, pooling), everything)


@pytest.mark.parametrize(
    ("pooling", "side"), [("last", "left"), ("last", "right"), ("mean", "left")]
)
def test_a_decoder_with_lora_and_hard_negatives(pooling, side, tmp_path: Path, monkeypatch):
    """Checkpointed, in chunks of similar length; the one-shot step pools row by row."""
    model = with_lora(decoder()).double()
    compute_in_double(model, monkeypatch)
    ours, truth = (each[0] for each in twins(model))
    batch = {"query": texts(6, side), "document": texts(6, side), "negative": texts(9, side)}
    more = {**BATCHES, "sort_by_length": ByLength()}
    data = [batch] * STEPS
    first_gradients(GradCacheTrainer, ours, tmp_path, data, pooling=pooling, loss=info_nce, **more)
    features = [
        embed_row_by_row(pooling, truth(**each).last_hidden_state, each["attention_mask"])
        for each in batch.values()
    ]
    contrast(*features).loss.backward()
    parameter, error = worst(gradient_errors([ours], [truth]))
    assert error < 1e-10, parameter
    assert {name for name, p in ours.named_parameters() if p.grad is not None} == {
        name for name, _ in ours.named_parameters() if "lora" in name
    }


def test_packed_images(tmp_path: Path, monkeypatch):
    """A vision-language model embeds queries with 0 to 2 images, and texts."""
    model = vision_models()["Qwen2.5-VL"]().double()
    compute_in_double(model, monkeypatch)
    ours, truth = (each[0] for each in twins(model))
    batch = {"query": vision_batch(), "document": texts(7, "left")}
    more = {**BATCHES, "rows": [PackedPatches(), None], "pooling": "last"}
    first_gradients(GradCacheTrainer, ours, tmp_path, [batch] * STEPS, loss=info_nce, **more)
    features = [truth(**each).last_hidden_state[:, -1] for each in batch.values()]
    contrast(*features).loss.backward()
    assert worst(gradient_errors([ours], [truth]))[1] < 1e-10


def query_and_document(model: Any, batch: Any) -> list[tuple[nn.Module, Tensor]]:
    return [(model.query, batch["query"]), (model.document, batch["document"])]


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.document = WithRouter(5), WithRouter(7)


def routed_loss(model: nn.Module, *sides: dict[str, Tensor]) -> dict[str, Tensor]:
    out = contrast(*(side["embedding"] for side in sides))
    return {
        "total": out.loss + 1,
        "hits": out.accuracy,
        "scores": out.loss.expand(3),
        "rows": len(sides[0]["embedding"]),
    }


def test_losses_of_encoders_and_a_dict_of_parts(tmp_path: Path):
    ours, truth = (each[0] for each in twins(Routed().double()))
    batch = {"query": torch.randn(6, 5).double(), "document": torch.randn(6, 7).double()}
    more = {"loss_key": "total", "auxiliary_losses": {"router": WEIGHT}, "loss": routed_loss}
    more["towers"] = query_and_document
    run = trainer(
        GradCacheTrainer, ours, tmp_path, [batch] * STEPS, eval_dataset=[batch],
        logging_strategy="steps", logging_steps=STEPS, learning_rate=0.0, max_grad_norm=0.0,
        **BATCHES, **more,
    )  # fmt: skip
    before = run.evaluate()["eval_loss"]
    run.train()
    sides = truth.query(batch["query"]), truth.document(batch["document"])
    parts, router = routed_loss(truth, *sides), sum(side["router"] for side in sides)
    (logged,) = [row for row in run.state.log_history if "loss" in row]
    total = (parts["total"] + WEIGHT * router).item()
    assert before == pytest.approx(total) and logged["loss"] == pytest.approx(total)
    assert logged["hits"] == pytest.approx(parts["hits"].item())
    assert logged["auxiliary_router"] == pytest.approx(router.item())
    assert logged["rows"] == 6 and "scores" not in logged and "total" not in logged
    fresh = twins(truth)[1][0]
    first_gradients(GradCacheTrainer, fresh, tmp_path, [batch], **BATCHES, **more)
    (parts["total"] + WEIGHT * router).backward()
    assert worst(gradient_errors([fresh], [truth]))[1] < 1e-10


def refused(model: nn.Module, folder: Path, batch: Any, **more: Any) -> None:
    options = {**BATCHES, "loss": info_nce, "max_steps": 1, **more}
    trainer(GradCacheTrainer, model, folder, [batch], **options).train()


def test_refuses_what_it_could_not_pool(tmp_path: Path):
    two = {"query": texts(4, "left"), "document": texts(4, "left")}
    with pytest.raises(ValueError, match="pooling: expected 'last', 'mean', 'cls' or None, got 'm"):
        refused(decoder(), tmp_path, two, pooling="max")
    with pytest.raises(ValueError, match="pooling: expected one row per sequence, got rows=Pack"):
        refused(decoder(), tmp_path, two, pooling="last", rows=[PackedTokens(), None])
    with pytest.raises(ValueError, match="remove_unused_columns: expected False with pooling"):
        refused(decoder(), tmp_path, two, pooling="last", remove_unused_columns=True)
    with pytest.raises(ValueError, match=r"batch: expected one dict .* got input_ids, attention_m"):
        refused(decoder(), tmp_path, two["query"], pooling="last")
    empty = {**two["query"], "attention_mask": torch.tensor([[1], [1], [0], [1]]).expand(4, LENGTH)}
    with pytest.raises(ValueError, match="attention_mask of tower 1: .* zeros alone in row 2"):
        refused(decoder(), tmp_path, {"query": two["query"], "document": empty}, pooling="last")


class Flat(nn.Module):
    """Returns no vectors of tokens."""

    def forward(self, **_: Tensor) -> dict[str, Tensor]:
        return {"last_hidden_state": torch.ones(2, LENGTH)}


def test_refuses_models_without_hidden_states(tmp_path: Path):
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    causal = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2))
    two = {"query": texts(4, "left"), "document": texts(4, "left")}
    for model, error, message in (
        (causal, TypeError, r"pooling: .* last_hidden_state, got CausalLMOutput.*load"),
        (Flat(), ValueError, r"hidden states \(B, L, D\) .* got \(2, 8\) and attention_mask"),
    ):
        with pytest.raises(error, match=message):
            refused(model, tmp_path, two, pooling="last")
    with pytest.raises(TypeError, match='got BaseModelOutput.* pass pooling="last" for a causal'):
        refused(decoder(), tmp_path, two, towers=entries_of_batch)


def test_refuses_parts_and_losses_that_the_log_has_no_place_for(tmp_path: Path):
    rows = {"query": torch.randn(4, 5), "document": torch.randn(4, 7)}
    more = {"towers": query_and_document}
    taken = {"loss": torch.ones((), requires_grad=True), "epoch": torch.ones(())}
    with pytest.raises(ValueError, match="loss: expected parts with names .* got 'epoch'; rename"):
        refused(Retriever(), tmp_path, rows, loss=lambda *_: taken, **more)
    with pytest.raises(TypeError, match=r"'router', a 0-dim .*pass auxiliary_losses=\{'router"):
        refused(Routed(), tmp_path, rows, loss=routed_loss, **more)


@pytest.mark.slow
def test_the_example_learns_to_name_shapes(tmp_path: Path):
    """Chance finds one of 24 documents."""
    result = run_example("vlm_embedder", "30", folder=tmp_path)
    assert result.returncode == 0, result.stderr
    (found,) = re.findall(r"'eval_recall_at_1': ([\d.]+)", result.stdout)
    assert float(found) > 0.5
