"""One module for all inputs that names frozen trunks: they run once a step, and all is exact."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from conftest import WORST_ERROR
from one_shot import gradient_errors, worst
from test_cache_trunk import Counted
from test_distributed import LOCAL, WORLD, global_batch, in_two_processes
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

from gradcache_clip import ByLength, ClipLoss, FrozenTrunk, GradCache
from gradcache_clip.distributed import DDPStrategy, LocalStrategy
from gradcache_clip.train.config_model import DualConfig
from gradcache_clip.train.modalities import TEXT
from gradcache_clip.train.towers import build_towers
from gradcache_clip.verification.compare import verify

# Encoders count their calls, among which those of the check would be.
GradCache = partial(GradCache, check_rows="off")

ROWS, CHUNK, CHUNKS = 14, 4, 4
INNER = 16


class Pair(nn.Module):
    """Two towers of a trunk and a head; those in `frozen` say so, the others are trained whole."""

    def __init__(self, frozen: tuple[int, ...], dropout: float = 0.0) -> None:
        super().__init__()
        self.trunks = nn.ModuleList(
            Counted(nn.Sequential(nn.Linear(width, 10), nn.GELU())) for width in (6, 9)
        )
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Linear(10, INNER), nn.Dropout(dropout), nn.Linear(INNER, 8))
            for _ in range(2)
        )
        self._frozen = {
            tower: FrozenTrunk(self.trunks[tower].requires_grad_(False), self.heads[tower])
            for tower in frozen
        }

    def frozen_trunk(self, tower: int) -> FrozenTrunk | None:
        return self._frozen.get(tower)

    def forward(self, tower: int, inputs: Any) -> Tensor:
        if tower in self._frozen:
            return self._frozen[tower](inputs)
        return self.heads[tower](self.trunks[tower](inputs))

    def rows(self) -> list[list[int]]:
        """How many rows each call of each trunk had."""
        return [trunk.rows for trunk in self.trunks]


def batch(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(ROWS, width, dtype=dtype) for width in (6, 9)]


def with_twin(pair: Pair, dtype: torch.dtype = torch.float64) -> tuple[Pair, ClipLoss, list[Any]]:
    pair, loss = pair.to(dtype), ClipLoss().to(dtype)
    return pair, loss, copy.deepcopy([pair, loss])


def backward_of(truth: list[Any], inputs: list[Any]) -> Tensor:
    """One graph over the whole batch."""
    pair, loss = truth
    out = loss(*(pair(tower, given) for tower, given in enumerate(inputs))).loss
    out.backward()
    return out.detach()


@pytest.mark.parametrize("budget", [0.0, 2.5, 99.0])
@pytest.mark.parametrize("frozen", [(0,), (1,), (0, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_exact_and_once_a_step(dtype, frozen, budget, record_property):
    pair, loss, truth = with_twin(Pair(frozen), dtype)
    inputs = batch(dtype)
    nbytes = int(budget * CHUNK * INNER * dtype.itemsize)
    out = GradCache(pair, loss, chunk_size=CHUNK, memory_budget=nbytes)(*inputs)
    for tower in frozen:
        assert pair.rows()[tower] == [4, 4, 4, 2]
    torch.testing.assert_close(out.loss, backward_of(truth, inputs))
    name, error = worst(gradient_errors([pair, loss], truth))
    setting = f"one module, frozen {frozen}, {str(dtype)[6:]}, budget of {budget:g} chunks"
    record_property(WORST_ERROR, (setting, name, error))
    assert error < {torch.float64: 1e-10, torch.float32: 1e-5}[dtype]
    assert all(p.grad is None for tower in frozen for p in pair.trunks[tower].parameters())


def test_a_tower_that_is_not_frozen_is_replayed():
    pair, loss, _ = with_twin(Pair((0,)))
    cache = GradCache(pair, loss, chunk_size=CHUNK)
    for _ in range(2):
        cache(*batch())
    frozen, trained = pair.rows()
    assert len(frozen) == 2 * CHUNKS
    # All but the chunk whose graph is kept go through it twice.
    assert len(trained) == 2 * (2 * CHUNKS - 1)


def test_a_module_that_names_none_is_called_as_before():
    pair, loss, truth = with_twin(Pair(()))
    inputs = batch()
    GradCache(pair, loss, chunk_size=CHUNK)(*inputs)
    backward_of(truth, inputs)
    assert worst(gradient_errors([pair, loss], truth))[1] < 1e-10


def test_where_a_forward_gathers_parameters_the_module_is_called_as_a_whole():
    class Gathering(LocalStrategy):
        collective_forward = True

    pair, loss, truth = with_twin(Pair((0,)))
    inputs = batch()
    GradCache(pair, loss, chunk_size=CHUNK, strategy=Gathering())(*inputs)
    assert len(pair.rows()[0]) > CHUNKS
    backward_of(truth, inputs)
    assert worst(gradient_errors([pair, loss], truth))[1] < 1e-10


def test_draws_of_the_head_are_repeated():
    """The features of both passes are compared, and an error is raised where they differ."""
    pair, loss, truth = with_twin(Pair((1,), dropout=0.3))
    inputs = batch()
    torch.manual_seed(1)
    GradCache(pair, loss, chunk_size=CHUNK)(*inputs)
    torch.manual_seed(1)
    features = [torch.cat([truth[0](t, x) for x in inputs[t].split(CHUNK)]) for t in (0, 1)]
    truth[1](*features).loss.backward()
    assert worst(gradient_errors([pair, loss], truth))[1] < 1e-10


def test_out_of_memory_starts_the_step_again():
    pair, loss, truth = with_twin(Pair((0,)))
    inputs = batch()

    class Limited(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) > CHUNK:
                raise torch.OutOfMemoryError("injected")
            return x

    pair.heads[1].append(Limited())
    cache = GradCache(pair, loss, chunk_size=2 * CHUNK)
    with pytest.warns(UserWarning, match="out of memory in the embed with chunks of 8 rows"):
        cache(*inputs)
    assert cache.chunk_size == CHUNK
    backward_of(truth, inputs)
    assert worst(gradient_errors([pair, loss], truth))[1] < 1e-10


def test_verify_compares_the_heads_and_leaves_the_trunk_alone():
    pair, loss, _ = with_twin(Pair((0,)))
    before = copy.deepcopy(pair.state_dict())
    report = verify(GradCache(pair, loss), *batch())
    assert report.exact and report.reasons == []
    names = {row.name for row in report.rows}
    assert "heads.0.0.weight" in names and "trunks.1.inner.0.weight" in names
    assert not any(name.startswith("trunks.0") for name in names)
    assert all(torch.equal(before[name], value) for name, value in pair.state_dict().items())


def test_verify_sees_a_trunk_that_is_not_what_forward_runs():
    pair, loss, _ = with_twin(Pair((0,)))
    # Its own module names another trunk than the one that it runs.
    other = Pair((0,)).double()
    pair.frozen_trunk = lambda tower: other.frozen_trunk(tower)
    report = verify(GradCache(pair, loss), *batch())
    assert not report.exact


def test_a_trunk_that_is_trained_is_refused_before_anything_is_changed():
    pair, loss, _ = with_twin(Pair((0,)))
    pair.trunks[0].requires_grad_(True)
    with pytest.raises(ValueError, match="trunk: expected frozen parameters, got inner.0.weight"):
        GradCache(pair, loss, chunk_size=CHUNK)(*batch())
    assert all(parameter.grad is None for parameter in pair.parameters())


def dual_encoder(freeze: str, image: str = "resnet10t") -> nn.Module:
    config = DualConfig(
        image=image,
        text_kwargs={"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                     "intermediate_size": 32, "hidden_dropout_prob": 0.2},
        text_pool="mean",
        feature_dim=8,
        freeze=freeze,
    )  # fmt: skip
    sizes = {"image_size": 32, "context_length": 9, "vocab_size": 40, "pad_token_id": 0}
    return build_towers(config, **sizes).double()


def pairs() -> tuple[Tensor, dict[str, Tensor]]:
    mask = (torch.arange(9) < torch.randint(2, 10, (ROWS, 1))).long()
    ids = torch.randint(1, 40, (ROWS, 9)) * mask
    images = torch.randint(256, (ROWS, 3, 32, 32), dtype=torch.uint8)
    return images, {"input_ids": ids, "attention_mask": mask}


def test_a_frozen_image_tower_keeps_its_batch_norm():
    """In evaluation mode a row's features do not depend on its chunk, and nothing is recorded."""
    encoder, loss = dual_encoder("image"), ClipLoss().double()
    encoder.train()
    # Dropout of the text tower would need the same chunks; here the image tower is looked at.
    encoder.text_tower.eval()
    truth, before = copy.deepcopy([encoder, loss]), copy.deepcopy(encoder.image_tower.state_dict())
    inputs = pairs()
    GradCache(encoder, loss, chunk_size=CHUNK)(*inputs)
    backward_of(truth, [*inputs])
    errors = gradient_errors([encoder, loss], truth)
    shown = {name: error for name, error in errors.items() if not name.endswith("key.bias")}
    assert worst(shown)[1] < 1e-10
    after = encoder.image_tower.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(p.grad is None for p in encoder.image_tower.parameters())
    assert encoder.image_projection.weight.grad.abs().sum() > 0


