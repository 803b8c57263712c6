"""recipes/simclr.yaml: the objective is equation 1 of the SimCLR paper over two views."""

from __future__ import annotations

import json

import pytest
import torch
from processes import SAME_BATCHES, alone, assert_same_run, in_processes
from recipe_runs import assert_trains_and_resumes, recipe, run_recipe, shortened
from tiny_run import logged
from torch import Tensor, nn
from trainer_step import assert_step_equals, trainer_of

from gradcache_clip.train.config_errors import ConfigError
from gradcache_clip.train.config_file import load_config
from gradcache_clip.train.programs import program_of
from gradcache_clip.train.run_folder import RunFolder
from gradcache_clip.train.run_pictures import draw_run, run_curve

# Identical views, whatever is drawn: draws differ with the number of processes.
PLAIN_VIEWS = (
    *("program=views", "data.random_crop=1", "augment.flip=0", "augment.color_jitter=0"),
    *("augment.grey=0", "augment.blur=0", "loss.learn_logit_scale=false"),
)


def equation_1(z_first: Tensor, z_second: Tensor, tau: float) -> Tensor:
    """2N examples; 2k and 2k - 1 are views of one image (here: k and N + k)."""
    z = torch.cat([z_first, z_second])
    N = len(z_first)

    def sim(u: Tensor, v: Tensor) -> Tensor:
        return u @ v / (u.norm() * v.norm())

    def loss_of(i: int, j: int) -> Tensor:
        others = [torch.exp(sim(z[i], z[k]) / tau) for k in range(2 * N) if k != i]
        return -torch.log(torch.exp(sim(z[i], z[j]) / tau) / torch.stack(others).sum())

    return torch.stack([loss_of(k, k + N) + loss_of(k + N, k) for k in range(N)]).sum() / (2 * N)


@pytest.mark.parametrize("tau", [0.2, 0.05])
def test_the_step_is_the_equation(data, tmp_path, tau):
    settings = shortened(data, tmp_path / "run", f"loss.init_logit_scale={1 / tau}")
    trainer = trainer_of(recipe("simclr"), settings, tmp_path / "run")

    def formula(first: Tensor, second: Tensor, loss: nn.Module, groups: list[str]) -> Tensor:
        # The scale that fp32 made of it.
        assert float(loss.logit_scale) == pytest.approx(1 / tau)
        return equation_1(first, second, 1 / float(loss.logit_scale))

    output = assert_step_equals(trainer, formula)
    assert trainer.loss.log_logit_scale.grad is None and 0 <= output.accuracy <= 1


def test_the_projection_is_a_network_of_two_layers(data, tmp_path):
    """Section 2.1: z = W2 relu(W1 h)."""
    settings = shortened(data, tmp_path / "run")
    encoder = trainer_of(recipe("simclr"), settings, tmp_path / "run").encoder
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    first, second = encoder.image_projection[0], encoder.image_projection[2]
    h = encoder.image_tower(images)
    z = (h @ first.weight.T + first.bias).clamp(min=0) @ second.weight.T + second.bias
    torch.testing.assert_close(encoder(0, images), z)
    assert torch.equal(encoder(0, images), encoder(1, images))
    assert (first.weight.shape, second.weight.shape) == ((256, 256), (128, 256))


def test_a_linear_projection(data, tmp_path):
    settings = shortened(data, tmp_path / "run", "model.projection_hidden=0")
    encoder = trainer_of(recipe("simclr"), settings, tmp_path / "run").encoder
    assert encoder.image_projection.weight.shape == (128, 256)


def test_a_short_run_resumes_exactly(data, tmp_path):
    summary = assert_trains_and_resumes("simclr", data, tmp_path)
    assert set(summary.metrics) == {"knn_accuracy", "probe_accuracy", "label_chance"}
    assert logged(tmp_path / "whole", "logit_scale")[4] == pytest.approx(5)
    # Nothing of texts is left behind.
    assert not (tmp_path / "whole" / "tokenizer.json").exists()


def test_the_loss_falls_and_pictures_are_drawn(data, tmp_path):
    """Views of which 24 images can learn something in 20 steps."""
    more = ["data.random_crop=0.8", "augment.color_jitter=0", "augment.grey=0", "train.steps=20"]
    run_recipe("simclr", data, tmp_path / "run", *more, "train.evaluate_every=10")
    losses = logged(tmp_path / "run", "loss")
    assert max(losses[19], losses[20]) < losses[1] - 0.5
    run, config = RunFolder(tmp_path / "run"), load_config(tmp_path / "run" / "config.yaml")
    # 2 x 24 views, without the one that looks.
    assert run_curve(run, config).candidates == 47
    (curves,) = draw_run(run, program_of(config), None, None)
    assert curves.stat().st_size > 10_000


def test_plain_accumulation_ends_at_the_chunk(data, tmp_path):
    more = ["train.grad_cache=false", "train.chunk_size=12", "loss.init_logit_scale=0.001"]
    run_recipe("simclr", data, tmp_path / "run", *more)
    loss = logged(tmp_path / "run", "loss")[1]
    # At a scale of nothing: the logarithm of the views that compete.
    assert loss == pytest.approx(torch.tensor(23.0).log().item(), abs=0.01)


@pytest.mark.distributed
@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
def test_two_processes_are_one(data, tmp_path):
    more = [*PLAIN_VIEWS, "loss.name=nt_xent", "train.steps=3"]
    one = alone(data, tmp_path / "one", *more)
    two = tmp_path / "two"
    assert in_processes(2, data, two, *SAME_BATCHES, *more) == ["finished"] * 2
    assert_same_run(two, one)
    summaries = [json.loads((run / "summary.json").read_text()) for run in (one, two)]
    assert summaries[0]["metrics"] == pytest.approx(summaries[1]["metrics"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("program=films", "program: expected one of pairs, views, texts, got 'films'"),
        ("loss.name=clip", "loss.name: expected one of nt_xent, moco, got 'clip'"),
        ("loss.positives=group", "loss.positives: no such key"),
        ("loss.label_smoothing=0.1", "loss.label_smoothing: no such key"),
        ("model.freeze=image", "model.freeze: no such key"),
        ("train.sort_by_length=true", "train.sort_by_length: no such key"),
        ("distributed.strategy=fsdp", "distributed.strategy: expected 'ddp' with program=views"),
        ("augment.flip=2", "augment.flip: expected at most 1, got 2"),
        ("model.projection_hidden=-1", "model.projection_hidden: expected at least 0, got -1"),
        ("evaluation.knn_k=0", "evaluation.knn_k: expected at least 1, got 0"),
    ],
)
def test_what_does_not_go_together_is_refused(data, tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        run_recipe("simclr", data, tmp_path / "run", change)
    assert not (tmp_path / "run").exists()


def test_a_hidden_layer_is_for_views():
    with pytest.raises(
        ConfigError, match="no such key with program=pairs; leave it out, or set program=views"
    ):
        load_config(None, ["model.projection_hidden=64"])
