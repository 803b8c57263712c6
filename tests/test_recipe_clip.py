"""recipes/clip.yaml: the objective is equations 1 to 8 of the CLIP loss, as they are written."""

from __future__ import annotations

import math

import pytest
import torch
from recipe_runs import assert_trains_and_resumes, recipe, run_recipe, shortened
from tiny_run import logged
from torch import Tensor, nn
from trainer_step import assert_step_equals, trainer_of

from gradcache_clip.train.config_errors import ConfigError
from gradcache_clip.train.config_file import load_config


def equations_1_to_8(image_cls: Tensor, text_cls: Tensor, scale: Tensor) -> Tensor:
    """B rows of representations; the similarities are multiplied by a scale, 1 in the text."""
    B = len(image_cls)
    I = torch.stack([h / h.square().sum().sqrt() for h in image_cls])  # (2), (3)
    T = torch.stack([h / h.square().sum().sqrt() for h in text_cls])  # (2), (4)
    L = scale * (I @ T.T)  # (1), (5)
    image_to_text = torch.zeros((), dtype=L.dtype)
    text_to_image = torch.zeros((), dtype=L.dtype)
    for i in range(B):
        image_to_text += -torch.log(L[i, i].exp() / L[i, :].exp().sum()) / B  # (6)
        text_to_image += -torch.log(L[i, i].exp() / L[:, i].exp().sum()) / B  # (7)
    return (image_to_text + text_to_image) / 2  # (8)


def formula(images: Tensor, texts: Tensor, loss: nn.Module, groups: list[str]) -> Tensor:
    return equations_1_to_8(images, texts, held_at_100(loss))


@pytest.mark.parametrize("scale", [1.0, 1 / 0.07, 100.0])
def test_the_step_is_the_equations(data, tmp_path, scale):
    more = [f"loss.init_logit_scale={scale}"]
    settings = shortened(data, tmp_path / "run", *more)
    trainer = trainer_of(recipe("clip"), settings, tmp_path / "run")
    assert_step_equals(trainer, formula)
    assert float(trainer.loss.logit_scale.detach()) == pytest.approx(scale)


def test_features_are_projections_of_class_tokens(data, tmp_path):
    trainer = trainer_of(recipe("clip"), shortened(data, tmp_path / "run"), tmp_path / "run")
    encoder = trainer.encoder
    (images, tokens), _ = trainer.inputs_of(next(iter(trainer.batches())))
    vit = encoder.image_tower.backbone
    h_v = vit.forward_features((images.double() / 255 - 0.5) / 0.5)[:, 0]
    h_w = encoder.text_tower.backbone(**tokens).last_hidden_state[:, 0]
    cls = trainer.tokenizer._backend.token_to_id("[CLS]")
    assert (tokens["input_ids"][:, 0] == cls).all()
    torch.testing.assert_close(encoder(0, images), h_v @ encoder.image_projection.weight.T)
    torch.testing.assert_close(encoder(1, tokens), h_w @ encoder.text_projection.weight.T)
    assert encoder.image_projection.bias is None and encoder.text_projection.bias is None


def test_the_scale_is_clamped_at_100(data, tmp_path):
    output = tmp_path / "run"
    more = ("loss.init_logit_scale=99.9", "optimizer.learning_rate=0.05")
    run_recipe("clip", data, output, *more)
    scales = logged(output, "logit_scale")
    config = load_config(output / "config.yaml")
    assert config.loss.max_logit_scale == 100
    # A step may end above the bound; the next loss uses it at the bound.
    trainer = trainer_of(output / "config.yaml", ["train.resume=true"], output)
    with torch.no_grad():
        trainer.loss.log_logit_scale.fill_(10.0)
    assert_step_equals(trainer, formula)
    assert len(scales) == 4


def held_at_100(loss: nn.Module) -> Tensor:
    """CLIP clamps the parameter, whose gradient goes on."""
    with torch.no_grad():
        loss.log_logit_scale.clamp_(max=math.log(100))
    return loss.log_logit_scale.exp()


def test_a_short_run_resumes_exactly(data, tmp_path):
    summary = assert_trains_and_resumes("clip", data, tmp_path)
    assert 0 <= summary.metrics["image_to_text_recall_at_1"] <= 1


def test_a_wrong_bound_is_refused_before_anything_is_written(data, tmp_path):
    with pytest.raises(ConfigError, match="init_logit_scale: expected at most loss.max_logit_sc"):
        run_recipe("clip", data, tmp_path / "run", "loss.max_logit_scale=5")
    assert not (tmp_path / "run").exists()
