"""Arguments and features that cannot be right: one line that says what to pass instead."""

from __future__ import annotations

import copy
import inspect
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from one_shot import gradient_errors, one_shot, twins, worst
from torch import Tensor, nn

from gradcache_clip import (
    ByLength,
    ClipLoss,
    GradCache,
    InfoNCELoss,
    NTXentLoss,
    ReplayMismatchError,
    SigLipLoss,
    deferred_step,
    plan,
)
from gradcache_clip.distributed import DDPStrategy

ROWS = 10


def encoders() -> tuple[nn.Module, nn.Module]:
    return nn.Linear(8, 4), nn.Linear(6, 4)


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(ROWS, 8), torch.randn(ROWS, 6)


class WithMethod(nn.Linear):
    def get_features(self, x: Tensor) -> Tensor:
        return self(x)


@pytest.mark.parametrize(
    ("given", "got"),
    [
        (None, "None"),
        (5, "5"),
        ("bert", "'bert'"),
        (torch.ones(2, 3), "Tensor"),
        (set(encoders()), "set"),
        ({"image": nn.Linear(8, 4)}, "dict"),
        (lambda x: x, "function"),
        (WithMethod(8, 4).get_features, "method"),
    ],
    ids=["None", "a number", "a name", "a tensor", "a set", "a dict", "a function", "a method"],
)
def test_encoders_that_are_none(given, got):
    message = rf"^encoders: expected a sequence of torch.nn.Module, got {got}; pass \(image_encoder"
    with pytest.raises(TypeError, match=message):
        GradCache(given, ClipLoss())


def test_an_encoder_that_is_missing():
    with pytest.raises(TypeError, match="^encoders: expected torch.nn.Module, got None at 1; wrap"):
        GradCache([nn.Linear(8, 4), None], ClipLoss())


@pytest.mark.parametrize("loss", [None, 5, "clip", torch.ones(()), ClipLoss], ids=str)
def test_losses_that_are_none(loss):
    with pytest.raises(TypeError, match=r"^loss: expected a function or module.*such as ClipLoss"):
        GradCache(encoders(), loss)


@pytest.mark.parametrize("strategy", [5, 0, False, "ddp", DDPStrategy], ids=str)
def test_strategies_that_are_none(strategy):
    with pytest.raises(TypeError, match=r"^strategy: expected LocalStrategy\(\).*pass an instance"):
        GradCache(encoders(), ClipLoss(), strategy=strategy)


@pytest.mark.parametrize("get_features", ["pooler_output", [None, 3]])
def test_extractors_that_are_none(get_features):
    with pytest.raises(TypeError, match="^get_features: expected a function of an encoder"):
        GradCache(encoders(), ClipLoss(), get_features=get_features)


@pytest.mark.parametrize(
    ("chunk_size", "embed", "got", "such"),
    [
        (4, 6, "chunk_size=4, got 6", 8),
        (4, 2, "chunk_size=4, got 2", 8),
        (64, 200, "chunk_size=64, got 200", 192),
        ((4, 3), 8, "chunk_size=3, got 8", 9),
        (4, (8, 9), "chunk_size=4, got 9", 8),
    ],
)
def test_embed_chunk_sizes_that_are_no_multiple(chunk_size, embed, got, such):
    message = f"^embed_chunk_size: expected a multiple of {got}; such as embed_chunk_size={such}$"
    with pytest.raises(ValueError, match=message):
        GradCache(encoders(), ClipLoss(), chunk_size=chunk_size, embed_chunk_size=embed)


@pytest.mark.parametrize(
    "options",
    [
        {"chunk_size": "auto", "embed_chunk_size": 7},
        {"chunk_size": (4, 3), "embed_chunk_size": 24},
        {"chunk_size": 4, "embed_chunk_size": 7, "sort_by_length": ByLength(max_tokens=9)},
        {"chunk_size": 4, "embed_chunk_size": (8, 12)},
    ],
)
def test_embed_chunk_sizes_that_nothing_speaks_against(options):
    GradCache(encoders(), ClipLoss(), **options)


