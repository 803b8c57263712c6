"""Drop-ins refuse what would be wrong where it is given, in the names of their own arguments."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_docs import messages
from torch import nn

pytest.importorskip("sentence_transformers")
pytest.importorskip("open_clip")

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses as theirs
from test_integrations_lightning import Pairs, fit, loader
from test_integrations_open_clip import model as clip_of_open_clip
from tiny_sentences import gradients, tiny_model, tokenized
from tiny_trainer import TEXT, clip, first_gradients, pairs, trainer
from transformers import BertConfig, BertModel

from gradcache_clip import ClipLoss, GradCache
from gradcache_clip.integrations import transformers as for_transformers
from gradcache_clip.integrations.lightning import cached_step
from gradcache_clip.integrations.open_clip import ClipLoss as OpenClipLoss
from gradcache_clip.integrations.open_clip import OpenClipTowers
from gradcache_clip.integrations.sentence_transformers import CachedMultipleNegativesRankingLoss
from gradcache_clip.integrations.transformers import GradCacheTrainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny_sentences")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mini_batch_size": 0}, "mini_batch_size: expected a positive integer, got 0; take"),
        ({"mini_batch_size": "auto"}, "mini_batch_size: expected a positive integer, got 'auto'"),
        ({"mini_batch_size": (4, 4)}, "mini_batch_size: expected a positive integer"),
        ({"mini_batch_num_tokens": 0}, "mini_batch_num_tokens: expected a positive integer, got 0"),
        ({"scale": -1}, "scale: expected a number above zero, got -1; such as 20.0"),
        ({"scale": float("inf")}, "scale: expected a number above zero, got inf"),
        ({"scale": "20"}, "scale: expected a number above zero, got '20'"),
        ({"scale": nn.Parameter(torch.tensor(20.0))}, "got Parameter; .*learnable_scale=True"),
        ({"directions": "query_to_doc"}, "directions: .*got 'query_to_doc'; pass a tuple"),
        ({"matryoshka_dims": 16}, "matryoshka_dims: expected different widths .* got 16"),
        ({"matryoshka_dims": [64]}, "matryoshka_dims: expected at most .* model, 32, got 64"),
        (
            {"matryoshka_dims": [16], "matryoshka_weights": [1, 2]},
            "matryoshka_weights: expected one for each of the 1 matryoshka_dims, got .1, 2",
        ),
        (
            {"matryoshka_dims": [16], "matryoshka_weights": [-1.0]},
            "matryoshka_weights: expected a number above zero, got -1.0",
        ),
        ({"memory_budget": -1}, "memory_budget: expected bytes"),
        ({"check_replay": "no"}, "check_replay: expected 'error', 'warn' or 'off'"),
    ],
    ids=str,
)
def test_arguments_of_the_sentence_transformers_loss(folder, options, message):
    with pytest.raises(ValueError, match=message):
        CachedMultipleNegativesRankingLoss(tiny_model(folder), **options)


@pytest.mark.parametrize("name", ["gather_across_devices", "learnable_scale"])
def test_flags_of_the_sentence_transformers_loss(folder, name):
    with pytest.raises(TypeError, match=f"{name}: expected True or False, got 'no'"):
        CachedMultipleNegativesRankingLoss(tiny_model(folder), **{name: "no"})


def test_what_a_first_step_checks_is_checked_once(folder, monkeypatch):
    """The loss has one `GradCache` for batches of one kind, and another for a wrapped model."""
    built, init = [], GradCache.__init__
    monkeypatch.setattr(
        GradCache, "__init__", lambda self, *given, **more: built.append(init(self, *given, **more))
    )
    model = tiny_model(folder)
    loss = CachedMultipleNegativesRankingLoss(model, mini_batch_size=4)
    for count in (2, 2, 3, 2):
        gradients(loss, tokenized(model, count))
    assert len(built) == 2
    loss.model = torch.compile(model, backend="eager")
    gradients(loss, tokenized(model))
    assert len(built) == 3


def test_models_that_the_sentence_transformers_loss_cannot_train(folder):
    with pytest.raises(TypeError, match="model: expected a SentenceTransformer, got 'mpnet'"):
        CachedMultipleNegativesRankingLoss("mpnet")
    model = tiny_model(folder)
    loss = CachedMultipleNegativesRankingLoss(SentenceTransformer(modules=[model[0]]))
    with pytest.raises(TypeError, match=r"sentence_embedding.*add a Pooling.*'lasttoken'"):
        loss(tokenized(model))


class DeepSpeedEngine(nn.Module):
    """Stands for the class of this name."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


