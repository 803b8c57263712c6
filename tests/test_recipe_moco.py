"""recipes/moco.yaml and moco_image.yaml: algorithm 1 of the MoCo paper, in one process and two."""

from __future__ import annotations

import copy
from contextlib import closing

import pytest
import torch
import torch.nn.functional as F
from processes import SAME_BATCHES, alone, assert_same_run, in_processes, weights
from recipe_runs import assert_trains_and_resumes, recipe, run_recipe, shortened
from test_losses_moco import equation_1
from test_recipe_simclr import PLAIN_VIEWS
from tiny_run import logged
from torch import Tensor, nn
from trainer_step import assert_step_equals, trainer_of, unit

from gradcache_clip.train.config_errors import ConfigError
from gradcache_clip.train.config_file import load_config
from gradcache_clip.train.data import Batch
from gradcache_clip.train.momentum import MomentumEncoder
from gradcache_clip.train.optimizer import build_optimizer, learning_rate_at
from gradcache_clip.train.programs import program_of
from gradcache_clip.train.step import make_backward

BOTH = pytest.mark.parametrize("name", ["moco", "moco_image"])


def formula(*features_and_more: Tensor) -> Tensor:
    """Equation 1, for each modality against the keys of the other."""
    *features, loss, _ = features_and_more
    queues = [queue.features for queue in loss.queues]
    tau = 1 / float(loss.logit_scale.detach())
    if len(features) == 2:
        return equation_1(*features, queues[0], tau)
    images, texts, image_keys, text_keys = features
    sides = (images, text_keys, queues[0]), (texts, image_keys, queues[1])
    return sum(equation_1(*side, tau) for side in sides) / 2


@BOTH
def test_the_step_is_the_equation(data, tmp_path, name):
    settings = shortened(data, tmp_path / "run", "loss.queue_size=50")
    trainer = trainer_of(recipe(name), settings, tmp_path / "run")
    before = copy.deepcopy(trainer.loss.state_dict())
    assert_step_equals(trainer, formula)
    assert all(parameter.grad is None for parameter in trainer.encoder.key.parameters())
    # The step itself moves neither the queue nor the average.
    assert all(torch.equal(value, before[key]) for key, value in trainer.loss.state_dict().items())


