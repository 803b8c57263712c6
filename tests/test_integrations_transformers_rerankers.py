"""`GradCacheTrainer` with cross-encoders: pairs are rows, of which a softmax ranks each query's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from one_shot import twins
from tiny_reranker import batches, listwise, reranker, towers
from tiny_trainer import BATCHES, TEXT, first_gradients, train, worst_of
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertForTokenClassification,
    BertModel,
    LlamaConfig,
    Trainer,
)

from gradcache_clip.integrations.transformers import GradCacheTrainer


class OneShot(Trainer):
    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *_: Any, **__: Any) -> Tensor:
        return listwise(model, model(**inputs["pairs"]).logits)


OURS = {**BATCHES, "chunk_size": 5, "towers": towers, "loss": listwise}
THEIRS = {key: value for key, value in BATCHES.items() if key != "chunk_size"}


@pytest.mark.parametrize("chosen", [None, lambda output: output.logits, [lambda o: o["logits"]]])
def test_gradients_and_steps_equal_the_trainer_of_transformers(chosen: Any, tmp_path: Path):
    """Chunks divide the candidates of a query."""
    mine, plain, stepped = (reranker() for _ in range(3))
    more = {**OURS, "get_features": chosen}
    first_gradients(GradCacheTrainer, mine, tmp_path, batches(), **more)
    first_gradients(OneShot, plain, tmp_path, batches(), **THEIRS)
    parameter, error = worst_of(mine, plain)
    assert error < 1e-10, parameter
    again = train(GradCacheTrainer, twins(stepped)[0][0], tmp_path, batches(), **more)
    train(OneShot, stepped, tmp_path, batches(), **THEIRS)
    for name, expected in stepped.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], expected, rtol=0, atol=1e-6)


class WithHead(nn.Module):
    """A head of its own over hidden states."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = reranker(BertModel)
        self.head = nn.Linear(TEXT["hidden_size"], 1).double()

    def score(self, output: Any) -> Tensor:
        return self.head(output.last_hidden_state[:, 0].tanh())


def test_get_features_with_a_head_of_the_model(tmp_path: Path):
    ours, truth = (each[0] for each in twins(WithHead()))
    more = {**OURS, "towers": lambda model, batch: [(model.encoder, batch["pairs"])]}
    more["get_features"] = ours.score
    first_gradients(GradCacheTrainer, ours, tmp_path, batches(), **more)
    listwise(truth, truth.score(truth.encoder(**batches()[0]["pairs"]))).backward()
    assert worst_of(ours, truth)[1] < 1e-10
    assert ours.head.weight.grad is not None


def refused(model: nn.Module, folder: Path, **more: Any) -> None:
    train(GradCacheTrainer, model, folder, batches(), **{**OURS, **more})


def test_logits_of_tokens_are_not_taken_for_scores(tmp_path: Path):
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    causal = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, num_attention_heads=2))
    for model in (reranker(BertForTokenClassification), causal):
        with pytest.raises(TypeError, match=r"got \w+Output\w* with logits.*say which with get_f"):
            refused(model, tmp_path)


def test_what_get_features_cannot_be(tmp_path: Path):
    with pytest.raises(ValueError, match="get_features: expected None with pooling='cls'.*leave"):
        refused(reranker(), tmp_path, get_features=lambda output: output.logits, pooling="cls")
    with pytest.raises(TypeError, match="get_features: expected a function of an encoder's outp"):
        refused(reranker(), tmp_path, get_features="logits")
    with pytest.raises(TypeError, match="get_features: expected a function.*got Linear, whose"):
        refused(reranker(), tmp_path, get_features=nn.Linear(16, 1))
    with pytest.raises(ValueError, match="get_features: expected.*1"):
        refused(reranker(), tmp_path, get_features=[None, None])
    with pytest.raises(TypeError, match="of towers.*got NoneType.*get_features"):
        refused(reranker(), tmp_path, get_features=lambda output: None)
    with pytest.raises(ValueError, match=r"features with 5 rows.*got shape \(1, 5, 1\)"):
        refused(reranker(), tmp_path, get_features=lambda output: output.logits[None])