@pytest.mark.parametrize("home", ["deepspeed", "torch.distributed.fsdp"])
def test_sharded_models_are_refused_with_the_reason(folder, home, monkeypatch):
    """In words that name no strategy, which is no argument of the loss."""
    pytest.importorskip(home)
    name, reason = {
        "deepspeed": ("DeepSpeedEngine", "DeepSpeed, whose engine must run every backward"),
        "torch.distributed.fsdp": ("FSDPModule", "FSDP, which frees parameters between"),
    }[home]
    monkeypatch.setattr(f"{home}.{name}", DeepSpeedEngine)
    model = tiny_model(folder)
    loss = CachedMultipleNegativesRankingLoss(model)
    loss.model = DeepSpeedEngine(model)
    with pytest.raises(ValueError, match=f"model: expected a plain .* got {reason}") as raised:
        loss(tokenized(model))
    assert "strategy=" not in str(raised.value)


def test_hooks_on_a_model_of_sentence_transformers(folder):
    model = tiny_model(folder)
    next(model.parameters()).register_hook(lambda gradient: gradient.clamp(-1, 1))
    with pytest.raises(ValueError, match="^model: expected parameters without hooks .* hooks, or"):
        gradients(CachedMultipleNegativesRankingLoss(model, mini_batch_size=4), tokenized(model))
    assert all(parameter.grad is None for parameter in model.parameters())


class Centred(nn.Module):
    """Takes the mean of a chunk off each of its rows."""

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        pooled = features["sentence_embedding"]
        return {**features, "sentence_embedding": pooled - pooled.mean(0)}


def test_rows_that_mix_in_a_model_of_sentence_transformers(folder):
    model = SentenceTransformer(modules=[*tiny_model(folder), Centred()])
    message = r"do not depend on the other rows.*your own loop with GradCache\(..., check_rows"
    with pytest.raises(ValueError, match=message):
        gradients(CachedMultipleNegativesRankingLoss(model, mini_batch_size=4), tokenized(model))


class Unmasked(nn.Module):
    """Lets the pooling average over padding."""

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        return {**features, "attention_mask": torch.ones_like(features["attention_mask"])}


def test_padding_that_counts_in_a_model_of_sentence_transformers(folder):
    transformer, pooling = tiny_model(folder)
    model = SentenceTransformer(modules=[transformer, Unmasked(), pooling])
    message = r"do not depend on padding.*with GradCache\(...\) without sort_by_length$"
    with pytest.raises(ValueError, match=message):
        gradients(CachedMultipleNegativesRankingLoss(model, mini_batch_size=4), tokenized(model))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Matryoshka2dLoss", "n_dims_per_step=-1.*; pass matryoshka_dims= alone"),
        ("AdaptiveLayerLoss", "by itself, got a loss around it .* AdaptiveLayerLoss"),
    ],
)
@pytest.mark.filterwarnings("ignore:AdaptiveLayerLoss is not compatible")
def test_losses_around_the_sentence_transformers_loss(folder, name, message):
    """Each changes the model for the time of its forward; chunks are replayed after it."""
    model = tiny_model(folder)
    more = {} if name == "AdaptiveLayerLoss" else {"matryoshka_dims": [32, 16]}
    with pytest.raises(TypeError, match=message):
        loss = CachedMultipleNegativesRankingLoss(model)
        gradients(getattr(theirs, name)(model, loss, **more), tokenized(model))
    assert all(parameter.grad is None for parameter in model.parameters())


class Embedder(nn.Module):
    """A BERT without a pooler, as its own tower and in others."""

    def __init__(self) -> None:
        super().__init__()
        self.bert, self.loss = BertModel(BertConfig(**TEXT), add_pooling_layer=False), ClipLoss()

    def forward(self, **_: Any) -> None:
        raise AssertionError("only its parts are called")

    def tokens(self, **batch: Any) -> torch.Tensor:
        return self.bert(**batch).last_hidden_state.flatten(0, 1)

    def nothing(self, **batch: Any) -> None:
        return None

    def first(self, **batch: Any) -> torch.Tensor:
        return self.bert(**batch).last_hidden_state[:, 0]