def test_a_frozen_text_tower_sorted_by_length(monkeypatch):
    """Its chunks are trimmed to their longest, its dropout is off, and rows return in order."""
    encoder, loss = dual_encoder("text", "convnext_atto"), ClipLoss().double()
    encoder.train()
    assert not encoder.text_tower.training and encoder.image_tower.training
    truth, widths = copy.deepcopy([encoder, loss]), []
    forward = encoder.text_tower.forward

    def recorded(inputs: dict[str, Tensor]) -> Tensor:
        widths.append(inputs["input_ids"].shape[1])
        return forward(inputs)

    monkeypatch.setattr(encoder.text_tower, "forward", recorded)
    inputs = pairs()
    cache = GradCache(encoder, loss, chunk_size=CHUNK, sort_by_length=(None, ByLength()))
    out = cache(*inputs)
    assert len(widths) == CHUNKS and widths == sorted(widths, reverse=True)
    assert widths[-1] < widths[0]
    torch.testing.assert_close(out.loss, backward_of(truth, [*inputs]))
    assert worst(gradient_errors([encoder, loss], truth))[1] < 1e-10
    assert encoder.frozen_trunk(TEXT) is not None


def one_wrapper(rank: int) -> None:
    """A frozen trunk in either tower, behind one wrapper, for three steps."""
    for frozen in ((0,), (1,)):
        torch.manual_seed(7)
        pair, loss, truth = with_twin(Pair(frozen))
        wrapped = DDP(pair)
        cache = GradCache(wrapped, loss, chunk_size=4, strategy=DDPStrategy())
        truth[1].group = torch.distributed.new_group([rank], use_local_synchronization=True)
        for step in range(3):
            nn.ModuleList([pair, loss, *truth]).zero_grad()
            inputs = global_batch(step)
            out = cache(*(x[rank * LOCAL : (rank + 1) * LOCAL] for x in inputs))
            assert len(pair.rows()[frozen[0]]) == 3 * (step + 1), pair.rows()
            torch.testing.assert_close(out.loss, backward_of(truth, [*inputs]), rtol=1e-12, atol=0)
            name, error = worst(gradient_errors([pair, loss], truth))
            assert error < 1e-10, (frozen, step, name, error)
    assert torch.distributed.get_world_size() == WORLD


@pytest.mark.distributed
def test_two_processes():
    in_two_processes(one_wrapper)
