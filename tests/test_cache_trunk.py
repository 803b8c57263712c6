"""A frozen trunk runs once a step, and the head's gradients are those of the one-shot step."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from conftest import WORST_ERROR
from one_shot import gradient_errors, one_shot, twins, worst
from test_distributed import LOCAL, WORLD, in_two_processes, tower
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

from gradcache_clip import ByLength, ClipLoss, FrozenTrunk, GradCache
from gradcache_clip.distributed import DDPStrategy

# Encoders count their calls, among which those of the check would be.
GradCache = partial(GradCache, check_rows="off")

ROWS, CHUNK = 14, 4
CHUNKS = 4


class Counted(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.rows: list[int] = []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = args[0] if args else next(iter(kwargs.values()))
        self.rows.append(len(given) if isinstance(given, (Tensor, list)) else -1)
        return self.inner(*args, **kwargs)


def trunk(dropout: float = 0.0) -> Counted:
    layers = [nn.Linear(12, 10), nn.GELU(), nn.Dropout(dropout)]
    return Counted(nn.Sequential(*layers)).requires_grad_(False)


def head(dropout: float = 0.0) -> Counted:
    draws = [nn.Dropout(dropout)] if dropout else []
    return Counted(nn.Sequential(nn.Linear(10, 16), *draws, nn.Linear(16, 8)))


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(ROWS, 12, dtype=dtype), torch.randn(ROWS, 6, dtype=dtype)


@pytest.mark.parametrize("some", [0, 2.5, 99])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_the_head_is_exact_and_the_trunk_runs_once(dtype, some, record_property):
    encoder, other, loss = FrozenTrunk(trunk(), head()), nn.Linear(6, 8), ClipLoss()
    for module in (encoder, other, loss):
        module.to(dtype)
    (encoder, other, loss), truth = twins(encoder, other, loss)
    inputs = batch(dtype)
    # The inner layer's outputs; those of the trunk are in memory for the whole batch anyway.
    budget = int(some * CHUNK * 16 * dtype.itemsize)
    cache = GradCache([encoder, other], loss, chunk_size=CHUNK, memory_budget=budget)
    out = cache(*inputs)
    assert encoder.trunk.rows == [4, 4, 4, 2]
    assert len(encoder.head.rows) == 2 * CHUNKS - min(CHUNKS, int(some))
    expected = one_shot(truth[:2], truth[2], inputs)
    torch.testing.assert_close(out.loss, expected.loss.detach())
    name, error = worst(gradient_errors([encoder, other, loss], truth))
    setting = f"frozen trunk, {str(dtype)[6:]}, budget of {some} chunks"
    record_property(WORST_ERROR, (setting, name, error))
    assert error < {torch.float64: 1e-10, torch.float32: 1e-5}[dtype]
    assert all(parameter.grad is None for parameter in encoder.trunk.parameters())


def test_only_the_head_is_replayed():
    encoder = FrozenTrunk(trunk(), head())
    cache = GradCache([nn.Linear(6, 8), encoder], ClipLoss(), chunk_size=CHUNK)
    images, texts = batch()
    for _ in range(2):
        cache(texts, images)
    assert len(encoder.trunk.rows) == 2 * CHUNKS
    assert len(encoder.head.rows) == 2 * (2 * CHUNKS - 1)


def test_a_trunk_that_draws_in_train_mode_draws_once():
    """Against its own outputs; the head's draws are repeated in the replay as anywhere else."""
    encoder, other, loss = FrozenTrunk(trunk(0.5), head(0.3)), nn.Linear(6, 8), ClipLoss()
    (encoder, other, loss), truth = twins(encoder, other, loss)
    images, texts = batch()
    for budget in (None, 10**9):
        for module in (encoder, other, loss, *truth):
            module.zero_grad()
        torch.manual_seed(1)
        cache = GradCache([encoder, other], loss, chunk_size=CHUNK, memory_budget=budget)
        out = cache(images, texts)
        state = torch.get_rng_state()
        torch.manual_seed(1)
        outputs = torch.cat([truth[0].trunk(x) for x in images.split(CHUNK)])
        expected = one_shot([truth[0].head, truth[1]], truth[2], (outputs, texts), CHUNK)
        assert torch.equal(state, torch.get_rng_state())
        torch.testing.assert_close(out.loss, expected.loss.detach())
        assert worst(gradient_errors([encoder, other, loss], truth))[1] < 1e-5