OLD_NAMES = {
    "models": r"encoders=\(query_encoder, passage_encoder\)",
    "chunk_sizes": "chunk_size=64",
    "loss_fn": r"loss=InfoNCELoss\(\)",
    "get_rep_fn": "get_features=function",
    "split_input_fn": "a list with one element a sample",
    "fp16": r"strategy=LocalStrategy\(grad_scaler\), and call it inside torch.autocast",
    "scaler": r"strategy=LocalStrategy\(grad_scaler\)",
}


@pytest.mark.parametrize(("name", "new"), OLD_NAMES.items())
def test_names_of_another_package(name, new):
    """Also where the arguments that are required here have their old names."""
    message = rf"^GradCache: expected arguments that it has, got {name}=; write .*{new}"
    with pytest.raises(TypeError, match=message):
        GradCache(encoders(), ClipLoss(), **{name: None})
    with pytest.raises(TypeError, match=message):
        GradCache(**{name: None})


@pytest.mark.parametrize(
    ("name", "meant"),
    [("chunksize", "chunk_size="), ("get_feature", "get_features="), ("xyz", "encoders, loss, ")],
)
def test_misspelt_names(name, meant):
    message = rf"^GradCache: .*got {name}=; did you mean {meant}"
    with pytest.raises(TypeError, match=message):
        GradCache(encoders(), ClipLoss(), **{name: 4})


def test_the_signature_has_only_names():
    parameters = inspect.signature(GradCache).parameters.values()
    assert all(p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in parameters)
    assert copy.copy(GradCache(encoders(), ClipLoss())).chunk_size == 64


@pytest.mark.parametrize("name", ["chunk_size", "memory_budget", "loss"])
def test_settings_stay_as_they_were_given(name):
    cache = GradCache(encoders(), ClipLoss())
    before = getattr(cache.settings, name)
    with pytest.raises(AttributeError, match=f"{name}: expected settings .* got 3; .* {name}="):
        setattr(cache, name, 3)
    with pytest.raises(FrozenInstanceError):
        setattr(cache.settings, name, 3)
    with pytest.raises(FrozenInstanceError):
        cache.plan.chunk_size = 3
    assert getattr(cache.settings, name) is before


def test_loss_arguments_given_to_the_call():
    cache = GradCache(encoders(), ClipLoss())
    with pytest.raises(TypeError, match=r"got reduction; .* loss_kwargs={'reduction': \.\.\.}"):
        cache(*batch(), reduction="mean")
    with pytest.raises(TypeError, match=r"no_sync_except_last=; pass strategy=DDPStrategy\(\)"):
        cache(*batch(), no_sync_except_last=True)


def test_modules_cannot_be_planned_by_name():
    message = "^image: expected the name of a model, got Linear; .*count_cached_step"
    with pytest.raises(TypeError, match=message):
        plan(*encoders(), "24GB")
    with pytest.raises(TypeError, match="^text: expected the name of a model, got Linear"):
        plan("resnet18", nn.Linear(2, 2), "24GB")


