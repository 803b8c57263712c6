"""`cached_step` inside a LightningModule beside the same module with one graph."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from one_shot import gradient_errors, worst
from strategy_processes import result_of, run_cases
from tiny_run import make_data
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

from gradcache_clip import ClipLoss, GradCache
from gradcache_clip.distributed import strategy_all_reduce
from gradcache_clip.integrations.lightning import cached_step

BATCH, STEPS = 12, 3


# Lightning 2.6 flattens its loaders with a class that torch 2.13 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")


class Pairs(LightningModule):
    """Two towers; `cached` says whether the batch goes through them in chunks."""

    def __init__(self, *, cached: bool = True, dropout: float = 0.0, chunk_size: int = 5) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.image, self.text = tower(6, dropout), tower(9, dropout)
        self.loss, self.cached = ClipLoss(), cached
        self.cache = GradCache((self.image, self.text), self.loss, chunk_size=chunk_size)
        self.gradients: dict[str, Tensor] = {}
        self.precisions: set[torch.dtype] = set()

    def output(self, batch: list[Tensor]) -> Any:
        if self.cached:
            return cached_step(self, self.cache, *batch)
        return self.loss(self.image(batch[0]), self.text(batch[1]))

    def training_step(self, batch, _):
        out = self.output(batch)
        self.log_dict({"loss": out.loss, "accuracy": out.accuracy})
        return out.loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]

    def on_before_optimizer_step(self, optimizer):
        for name, parameter in self.named_parameters():
            self.gradients.setdefault(name, parameter.grad.clone())


class Validated(Pairs):
    """Apart, for Lightning warns of a `validation_step` in a fit without its data."""

    def validation_step(self, batch, _):
        self.log("val_loss", self.output(batch).loss)


def tower(width: int, dropout: float) -> nn.Sequential:
    layers = [nn.Linear(width, 16), nn.LayerNorm(16), nn.GELU(), nn.Dropout(dropout)]
    return nn.Sequential(*layers, nn.Linear(16, 8))


def pairs(count: int = BATCH * STEPS) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    images, texts = (torch.randn(count, width, generator=generator) for width in (6, 9))
    return list(zip(images, texts, strict=True))


def loader(count: int = BATCH * STEPS, batch: int = BATCH, dtype=torch.float32) -> DataLoader:
    data = [tuple(part.to(dtype) for part in pair) for pair in pairs(count)]
    return DataLoader(data, batch_size=batch)


def fit(module: Pairs, folder: Path, data: DataLoader, path: str | None = None, **more: Any):
    settings = {"max_steps": STEPS, "accelerator": "cpu", "logger": False, "devices": 1}
    settings |= {"enable_checkpointing": False, "enable_progress_bar": False}
    settings |= {"enable_model_summary": False, "default_root_dir": folder, **more}
    trainer = Trainer(**settings)
    trainer.fit(module, data, ckpt_path=path)
    return trainer


def assert_same_weights(ours: nn.Module, theirs: nn.Module, atol: float = 1e-6) -> None:
    start = Pairs().state_dict()
    for name, expected in theirs.state_dict().items():
        got = ours.state_dict()[name]
        torch.testing.assert_close(got, expected, rtol=0, atol=atol, msg=name)
        assert not torch.equal(got, start[name].to(got)), f"{name} was not trained"


@pytest.mark.parametrize(
    "more",
    [{}, {"accumulate_grad_batches": 2}, {"gradient_clip_val": 1e-3}, {"precision": "64-true"}],
    ids=["plain", "accumulated", "clipped", "fp64"],
)
def test_steps_equal_those_of_one_graph(more, tmp_path: Path):
    count = BATCH * STEPS * more.get("accumulate_grad_batches", 1)
    ours, theirs = Pairs(), Pairs(cached=False)
    trained = fit(ours, tmp_path, loader(count), **more)
    expected = fit(theirs, tmp_path, loader(count), **more)
    assert trained.global_step == STEPS
    assert_same_weights(ours, theirs)
    for name in ("loss", "accuracy"):
        assert trained.callback_metrics[name] == pytest.approx(expected.callback_metrics[name])


def test_every_gradient_equals_that_of_one_graph(tmp_path: Path):
    ours, truth = Pairs().double(), Pairs(cached=False).double()
    fit(ours, tmp_path, loader(dtype=torch.float64), max_steps=1)
    truth.output(next(iter(loader(dtype=torch.float64)))).loss.backward()
    assert set(ours.gradients) == {name for name, _ in truth.named_parameters()}
    for name, parameter in ours.named_parameters():
        parameter.grad = ours.gradients[name]
    assert worst(gradient_errors([ours], [truth]))[1] < 1e-10


def test_dropout_draws_what_one_graph_over_the_chunks_draws(tmp_path: Path):
    ours, theirs = Pairs(dropout=0.5), Pairs(dropout=0.5, cached=False)
    theirs.output = functools.partial(_in_chunks, theirs)
    for module in (ours, theirs):
        torch.manual_seed(8)
        fit(module, tmp_path, loader())
    assert_same_weights(ours, theirs)


def _in_chunks(module: Pairs, batch: list[Tensor]) -> Any:
    pairs = ((module.image, batch[0]), (module.text, batch[1]))
    return module.loss(*(torch.cat([f(rows) for rows in x.split(5)]) for f, x in pairs))


def test_bf16_replays_in_bf16(tmp_path: Path):
    """As near to fp32 as one graph under the same precision."""
    truth, ours, theirs = Pairs(cached=False), Pairs(), Pairs(cached=False)
    ours.text.register_forward_hook(lambda *given: ours.precisions.add(given[-1].dtype))
    for module, precision in ((truth, "32-true"), (ours, "bf16-mixed"), (theirs, "bf16-mixed")):
        fit(module, tmp_path, loader(), max_steps=1, precision=precision)
    assert ours.precisions == {torch.bfloat16}
    error, allowed = _distance(ours, truth), _distance(theirs, truth)
    assert 1e-4 < error < 1.5 * allowed


def _distance(module: Pairs, truth: Pairs) -> float:
    ours, theirs = (torch.cat([g.flatten() for g in m.gradients.values()]) for m in (module, truth))
    return float((ours - theirs).norm() / theirs.norm())


def test_a_gradient_scaler_scales_the_replay(tmp_path: Path):
    """Under fp16 a gradient of 1e-8 would be zero, were it not multiplied before the replay."""
    truth, ours = Pairs(cached=False), Pairs()
    fit(truth, tmp_path, loader(), max_steps=1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scale, seen = scaler.scale, []
    scaler.scale = lambda loss: seen.append(loss) or scale(loss)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    fit(ours, tmp_path, loader(), max_steps=1, plugins=[plugin])
    assert len(seen) == 1
    assert _distance(ours, truth) < 5e-3


# The folder of checkpoints is the one that it resumes from.
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* is not empty")
def test_resumes_as_if_it_had_not_stopped(tmp_path: Path):
    """From the end of the first of two epochs; Lightning itself does not skip batches."""
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    more = {"max_steps": -1, "max_epochs": 2, "enable_checkpointing": True, "callbacks": [saving]}
    whole, resumed = Pairs(), Pairs()
    fit(whole, tmp_path, loader(), **more)
    again = fit(resumed, tmp_path, loader(), path=str(tmp_path / "epoch=0.ckpt"), **more)
    assert again.global_step == 2 * STEPS
    for name, expected in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], expected), name


def test_validation_evaluates_the_batch_without_a_graph(tmp_path: Path):
    module, truth = Validated(), Pairs(cached=False)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    (found,) = trainer.validate(module, loader(BATCH), verbose=False)
    (batch,) = loader(BATCH)
    assert found["val_loss"] == pytest.approx(truth.output(batch).loss.item(), rel=1e-5)
    assert all(parameter.grad is None for parameter in module.parameters())


def test_a_bare_tensor_and_arguments_of_the_loss(tmp_path: Path):
    """Pairs of an equal label are positives of each other."""
    labels = torch.arange(BATCH) // 2

    class Labelled(Pairs):
        def training_step(self, batch, _):
            return cached_step(self, self.cache, *batch, labels=labels).loss

    ours, theirs = Labelled(), Pairs(cached=False)
    theirs.output = lambda batch: theirs.loss(
        theirs.image(batch[0]), theirs.text(batch[1]), labels=labels
    )
    for module in (ours, theirs):
        fit(module, tmp_path, loader())
    assert_same_weights(ours, theirs)


def test_refuses_parts_outside_of_the_module(tmp_path: Path):
    module = Pairs()
    module.cache = GradCache((module.image, module.text), ClipLoss())
    message = "cache: expected encoders and a loss that are submodules of Pairs, got ClipLoss"
    with pytest.raises(ValueError, match=message):
        fit(module, tmp_path, loader())


def test_refuses_strategies_that_shard(tmp_path: Path):
    module = Pairs()
    strategy = SimpleNamespace(model=nn.Sequential(module))
    module._trainer = SimpleNamespace(strategy=strategy)
    with pytest.raises(ValueError, match='strategy: expected one device or "ddp", got SimpleName'):
        cached_step(module, module.cache, *next(iter(loader())))


def on_each_rank(folder: Path, more: dict[str, Any]) -> dict[str, Any]:
    """Every other pair of a batch; the weights of rank 1 start out wrong."""
    module, counted = Pairs(), []
    average = strategy_all_reduce._average
    strategy_all_reduce._average = lambda bucket: counted.append(bucket) or average(bucket)
    if dist.get_rank() == 1:
        for parameter in module.parameters():
            parameter.data.add_(0.5)
    strategy = DDPStrategy(process_group_backend="gloo")
    count = BATCH * STEPS * more.get("accumulate_grad_batches", 1)
    reduced: list[Any] = []
    module.on_train_start = lambda: module.trainer.strategy.model.register_comm_hook(reduced, note)
    # Lightning's own sampler would shuffle.
    sampler = DistributedSampler(pairs(count), shuffle=False)
    data, more = DataLoader(pairs(count), BATCH // 2, sampler=sampler), {**more, "devices": 2}
    trainer = fit(module, folder, data, strategy=strategy, use_distributed_sampler=False, **more)
    strategy_all_reduce._average = average
    return {
        "world": trainer.world_size,
        "reductions": len(counted),
        "by_ddp": len(reduced),
        "weights": {name: value.tolist() for name, value in module.state_dict().items()},
        "loss": trainer.callback_metrics["loss"].item(),
    }


def note(reduced, bucket):
    """Called for every bucket that DDP itself would reduce; DDP takes no annotation as text."""
    reduced.append(bucket)
    future: torch.futures.Future = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


def refused_on_each_rank(folder: Path) -> dict[str, Any]:
    strategy = DDPStrategy(process_group_backend="gloo", static_graph=True)
    with pytest.raises(ValueError, match="strategy: expected DDP without static_graph"):
        fit(Pairs(), folder, loader(), strategy=strategy, devices=2)
    return {}


def validated_on_each_rank(folder: Path) -> dict[str, Any]:
    """Lightning wraps nothing for this, and nothing needs to be reduced."""
    sampler = DistributedSampler(pairs(BATCH), shuffle=False)
    settings = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "devices": 2}
    strategy = DDPStrategy(process_group_backend="gloo")
    trainer = Trainer(strategy=strategy, use_distributed_sampler=False, **settings)
    data = DataLoader(pairs(BATCH), BATCH // 2, sampler=sampler)
    (found,) = trainer.validate(Validated(), data, verbose=False)
    return {"val_loss": found["val_loss"]}


RUNS = {
    "plain": {},
    "accumulated": {"accumulate_grad_batches": 2},
    "clipped": {"gradient_clip_val": 1e-3},
}


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_equal_one(tmp_path: Path):
    """The reduction is that of the cache, once for each batch; DDP has none of its own."""
    cases = {name: functools.partial(on_each_rank, tmp_path, more) for name, more in RUNS.items()}
    cases["refused"] = functools.partial(refused_on_each_rank, tmp_path)
    cases["validated"] = functools.partial(validated_on_each_rank, tmp_path)
    results = run_cases(cases, 2, tmp_path)
    result_of(results, "refused")
    (batch,) = loader(BATCH)
    whole = Pairs(cached=False).output(batch).loss.item()
    assert result_of(results, "validated")["val_loss"] == pytest.approx(whole, rel=1e-5)
    for name, more in RUNS.items():
        found, batches = result_of(results, name), more.get("accumulate_grad_batches", 1)
        assert (found["world"], found["by_ddp"]) == (2, 0)
        assert found["reductions"] == STEPS * batches
        alone = Pairs(cached=False)
        trainer = fit(alone, tmp_path, loader(BATCH * STEPS * batches), **more)
        assert found["loss"] == pytest.approx(trainer.callback_metrics["loss"].item(), rel=1e-5)
        for key, expected in alone.state_dict().items():
            got = torch.tensor(found["weights"][key])
            torch.testing.assert_close(got, expected, rtol=0, atol=2e-6, msg=key)


EXAMPLE = Path(__file__).parent.parent / "examples" / "lightning_training.py"


@pytest.mark.slow
def test_the_example_runs(tmp_path: Path):
    make_data(tmp_path, characters=220)
    command = [sys.executable, str(EXAMPLE), str(tmp_path), "2"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "max_steps=2` reached" in result.stderr
    assert "val_loss:" in result.stdout