def algorithm_1(f_q: nn.Module, f_k: nn.Module, queue: Tensor, batches, optimizer, rates, m, t):
    """Pytorch-like pseudo-code of the paper, line by line; rows for its columns."""
    losses = []
    for (x_q, x_k), rate in zip(batches, rates, strict=True):
        q = F.normalize(f_q(0, x_q))  # queries: NxC
        k = F.normalize(f_k(0, x_k)).detach()  # keys: NxC, no gradient to keys
        N = len(q)
        l_pos = torch.bmm(q.view(N, 1, -1), k.view(N, -1, 1)).view(N, 1)
        l_neg = torch.mm(q, queue.T)
        logits = torch.cat([l_pos, l_neg], dim=1)  # Nx(1+K)
        labels = torch.zeros(N, dtype=torch.long)  # positives are the 0-th
        loss = F.cross_entropy(logits / t, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[-1]["lr"] = rate
        optimizer.step()
        with torch.no_grad():  # momentum update: key network
            for key, query in zip(f_k.parameters(), f_q.parameters(), strict=True):
                key.copy_(m * key + (1 - m) * query)
        queue = torch.cat([queue, k])[N:]  # enqueue the current, dequeue the earliest minibatch
        losses.append(float(loss.detach()))
    return losses, queue


def test_five_steps_are_algorithm_1(data, tmp_path):
    """Long enough for the queue to come round."""
    settings = shortened(
        data, tmp_path / "run", "loss.queue_size=50", "loss.momentum=0.9", "train.steps=5",
        "train.batch_size=20", "train.chunk_size=7", "optimizer.learning_rate=0.01",
    )  # fmt: skip
    trainer = trainer_of(recipe("moco_image"), settings, tmp_path / "run")
    with closing(trainer.batches()) as stream:
        batches = [next(stream) for _ in range(5)]
    f_q, f_k = copy.deepcopy(trainer.encoder.query), copy.deepcopy(trainer.encoder.key)
    queue = F.normalize(trainer.loss.queues[0].features)
    config = trainer.config
    optimizer = build_optimizer(config.optimizer, f_q)
    rates = [learning_rate_at(step, config.optimizer, 5) for step in range(5)]
    pairs = [batch.images.unbind(1) for batch in batches]
    t = 1 / float(trainer.loss.logit_scale.detach())
    assert t == pytest.approx(0.2)
    losses, queue = algorithm_1(f_q, f_k, queue, pairs, optimizer, rates, m=0.9, t=t)

    got = [float(result.loss) for result in trainer.take_steps(batches)]
    assert got == pytest.approx(losses, abs=1e-10)
    for ours, truth in ((trainer.encoder.query, f_q), (trainer.encoder.key, f_k)):
        for one, other in zip(ours.parameters(), truth.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)
    # Ours overwrites the oldest in place: after five batches of 20 the newest end at row 50.
    torch.testing.assert_close(trainer.loss.queues[0].features, queue, rtol=1e-8, atol=1e-10)


@BOTH
def test_a_short_run_resumes_exactly(data, tmp_path, name):
    summary = assert_trains_and_resumes(name, data, tmp_path, "loss.queue_size=60")
    assert summary.metrics
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    queues = [key for key in whole if key.endswith("features_of_all")]
    assert len(queues) == (2 if name == "moco" else 1)
    moved = [key for key in whole if key.startswith("key.") and whole[key].is_floating_point()]
    assert any(not torch.equal(whole[key], whole["query" + key[3:]]) for key in moved)


@pytest.mark.distributed
@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
@pytest.mark.parametrize("views", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_two_processes_are_one(data, tmp_path, views):
    more = PLAIN_VIEWS if views == 2 else ("loss.learn_logit_scale=true",)
    more = [*more, "loss.name=moco", "loss.queue_size=128", "loss.momentum=0.9", "train.steps=4"]
    one, two = alone(data, tmp_path / "one", *more), tmp_path / "two"
    assert in_processes(2, data, two, *SAME_BATCHES, *more) == ["finished"] * 2
    assert_same_run(two, one)


@pytest.mark.distributed
def test_a_queue_that_processes_cannot_share(data, tmp_path):
    more = [*SAME_BATCHES, "loss.name=moco", "loss.queue_size=101"]
    outcomes = in_processes(2, data, tmp_path / "run", *more)
    assert all("loss.queue_size: expected a multiple of the 2 processes, got 101; use "
               "loss.queue_size=100" in outcome for outcome in outcomes)  # fmt: skip
    assert not (tmp_path / "run").exists()


class Normed(nn.Module):
    """Its features depend on their chunk."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer = nn.BatchNorm1d(12), nn.Linear(12, 4)

    def forward(self, tower: int, images: Tensor) -> Tensor:
        return self.layer(self.norm(images.double().flatten(1)))


def test_batch_norm_meets_keys_of_other_chunks():
    """Section 3.3, on one device: keys are shuffled before the encoder and back after it."""
    settings = ["program=views", "loss.name=moco", "train.batch_size=22", "train.chunk_size=5"]
    config = load_config(None, [*settings, "model.feature_dim=4"])
    program = program_of(config)
    encoder = program._queue.encoder(Normed().double())
    images = torch.randint(0, 256, (22, 2, 3, 2, 2), dtype=torch.uint8)
    batch = Batch(images, [""] * 22, [""] * 22, ["g"] * 22)
    (queries, keys), loss_kwargs = program.inputs(batch, None, torch.device("cpu"))
    order = loss_kwargs["order"]
    assert torch.equal(queries, images[:, 0]) and torch.equal(keys[order], images[:, 1])
    place = order.tolist()
    for start in range(0, 22, 5):
        chunks = {place[row] // 5 for row in range(start, min(start + 5, 22))}
        assert len(chunks) >= min(5, 22 - start) - 1
    loss = program.loss().double()
    with pytest.warns(UserWarning, match="batch norm in train mode"):
        output = make_backward(encoder, loss, config.train, None)(
            queries, keys, loss_kwargs={"order": order}
        )
    tau = 1 / float(loss.logit_scale.detach())
    # Chunks of five rows, 22 in all: sizes as the engine cuts them.
    by_chunk = [torch.cat([m(0, c) for c in x.split(5)]) for m, x in
                ((encoder.query, queries), (encoder.key, keys))]  # fmt: skip
    expected = equation_1(by_chunk[0], by_chunk[1][order], unit(loss.queues[0].features), tau)
    assert float(output.loss) == pytest.approx(float(expected.detach()), abs=1e-8)


def test_without_batch_norm_nothing_is_shuffled(data, tmp_path):
    trainer = trainer_of(recipe("moco"), shortened(data, tmp_path / "run"), tmp_path / "run")
    with closing(trainer.batches()) as stream:
        inputs, loss_kwargs = trainer.inputs_of(next(stream))
    assert loss_kwargs == {} and inputs[0] is inputs[2] and inputs[1] is inputs[3]


def test_batch_norm_in_a_single_chunk_is_refused(data, tmp_path):
    more = ["model.image=resnet10t", "train.chunk_size=24"]
    with pytest.raises(ConfigError, match="train.chunk_size: expected less than train.batch_size"):
        run_recipe("moco_image", data, tmp_path / "run", *more)
    assert not (tmp_path / "run").exists()


def test_the_average_moves_and_is_never_trained():
    query = nn.Linear(3, 2)
    encoder = MomentumEncoder(query, towers=1, momentum=0.75)
    assert not any(p.requires_grad for p in encoder.key.parameters())
    with torch.no_grad():
        query.weight.fill_(4.0), encoder.key.weight.fill_(0.0)
    encoder.update()
    assert encoder.key.weight.unique().tolist() == [1.0]
    encoder.update()
    assert encoder.key.weight.unique().tolist() == [1.75]
    assert query.weight.unique().tolist() == [4.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("loss.momentum=1", "loss.momentum: expected less than 1, got 1"),
        ("loss.queue_size=0", "loss.queue_size: expected at least 1, got 0"),
        ("loss.queue_size=20", "loss.queue_size: expected at least train.batch_size, which is 24"),
        ("loss.positives=group", "loss.positives: no such key with loss.name=moco"),
        ("loss.matryoshka=[64, 128]", "loss.matryoshka: no such key with loss.name=moco"),
        ("train.grad_cache=false", "train.grad_cache: expected true with loss.name=moco"),
        ("train.ema_decay=0.9", "train.ema_decay: expected 0.0 with loss.name=moco"),
        ("train.sort_by_length=true", "train.sort_by_length: expected false with loss.name=moco"),
        ("model.freeze=image", "model.freeze: expected '' with loss.name=moco, got 'image'"),
        ("distributed.strategy=fsdp", "distributed.strategy: expected 'ddp' with loss.name=moco"),
    ],
)
def test_what_does_not_go_together_is_refused(data, tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        run_recipe("moco", data, tmp_path / "run", change)
    assert not (tmp_path / "run").exists()


def test_a_fixed_scale_stays(data, tmp_path):
    run_recipe(
        "moco", data, tmp_path / "fixed", "loss.queue_size=60", "optimizer.learning_rate=0.05"
    )
    fixed = set(logged(tmp_path / "fixed", "logit_scale").values())
    assert len(fixed) == 1 and fixed.pop() == pytest.approx(1 / 0.07)
    run_recipe("moco", data, tmp_path / "learned", "loss.queue_size=60",
               "optimizer.learning_rate=0.05", "loss.learn_logit_scale=true")  # fmt: skip
    assert logged(tmp_path / "learned", "logit_scale")[4] != pytest.approx(1 / 0.07, rel=1e-3)


def test_deepspeed_steps_the_scale_apart():
    settings = ["loss.learn_logit_scale=false", "distributed.strategy=deepspeed"]
    with pytest.raises(ConfigError, match="loss.learn_logit_scale: expected true with distributed"):
        load_config(None, settings)