class Returns(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.inner, self.function = nn.Linear(8, 4), function

    def forward(self, x: Tensor) -> Any:
        return self.function(self.inner(x))


def jagged(x: Tensor) -> Tensor:
    return torch.nested.nested_tensor(list(x), layout=torch.jagged)


def in_inference_mode(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x * 2


FEATURES = {
    "sparse": (Tensor.to_sparse, r"got layout torch.sparse_coo; return x.to_dense\(\)"),
    "nested": (jagged, "got a NestedTensor; pool each sample to one vector"),
    "meta": (lambda x: x.to("meta"), "got a tensor on the meta device; give the encoder its"),
    "inference": (in_inference_mode, r"made inside torch.inference_mode\(\), which no gradient"),
}


@pytest.mark.parametrize(("function", "message"), FEATURES.values(), ids=FEATURES)
def test_features_that_no_gradient_passes(function, message):
    ours = Returns(function), nn.Linear(6, 4)
    with pytest.raises(TypeError, match=rf"^encoder 0 \(Returns\): expected features.*{message}"):
        GradCache(ours, ClipLoss(), chunk_size=4)(*batch())
    assert all(p.grad is None for module in ours for p in module.parameters())


def test_a_frozen_encoder_may_run_in_inference_mode():
    (frozen, other, loss), truth = twins(Returns(in_inference_mode), nn.Linear(6, 4), ClipLoss())
    frozen.requires_grad_(False)
    images, texts = batch()
    GradCache([frozen, other], loss, chunk_size=4)(images, texts)
    truth[2]((truth[0].inner(images) * 2).detach(), truth[1](texts)).loss.backward()
    assert worst(gradient_errors([other, loss], truth[1:]))[1] < 1e-5


def test_inputs_without_values():
    images, texts = batch()
    message = r"^encoder 0 \(Linear\): expected inputs with values.*count_cached_step"
    with pytest.raises(ValueError, match=message):
        GradCache(encoders(), ClipLoss())(images.to("meta"), texts)


def test_inputs_of_inference_mode():
    with torch.inference_mode():
        images, texts = batch()
    cache = GradCache(encoders(), ClipLoss(), chunk_size=4)
    with pytest.raises(ValueError, match=r"^encoder 0.*torch.inference_mode\(\); pass x.clone\(\)"):
        cache(images, texts)
    cache(images.clone(), texts.clone())
    cache.encoders[0].requires_grad_(False)
    cache(images, texts.clone())
    with torch.inference_mode():
        deferred_step(cache, images, texts)


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 4)

    def forward(self, x: Tensor, more: Any = None) -> Tensor:
        x.mul_(1.5)
        return self.inner(x)


def test_an_encoder_that_changes_its_input_is_called_that():
    cache = GradCache((InPlace(), nn.Linear(6, 4)), ClipLoss(), chunk_size=4)
    message = r"Likely cause: the encoder changes its input in place \(input\['x'\]\); let it work"
    with pytest.raises(ReplayMismatchError, match=message):
        cache({"x": batch()[0], "more": torch.ones(ROWS)}, batch()[1])


def test_draws_of_numpy_are_still_called_that():
    import numpy

    cache = GradCache(
        (Returns(lambda x: x + float(numpy.random.rand())), nn.Linear(6, 4)),
        ClipLoss(),
        chunk_size=4,
    )
    with pytest.raises(ReplayMismatchError, match="draws from numpy"):
        cache(*batch())


def cross_entropy(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    logits, labels = scale * F.normalize(x) @ F.normalize(y).T, torch.arange(len(x))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def one_sided(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    return F.cross_entropy(scale * F.normalize(x) @ F.normalize(y).T, torch.arange(len(x)))


def sigmoid(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    logits = scale * F.normalize(x) @ F.normalize(y).T - 10
    return -F.logsigmoid(logits * (2 * torch.eye(len(x)).to(x) - 1)).sum() / len(x)


def both_views(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    views = F.normalize(torch.cat([x, y]))
    logits = (scale * views @ views.T).fill_diagonal_(float("-inf"))
    return F.cross_entropy(logits, torch.arange(2 * len(x)).roll(len(x)))


@pytest.mark.parametrize("impl", ["reference", "tiled"])
@pytest.mark.parametrize(
    ("loss_class", "true_loss"),
    [
        (ClipLoss, cross_entropy),
        (InfoNCELoss, one_sided),
        (SigLipLoss, sigmoid),
        (NTXentLoss, both_views),
    ],
)
def test_features_in_fp64_meet_a_scale_in_fp64(loss_class, true_loss, impl):
    """Also where the module, and so the logarithm that it learns, is in fp32."""
    x, y = torch.randn(2, ROWS, 8).double().unbind()
    loss = loss_class(impl=impl)
    assert loss.log_logit_scale.dtype is torch.float32
    expected = true_loss(x, y, loss.log_logit_scale.detach().double().exp())
    torch.testing.assert_close(loss(x, y).loss.detach(), expected, rtol=1e-12, atol=1e-12)
    given = torch.tensor(17.3, dtype=torch.float64)
    expected = true_loss(x, y, given)
    torch.testing.assert_close(
        loss(x, y, logit_scale=given).loss.detach(), expected, rtol=1e-12, atol=1e-12
    )


def test_a_step_in_fp64_with_a_loss_in_fp32():
    modules = nn.Linear(8, 4).double(), nn.Linear(6, 4).double(), ClipLoss()
    ours, truth = twins(*modules)
    inputs = [x.double() for x in batch()]
    GradCache(ours[:2], ours[2], chunk_size=4)(*inputs)

    def true_loss(x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(x, y, truth[2].log_logit_scale.double().exp())

    one_shot(truth[:2], true_loss, inputs)
    assert worst(gradient_errors(ours[:2], truth[:2]))[1] < 1e-12
