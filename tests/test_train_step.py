"""What the training section hands to the engine, and that it changes no gradient."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_run import make_data, overrides
from torch import Tensor, nn
from trainer_step import trainer_of

from gradcache_clip import ClipLoss
from gradcache_clip.cache import ByLength
from gradcache_clip.cache.batch_tree import tensors_in
from gradcache_clip.distributed import LocalStrategy
from gradcache_clip.train.config import TrainConfig
from gradcache_clip.train.config_errors import ConfigError
from gradcache_clip.train.config_file import load_config
from gradcache_clip.train.step import make_backward

ROWS = 12


class TwoTowers(nn.Module):
    """Counts passes and the widest text of each."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(6, 8), nn.Embedding(50, 8)
        self.passes, self.widths = 0, []

    def forward(self, tower: int, inputs: Tensor | dict[str, Tensor]) -> Tensor:
        self.passes += 1
        if tower == 0:
            return self.image(inputs)
        mask = inputs["attention_mask"].unsqueeze(-1)
        self.widths.append(mask.shape[1])
        return (self.text(inputs["input_ids"]) * mask).sum(1) / mask.sum(1)


def gradients(**options: object) -> tuple[TwoTowers, list[Tensor]]:
    torch.manual_seed(0)
    model, loss = TwoTowers().double(), ClipLoss().double()
    lengths = torch.arange(ROWS) % 9 + 1
    texts = {
        "input_ids": torch.randint(50, (ROWS, 9)),
        "attention_mask": (torch.arange(9) < lengths[:, None]).long(),
    }
    images = torch.randn(ROWS, 6, dtype=torch.float64)
    order = [None, ByLength()] if options.pop("sort_by_length", False) else None
    config = TrainConfig(batch_size=ROWS, chunk_size=3, **options)
    make_backward(model, loss, config, LocalStrategy(), order)(images, texts)
    return model, [p.grad for p in (*model.parameters(), *loss.parameters())]


@pytest.mark.parametrize("options", [{"memory_budget_gib": 1.0}, {"sort_by_length": True}])
def test_options_of_the_engine_change_no_gradient(options):
    _, expected = gradients()
    _, found = gradients(**options)
    for ours, true in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, true, rtol=1e-12, atol=1e-14)


def test_a_budget_for_all_graphs_replays_nothing():
    # 4 chunks of 2 towers, twice, but for one kept graph.
    assert gradients()[0].passes == 15
    assert gradients(memory_budget_gib=1.0)[0].passes == 8


def test_sorted_captions_are_trimmed_to_the_longest_of_a_chunk():
    assert set(gradients()[0].widths) == {9}
    assert sorted(set(gradients(sort_by_length=True)[0].widths)) == [2, 3, 6, 9]


@pytest.mark.parametrize(("place", "found"), [("host", "cpu"), ("device", "meta")])
def test_a_batch_waits_where_it_is_told_to(tmp_path: Path, place: str, found: str):
    more = (f"train.batch_device={place}", "loss.positives=group")
    settings = overrides(make_data(tmp_path / "data"), tmp_path / "run", *more)
    trainer = trainer_of(None, settings, tmp_path / "run")
    inputs, loss_kwargs = trainer.inputs_of(next(iter(trainer.batches())), "meta")
    assert {tensor.device.type for tensor in tensors_in(inputs)} == {found}
    # The loss takes the features of all, which are on the device in any case.
    assert loss_kwargs["labels"].device.type == "meta"


def test_deepspeed_has_its_inputs_on_the_device():
    host, deepspeed = "train.batch_device=host", "distributed.strategy=deepspeed"
    with pytest.raises(ConfigError, match="train.batch_device: expected 'device' with distributed"):
        load_config(None, [host, deepspeed])
    assert load_config(None, [host]).train.batch_device == "host"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["exchange=broadcast"], "train.exchange: expected one of gather, ring, got"),
        (["batch_device=disk"], "train.batch_device: expected one of device, host, got"),
        (
            ["batch_device=host", "grad_cache=false"],
            "train.batch_device: expected 'device' with train.grad_cache=false, got 'host'",
        ),
        (["memory_budget_gib=-1"], "train.memory_budget_gib: expected at least 0, got -1"),
    ],
)
def test_values_that_cannot_be_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        load_config(None, [f"train.{option}" for option in options])
