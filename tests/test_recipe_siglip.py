"""recipes/siglip.yaml: the objective is algorithm 1 of the SigLIP paper."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from processes import in_processes
from recipe_runs import assert_trains_and_resumes, recipe, run_recipe, shortened
from torch import Tensor, nn
from trainer_step import assert_step_equals, trainer_of

from gradcache_clip.train.config_errors import ConfigError
from gradcache_clip.train.config_file import load_config
from gradcache_clip.train.programs import program_of


def algorithm_1(img_emb: Tensor, txt_emb: Tensor, t_prime: Tensor, b: Tensor) -> Tensor:
    """Line by line, with the names of the paper."""
    n = len(img_emb)
    t = torch.exp(t_prime)
    zimg = F.normalize(img_emb)
    ztxt = F.normalize(txt_emb)
    logits = zimg @ ztxt.T * t + b
    labels = 2 * torch.eye(n, dtype=logits.dtype) - torch.ones(n, n, dtype=logits.dtype)
    return -torch.sum(F.logsigmoid(labels * logits)) / n


def formula(images: Tensor, texts: Tensor, loss: nn.Module, groups: list[str]) -> Tensor:
    return algorithm_1(images, texts, loss.log_logit_scale, loss.logit_bias)


def test_the_step_is_the_algorithm(data, tmp_path):
    trainer = trainer_of(recipe("siglip"), shortened(data, tmp_path / "run"), tmp_path / "run")
    assert float(trainer.loss.logit_scale.detach()) == pytest.approx(10)
    assert float(trainer.loss.logit_bias.detach()) == -10
    assert_step_equals(trainer, formula)
    assert trainer.loss.logit_bias.grad.abs() > 0


def test_the_scale_has_no_upper_bound(data, tmp_path):
    trainer = trainer_of(recipe("siglip"), shortened(data, tmp_path / "run"), tmp_path / "run")
    with torch.no_grad():
        trainer.loss.log_logit_scale.fill_(7.0)
    assert_step_equals(trainer, formula)
    assert float(trainer.loss.log_logit_scale.detach()) == 7.0


def test_a_bound_holds_where_one_is_given(data, tmp_path):
    more = ("loss.max_logit_scale=20",)
    settings = shortened(data, tmp_path / "run", *more)
    trainer = trainer_of(recipe("siglip"), settings, tmp_path / "run")
    with torch.no_grad():
        trainer.loss.log_logit_scale.fill_(7.0)

    def bounded(images: Tensor, texts: Tensor, loss: nn.Module, groups: list[str]) -> Tensor:
        with torch.no_grad():
            loss.log_logit_scale.clamp_(max=torch.tensor(20.0).double().log().item())
        return formula(images, texts, loss, groups)

    assert_step_equals(trainer, bounded)


def test_a_short_run_resumes_exactly(data, tmp_path):
    summary = assert_trains_and_resumes("siglip", data, tmp_path)
    assert 0 <= summary.metrics["text_to_image_recall_at_1"] <= 1
    assert load_config(tmp_path / "whole" / "config.yaml").loss.max_logit_scale == 0


@pytest.mark.distributed
def test_two_processes_finish_together(data, tmp_path):
    more = ("loss.name=siglip", "loss.init_logit_scale=10", "loss.max_logit_scale=0")
    assert in_processes(2, data, tmp_path / "run", *more, "train.steps=3") == ["finished"] * 2


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("loss.label_smoothing=0.1", "loss.label_smoothing: no such key with loss.name=siglip"),
        ("loss.positives=ignore", "loss.positives: expected one of pair, group, got"),
    ],
)
def test_what_the_loss_has_no_use_for_is_refused(data, tmp_path, setting, message):
    with pytest.raises(ConfigError, match=message):
        run_recipe("siglip", data, tmp_path / "run", setting)
    assert not (tmp_path / "run").exists()


def test_guessing_is_the_best_logit_for_all_pairs():
    program = program_of(load_config(recipe("siglip")))
    logit = torch.linspace(-12, 0, 100_001, dtype=torch.float64)
    losses = F.softplus(-logit) + 1023 * F.softplus(logit)
    assert program.chance_loss == pytest.approx(losses.min().item(), rel=1e-6)
    assert program_of(load_config(recipe("clip"))).chance_loss is None, "log of the candidates"
