"""What the trainer's step minimises, beside formulas over the whole batch in plain torch."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from processes import SAME_BATCHES, alone, assert_same_run, in_processes
from test_distributed import LOCAL, WORLD, OneModule, global_batch, in_two_processes, tower
from tiny_run import overrides
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP
from trainer_step import Formula, assert_same_gradients, assert_step_equals, same_group, trainer_of
from trainer_step import unit as unit_rows

from gradcache_clip import GradCache
from gradcache_clip.distributed import DDPStrategy
from gradcache_clip.train.config import Config
from gradcache_clip.train.config_errors import ConfigError
from gradcache_clip.train.config_file import load_config
from gradcache_clip.train.programs import program_of
from gradcache_clip.train.programs.program import group_ids

NO_DRAWS = (
    "data.random_crop=1",
    "model.image_kwargs.proj_drop_rate=0",
    "model.text_kwargs.hidden_dropout_prob=0",
    "model.text_kwargs.attention_probs_dropout_prob=0",
)
WIDTHS = "loss.matryoshka=[2, 5, 8]"
SIGLIP = ("loss.name=siglip", "loss.init_logit_scale=10", "loss.max_logit_scale=0")
CLIP_SETTINGS = [
    (),
    ("loss.label_smoothing=0.1",),
    ("loss.positives=group",),
    ("loss.positives=ignore",),
    ("loss.positives=group", "loss.label_smoothing=0.2"),
    ("loss.positives=ignore", "loss.label_smoothing=0.2"),
    (WIDTHS,),
    (WIDTHS, "loss.positives=group"),
    (WIDTHS, "loss.positives=ignore", "loss.label_smoothing=0.1"),
    (*SIGLIP,),
    (*SIGLIP, "loss.positives=group"),
    (*SIGLIP, WIDTHS),
    (*SIGLIP, WIDTHS, "loss.positives=group", "loss.init_logit_bias=-3"),
]


def formula_of(config: Config) -> Formula:
    """The loss of a configuration, written out; one row of S for each image."""
    widths = config.loss.matryoshka or [config.model.feature_dim]
    one = siglip if config.loss.name == "siglip" else clip

    def formula(images: Tensor, texts: Tensor, loss: nn.Module, groups: list[str]) -> Tensor:
        inner = getattr(loss, "loss", loss)
        scale, same = inner.log_logit_scale.exp(), same_group(groups)
        cosines = [unit_rows(images, width) @ unit_rows(texts, width).T for width in widths]
        return sum(one(config, scale * cosine, inner, same) for cosine in cosines)

    return formula


def clip(config: Config, logits: Tensor, loss: nn.Module, same: Tensor) -> Tensor:
    """Cross-entropy with the target spread over positives, and over all that compete."""
    own, smoothing = torch.eye(len(logits), dtype=torch.bool), config.loss.label_smoothing
    competes = ~same | own if config.loss.positives == "ignore" else torch.ones_like(own)
    positive = same if config.loss.positives == "group" else own
    share = positive / positive.sum(1, keepdim=True, dtype=torch.float64)
    even = competes / competes.sum(1, keepdim=True, dtype=torch.float64)
    target = (1 - smoothing) * share + smoothing * even

    def rows(S: Tensor) -> Tensor:
        log_share = S.masked_fill(~competes, -torch.inf).log_softmax(1)
        return -(target * log_share.masked_fill(~competes, 0)).sum(1).mean()

    return (rows(logits) + rows(logits.T)) / 2


def groups_of_three(row: int) -> str:
    """Of rows that look and read otherwise: of equal captions all targets would say the same."""
    return f"group {row // 3}"


def siglip(config: Config, logits: Tensor, loss: nn.Module, same: Tensor) -> Tensor:
    own = torch.eye(len(logits), dtype=torch.bool)
    positive = same if config.loss.positives == "group" else own
    z = 2.0 * positive - 1
    return -F.logsigmoid(z * (logits + loss.logit_bias)).sum() / len(logits)


@pytest.mark.parametrize("settings", CLIP_SETTINGS, ids=lambda each: " ".join(each) or "plain")
def test_the_trainers_step_is_the_formula(data, tmp_path, settings):
    trainer = trainer_of(None, overrides(data, tmp_path, *NO_DRAWS, *settings), tmp_path)
    seen = []

    def formula(images: Tensor, texts: Tensor, loss: nn.Module, groups: list[str]) -> Tensor:
        seen.append(same_group(groups))
        return formula_of(trainer.config)(images, texts, loss, groups)

    assert_step_equals(trainer, formula, groups_of_three)
    assert seen[0].sum() > len(seen[0])


def test_each_setting_is_another_loss(data, tmp_path):
    """Otherwise the test above could not tell them apart."""
    losses = set()
    for number, settings in enumerate(CLIP_SETTINGS):
        folder = tmp_path / str(number)
        trainer = trainer_of(None, overrides(data, folder, *NO_DRAWS, *settings), folder)
        output = assert_step_equals(trainer, formula_of(trainer.config), groups_of_three)
        losses.add(round(float(output.loss), 12))
    assert len(losses) == len(CLIP_SETTINGS)


def test_chunks_alone_know_their_groups(data, tmp_path):
    """Plain accumulation: each chunk has a loss of its own, weighted by its rows."""
    more = ("loss.positives=group", "train.grad_cache=false")
    trainer = trainer_of(None, overrides(data, tmp_path, *NO_DRAWS, *more), tmp_path)
    whole, size = formula_of(trainer.config), trainer.config.train.chunk_size

    def formula(images: Tensor, texts: Tensor, loss: nn.Module, groups: list[str]) -> Tensor:
        parts = [slice(start, start + size) for start in range(0, len(images), size)]
        losses = [whole(images[p], texts[p], loss, groups[p]) * len(images[p]) for p in parts]
        return sum(losses) / len(images)

    assert_step_equals(trainer, formula)


def test_the_scale_is_held_at_100_or_not_at_all():
    for name, bound, scale in (("clip", 100, 100), ("clip", 0, 1000), ("siglip", 0, 1000)):
        settings = [f"loss.name={name}", f"loss.max_logit_scale={bound}"]
        loss = program_of(load_config(None, settings)).loss().double()
        with torch.no_grad():
            loss.log_logit_scale.fill_(1000).log_()
        loss(torch.eye(3).double(), torch.eye(3).double())
        assert float(loss.logit_scale.detach()) == pytest.approx(scale)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["loss.max_logit_scale=-1"], "loss.max_logit_scale: expected at least 0, got -1"),
        (["loss.init_logit_scale=101"], "loss.init_logit_scale: expected at most loss.max_logit"),
        (["loss.init_logit_scale=0", "loss.max_logit_scale=0"], "init_logit_scale: .* more than 0"),
        (
            ["loss.name=siglip", "loss.label_smoothing=0.1"],
            "label_smoothing: no such key with",
        ),
        (["loss.name=siglip", "loss.positives=ignore"], "positives: expected one of pair, group"),
        (["loss.positives=all"], "loss.positives: expected one of pair, group, ignore, got 'all'"),
    ],
)
def test_mistakes_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        load_config(None, settings)


def test_numbers_tell_groups_apart():
    numbers = group_ids(["cat", "dog", "cat", "", "Cat"])
    assert numbers.dtype == torch.int64 and len(set(numbers.tolist())) == 4
    assert numbers[0] == numbers[2]
    # Not Python's hash, which differs from process to process.
    assert group_ids(["cat"]).tolist() == [3429664268601861939]


GROUPS = [f"g{row % 7}" for row in range(WORLD * LOCAL)]


def groups_over_two_ranks(rank: int) -> None:
    """Groups reach over both ranks: row 1 and row 15 are of one."""
    for settings in CLIP_SETTINGS:
        for exchange in ("gather", "ring"):
            compare_with_one_process(rank, [*settings, f"train.exchange={exchange}"])


def compare_with_one_process(rank: int, settings: list[str]) -> None:
    torch.manual_seed(7)
    config = load_config(None, ["model.feature_dim=8", *settings])
    program = program_of(config)
    loss, pair = program.loss().double(), OneModule(tower(6), tower(9)).double()
    truth = copy.deepcopy([pair, loss])
    mine = slice(rank * LOCAL, (rank + 1) * LOCAL)
    cache = GradCache(DDP(pair), loss, chunk_size=4, strategy=DDPStrategy())
    inputs = global_batch(0)
    kwargs = program._loss_kwargs(GROUPS[mine], torch.device("cpu"))
    out = cache(*(x[mine] for x in inputs), loss_kwargs=kwargs)
    features = [truth[0](index, given) for index, given in enumerate(inputs)]
    expected = formula_of(config)(*features, truth[1], GROUPS)
    expected.backward()
    assert abs(float(out.loss) - float(expected)) < 1e-10, settings
    assert_same_gradients([pair, loss], truth)


@pytest.mark.distributed
def test_groups_over_two_ranks():
    in_two_processes(groups_over_two_ranks)


@pytest.mark.distributed
def test_a_run_with_groups_in_two_processes(data, tmp_path):
    more = (*SAME_BATCHES, "train.steps=3", "loss.positives=group", "loss.matryoshka=[4, 8]")
    one = alone(data, tmp_path / "one", *more[len(SAME_BATCHES) :])
    assert in_processes(2, data, tmp_path / "two", *more) == ["finished"] * 2
    assert_same_run(tmp_path / "two", one)