class Structured(nn.Module):
    def __init__(self, kind: type) -> None:
        super().__init__()
        self.a, self.b, self.kind = nn.Linear(12, 10), nn.Linear(12, 3), kind

    def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Any]:
        return {"pooled": self.a(x) * scale, "more": self.kind((self.b(x), (x.argmax(1),)))}


class StructuredHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.table = nn.Linear(13, 8), nn.Embedding(12, 8)

    def forward(self, outputs: dict[str, Any]) -> Tensor:
        extra, (index,) = outputs["more"]
        return self.linear(torch.cat([outputs["pooled"], extra], 1)) + self.table(index)


@pytest.mark.parametrize("kind", [tuple, list])
def test_a_trunk_with_nested_inputs_and_outputs(kind):
    """A list that a trunk returns holds one tensor an element, not one row."""
    encoder = FrozenTrunk(Structured(kind).requires_grad_(False), StructuredHead())
    (encoder, other, loss), truth = twins(encoder, nn.Linear(6, 8), ClipLoss())
    images, texts = batch()
    inputs = {"x": images, "scale": 2.0}, texts
    GradCache([encoder, other], loss, chunk_size=CHUNK)(*inputs)
    truth[2](truth[0](**inputs[0]), truth[1](texts)).loss.backward()
    assert worst(gradient_errors([encoder, other, loss], truth))[1] < 1e-5