def twice(name: str, model: Any, batch: dict[str, Any]) -> list[tuple[Any, Any]]:
    given = {key: batch[key] for key in ("input_ids", "attention_mask")}
    return [(getattr(model, name), given)] * 2


def step(folder: Path, model: nn.Module | None = None, **more: Any) -> nn.Module:
    more = {"chunk_size": 5, "remove_unused_columns": False, **more}
    return first_gradients(GradCacheTrainer, model or clip(), folder, pairs(), **more)


@pytest.mark.parametrize(
    ("tower", "message"),
    [
        ("bert", 'pass pooling="last" for a causal model, pooling="mean" or "cls" for a BERT, or'),
        ("tokens", "give get_features a function that returns one row a sample"),
        ("nothing", "got NoneType; extract them with get_features"),
    ],
)
def test_the_trainer_names_arguments_that_it_has(tower, message, tmp_path):
    more = {"towers": partial(twice, tower), "loss": lambda model, *f: model.loss(*f)}
    with pytest.raises((TypeError, ValueError), match=message) as raised:
        step(tmp_path, Embedder(), **more)
    assert "_Towers" not in str(raised.value)
    step(tmp_path, Embedder(), **{**more, "towers": partial(twice, "first")})


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"towers": 3}, "towers: expected a function of model and batch, got int"),
        ({"loss": 3}, "loss: expected a function of model and features, got int"),
        ({"memory_budget": -1}, "memory_budget: expected bytes"),
        ({"sort_by_length": True}, r"sort_by_length: expected ByLength\(\) or None"),
    ],
    ids=str,
)
def test_arguments_of_the_trainer(more, message, tmp_path):
    build = partial(GradCacheTrainer, **more)
    with pytest.raises((TypeError, ValueError), match=message):
        trainer(build, clip(), tmp_path, pairs())


def test_hooks_on_the_model_of_a_trainer(tmp_path):
    model = clip()
    model.visual_projection.weight.register_hook(lambda gradient: gradient.clamp(-1, 1))
    with pytest.raises(ValueError, match="^model: expected parameters without hooks .* hooks, or"):
        step(tmp_path, model)


@pytest.mark.parametrize("returned", [[], [clip], None, 3])
def test_towers_that_return_no_pairs(returned, tmp_path):
    with pytest.raises(TypeError, match=r"towers: expected one \(encoder, inputs\) for each"):
        step(tmp_path, towers=lambda model, batch: returned)


def test_a_model_without_the_methods_is_refused_before_training(tmp_path):
    with pytest.raises(TypeError, match="model: expected get_image_features"):
        trainer(GradCacheTrainer, Embedder(), tmp_path, pairs(), loss=lambda model, *f: f[0])


def test_what_the_trainer_translates_is_what_the_engine_says():
    """A message that changes must be translated anew."""
    known = messages().replace("\0", "")
    for words in for_transformers._OWN_NAMES:
        assert words in known or words == " (_Towers)", words


def test_arguments_of_the_open_clip_losses():
    with pytest.raises(ValueError, match="world_size: expected a positive integer, got 0"):
        OpenClipLoss(world_size=0)
    with pytest.raises(ValueError, match="rank: expected an integer from 0 to .* 1, got 2"):
        OpenClipLoss(rank=2, world_size=2)
    with pytest.raises(TypeError, match="logit_scale: expected a tensor of one element, got float"):
        OpenClipLoss()(torch.eye(4), torch.eye(4), 100.0)


def test_arguments_of_the_open_clip_towers():
    import open_clip

    with pytest.raises(TypeError, match="model: .*with encode_image, encode_text.*AllReduce"):
        OpenClipTowers(nn.DataParallel(clip_of_open_clip()))
    with pytest.raises(TypeError, match=r"loss: expected ClipLoss\(\) or .* of open_clip.loss"):
        OpenClipTowers(clip_of_open_clip()).loss_with(open_clip.loss.ClipLoss())


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_arguments_of_the_lightning_step(tmp_path):
    module = Pairs()
    module.output = lambda batch: cached_step(module, *batch)
    with pytest.raises(TypeError, match=r"cache: expected a GradCache, got Tensor; write cached"):
        fit(module, tmp_path, loader())
    module = Pairs()
    strategy = type(module.cache.strategy)(torch.amp.GradScaler("cpu"))
    module.cache = GradCache((module.image, module.text), module.loss, strategy=strategy)
    with pytest.raises(ValueError, match="expected a strategy without grad_scaler, got one"):
        fit(module, tmp_path, loader())