def test_a_transformers_trunk():
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = BertModel(BertConfig(vocab_size=40, intermediate_size=32, **sizes)).eval()

    class Pooler(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(16, 8)

        def forward(self, output: Any) -> Tensor:
            return self.linear(output.last_hidden_state[:, 0])

    encoder = FrozenTrunk(bert.requires_grad_(False), Pooler())
    (encoder, other, loss), truth = twins(encoder, nn.Linear(6, 8), ClipLoss())
    ids = torch.randint(1, 40, (ROWS, 5))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, batch()[1]
    GradCache([encoder, other], loss, chunk_size=CHUNK)(*inputs)
    one_shot(truth[:2], truth[2], inputs)
    assert worst(gradient_errors([encoder, other, loss], truth))[1] < 1e-5


def test_sorted_rows_through_a_pooling_trunk():
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(40, 10)
            self.widths: list[int] = []

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            self.widths.append(input_ids.shape[1])
            return (self.embedding(input_ids) * attention_mask[..., None]).sum(1)

    encoder = FrozenTrunk(Mean().requires_grad_(False), head())
    (encoder, other, loss), truth = twins(encoder, nn.Linear(6, 8), ClipLoss())
    mask = (torch.arange(9) < torch.randint(1, 10, (ROWS, 1))).long()
    inputs = {"input_ids": torch.randint(1, 40, (ROWS, 9)), "attention_mask": mask}, batch()[1]
    cache = GradCache([encoder, other], loss, chunk_size=CHUNK, sort_by_length=[ByLength(), None])
    cache(*inputs)
    assert encoder.trunk.widths == sorted(encoder.trunk.widths, reverse=True)
    one_shot(truth[:2], truth[2], inputs)
    assert worst(gradient_errors([encoder, other, loss], truth))[1] < 1e-5


@pytest.mark.parametrize("fails_in", ["trunk", "head"])
def test_out_of_memory_in_either_part(fails_in):
    class Limited(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            if len(x) > 4:
                raise torch.OutOfMemoryError("injected")
            return self.inner(x)

    parts = {"trunk": trunk(0.5), "head": head(0.3)}
    encoder, other, loss = FrozenTrunk(**parts), nn.Linear(6, 8), ClipLoss()
    (encoder, other, loss), (true_encoder, true_other, true_loss) = twins(encoder, other, loss)
    setattr(encoder, fails_in, Limited(getattr(encoder, fails_in)))
    inputs = batch()
    torch.manual_seed(2)
    cache = GradCache([encoder, other], loss, chunk_size=8)
    with pytest.warns(UserWarning, match="out of memory in the embed with chunks of 8 rows"):
        cache(*inputs)
    assert cache.chunk_size == 4
    torch.manual_seed(2)
    GradCache([true_encoder, true_other], true_loss, chunk_size=4)(*inputs)
    setattr(encoder, fails_in, getattr(encoder, fails_in).inner)
    ours, truth = [encoder, other, loss], [true_encoder, true_other, true_loss]
    assert worst(gradient_errors(ours, truth))[1] < 1e-6


def test_called_by_itself_it_is_its_two_parts():
    encoder = FrozenTrunk(trunk(), head())
    images, _ = batch()
    expected = encoder.head.inner(encoder.trunk.inner(images))
    features = encoder(images)
    assert torch.equal(features, expected)
    features.sum().backward()
    assert encoder.head.inner[0].weight.grad is not None


def test_a_trunk_that_is_trained_is_refused_before_anything_is_changed():
    encoder, other = FrozenTrunk(trunk().requires_grad_(True), head()), nn.Linear(6, 8)
    cache = GradCache([encoder, other], ClipLoss())
    message = r"trunk: expected frozen parameters, got inner.0.weight and 1 more.*requires_grad_\("
    with pytest.raises(ValueError, match=message):
        cache(*batch())
    assert all(p.grad is None for p in [*encoder.parameters(), *other.parameters()])


class Returns(nn.Module):
    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, x: Tensor) -> Any:
        return self.output(x)


@pytest.mark.parametrize(
    "output",
    [
        lambda x: x.mean(),
        lambda x: x[1:],
        lambda x: x if len(x) == 4 else x[:, 1:],
        lambda x: (x, None),
        lambda x: (x, "name"),
        lambda x: None,
        lambda x: (),
    ],
    ids=["scalar", "rows missing", "another shape", "None", "text", "nothing", "empty"],
)
def test_trunk_outputs_that_are_no_rows(output):
    encoder = FrozenTrunk(Returns(output), Returns(lambda x: x[0] if isinstance(x, tuple) else x))
    encoder.head.weight = nn.Parameter(torch.ones(()))
    cache = GradCache([nn.Linear(6, 8), encoder], ClipLoss(), chunk_size=CHUNK)
    images, texts = batch()
    with pytest.raises((TypeError, ValueError), match=r"encoder 1 \(FrozenTrunk\): expected trunk"):
        cache(texts, images)


def test_a_frozen_head_as_well():
    encoder = FrozenTrunk(trunk(), head().requires_grad_(False))
    (encoder, other, loss), truth = twins(encoder, nn.Linear(6, 8), ClipLoss())
    inputs = batch()
    GradCache([encoder, other], loss, chunk_size=CHUNK)(*inputs)
    assert len(encoder.trunk.rows) == len(encoder.head.rows) == CHUNKS
    one_shot(truth[:2], truth[2], inputs)
    assert worst(gradient_errors([encoder, other, loss], truth))[1] < 1e-5


def test_batch_norm_in_the_trunk_records_each_chunk_once():
    norm = nn.BatchNorm1d(10)
    inner = nn.Sequential(nn.Linear(12, 10), norm).requires_grad_(False)
    encoder = FrozenTrunk(Counted(inner), head())
    with pytest.warns(UserWarning, match=r"batch norm in train mode.*trunk.inner.1"):
        GradCache([encoder, nn.Linear(6, 8)], ClipLoss(), chunk_size=CHUNK)(*batch())
    assert norm.num_batches_tracked == CHUNKS


def test_under_autocast():
    (encoder, other, loss), truth = twins(FrozenTrunk(trunk(), head()), nn.Linear(6, 8), ClipLoss())
    inputs = batch()
    with torch.autocast("cpu", torch.bfloat16):
        GradCache([encoder, other], loss, chunk_size=ROWS)(*inputs)
        expected = truth[2](*(m(x) for m, x in zip(truth[:2], inputs, strict=True))).loss
    expected.backward()
    assert worst(gradient_errors([encoder, other, loss], truth))[1] < 1e-6


def two_parts(rank: int) -> None:
    """A head in DDP behind a trunk that runs once on every rank."""
    torch.manual_seed(7)
    frozen = Counted(nn.Linear(6, 9)).requires_grad_(False).double()
    encoder = FrozenTrunk(frozen, tower(9).double())
    text, loss = tower(5).double(), ClipLoss().double()
    (encoder, text, loss), truth = twins(encoder, text, loss)
    wrapped = [DDP(encoder), DDP(text)]
    cache = GradCache(wrapped, loss, chunk_size=3, strategy=DDPStrategy(), memory_budget=1000)
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(WORLD * LOCAL, w, generator=generator).double() for w in (6, 5)]
    cache(*(x[rank * LOCAL : (rank + 1) * LOCAL] for x in inputs))
    assert encoder.trunk.rows == [3, 3, 3, 1], encoder.trunk.rows
    truth[2].group = torch.distributed.new_group([rank], use_local_synchronization=True)
    one_shot(truth[:2], truth[2], inputs)
    name, error = worst(gradient_errors([encoder, text, loss], truth))
    assert error < 1e-10, (name, error)


@pytest.mark.distributed
def test_two_processes():
    in_two_processes(two_parts)
