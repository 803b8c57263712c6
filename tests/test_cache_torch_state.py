"""Gradients equal the one-shot step in every setting, whatever graphs are retained."""

from __future__ import annotations

import contextlib
import copy
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import WORST_ERROR
from one_shot import gradient_errors, twins, worst
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from gradcache_clip import ClipLoss, GradCache, InfoNCELoss
from gradcache_clip.cache.batch_tree import count_rows, take_rows
from gradcache_clip.cache.graph_budget import SavedBytes
from gradcache_clip.cache.trunk import call_encoder
from gradcache_clip.distributed import LocalStrategy

LIMIT = {torch.float64: 1e-10, torch.float32: 1e-5}
ROWS, CHUNK = 11, 3
BUDGETS = ("none", "some", "whole")


def mlp(width: int, *, dropout: float = 0.0, norm: nn.Module | None = None) -> nn.Sequential:
    # Batch norm takes out a bias before it, whose gradient would be rounding alone.
    first = nn.Linear(width, 24, bias=not isinstance(norm, nn.BatchNorm1d))
    layers = [first, norm or nn.LayerNorm(24), nn.GELU(), nn.Dropout(dropout)]
    return nn.Sequential(*layers, nn.Linear(24, 8))


def images(rows: int = ROWS) -> Tensor:
    return torch.randn(rows, 12)


def texts(rows: int = ROWS) -> Tensor:
    return torch.randn(rows, 10)


@dataclass
class Case:
    """Encoders, inputs and loss of a step, and how a person would set it up."""

    encoders: Sequence[nn.Module]
    inputs: Sequence[Any]
    loss: nn.Module = field(default_factory=ClipLoss)
    loss_kwargs: Mapping[str, Any] = field(default_factory=dict)
    same_chunks: bool = False
    """Features depend on the chunk (random draws, batch norm): one graph over the same chunks."""
    prepare: Callable[[nn.Module], nn.Module] = lambda module: module
    steps: int = 1
    warns: str = ""


CASES: dict[str, Callable[[], Case]] = {}


def case(name: str) -> Callable[[Callable[[], Case]], Callable[[], Case]]:
    return lambda build: CASES.setdefault(name, build)


@case("dropout")
def dropout() -> Case:
    encoders = [mlp(12, dropout=0.3), mlp(10, dropout=0.1)]
    return Case(encoders, [images(), texts()], same_chunks=True)


class Residual(nn.Module):
    def __init__(self, inner: nn.Module, after: nn.Module) -> None:
        super().__init__()
        self.inner, self.after = inner, after

    def forward(self, x: Tensor) -> Tensor:
        return x + self.after(self.inner(x))


@case("drop-path")
def drop_path() -> Case:
    from timm.layers import DropPath

    blocks = [Residual(nn.Linear(12, 12), DropPath(0.4)) for _ in range(3)]
    encoder = nn.Sequential(*blocks, nn.Linear(12, 8))
    return Case([encoder, mlp(10)], [images(), texts()], same_chunks=True)


class Augmented(nn.Module):
    """Flips, shifts, erases and disturbs each picture before it is encoded."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        flipped = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(-1), x)
        shifted = flipped.roll(int(torch.randint(4, ())), -1)
        erased = shifted * torch.bernoulli(torch.full((len(x), 1, 4, 4), 0.8)).to(x)
        return self.inner(erased + 0.1 * torch.randn_like(x))


@case("augmentation inside the encoder")
def augmentation() -> Case:
    encoders = [Augmented(), mlp(10)]
    return Case(encoders, [torch.randn(ROWS, 1, 4, 4), texts()], same_chunks=True)


@case("batch norm, eval")
def batch_norm_eval() -> Case:
    norm = nn.BatchNorm1d(24)
    nn.init.normal_(norm.running_mean)
    return Case([mlp(12, norm=norm).eval(), mlp(10)], [images(), texts()])


@case("batch norm, train")
def batch_norm_train() -> Case:
    encoders = [mlp(12, norm=nn.BatchNorm1d(24)), mlp(10, norm=nn.BatchNorm1d(24, momentum=None))]
    warns = "batch norm in train mode"
    return Case(encoders, [images(), texts()], same_chunks=True, warns=warns)


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module, *, reentrant: bool) -> None:
        super().__init__()
        self.first, self.inner, self.reentrant = nn.Linear(12, 12), inner, reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, self.first(x), use_reentrant=self.reentrant)


@case("checkpoint, not reentrant, dropout")
def checkpoint_not_reentrant() -> Case:
    encoder = Checkpointed(mlp(12, dropout=0.3), reentrant=False)
    return Case([encoder, mlp(10)], [images(), texts()], same_chunks=True)


@case("checkpoint, reentrant, dropout")
def checkpoint_reentrant() -> Case:
    encoder = Checkpointed(mlp(12, dropout=0.3), reentrant=True)
    # Said of every pass without gradients, such as the embed.
    warns = "None of the inputs have requires_grad=True"
    return Case([mlp(10), encoder], [texts(), images()], same_chunks=True, warns=warns)


class Text(nn.Module):
    def __init__(self) -> None:
        from transformers import BertConfig, BertModel

        super().__init__()
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = BertConfig(vocab_size=40, intermediate_size=32, **sizes)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.projection = nn.Linear(16, 8)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        output = self.bert(input_ids=input_ids, attention_mask=attention_mask)
        return self.projection(output.last_hidden_state[:, 0])


@case("transformers, gradient_checkpointing_enable, dropout")
def transformers_checkpointing() -> Case:
    encoder = Text().train()
    enable = getattr(encoder.bert, "activation_checkpointing_enable", None)
    (enable or encoder.bert.gradient_checkpointing_enable)()
    assert any(getattr(module, "gradient_checkpointing", False) for module in encoder.modules())
    ids = torch.randint(1, 40, (ROWS, 6))
    tokens = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return Case([mlp(12), encoder], [images(), tokens], same_chunks=True)


@case("torch.compile, eager")
def compiled() -> Case:
    def prepare(module: nn.Module) -> nn.Module:
        return torch.compile(module, backend="eager")

    return Case([mlp(12), mlp(10)], [images(), texts()], prepare=prepare)


@case("torch.compile, aot_eager")
def compiled_ahead() -> Case:
    def prepare(module: nn.Module) -> nn.Module:
        return torch.compile(module, backend="aot_eager")

    return Case([mlp(12), mlp(10)], [images(), texts()], prepare=prepare)


class LowRank(nn.Module):
    """A frozen layer and a trained product of two thin matrices beside it (LoRA)."""

    def __init__(self, layer: nn.Linear, rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.dropout = nn.Dropout(dropout)
        self.a = nn.Parameter(torch.randn(rank, layer.in_features) / rank)
        self.b = nn.Parameter(0.1 * torch.randn(layer.out_features, rank))
        self.factor = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        thin = F.linear(self.dropout(x), self.a)
        return self.layer(x) + self.factor * F.linear(thin, self.b)


@case("low-rank adapters, dropout")
def adapters() -> Case:
    encoder = mlp(12).requires_grad_(False)
    for index in (0, 4):
        encoder[index] = LowRank(encoder[index], rank=2, alpha=4.0, dropout=0.2)
    return Case([encoder, mlp(10)], [images(), texts()], same_chunks=True)


@case("a frozen tower")
def frozen() -> Case:
    return Case([mlp(12), mlp(10).requires_grad_(False)], [images(), texts()])


@case("a partly frozen tower")
def partly_frozen() -> Case:
    encoder = mlp(12)
    encoder[:3].requires_grad_(False)
    return Case([encoder, mlp(10)], [images(), texts()])


@case("tied towers, dropout")
def tied() -> Case:
    encoder = mlp(12, dropout=0.2)
    return Case([encoder, encoder], [images(), images()], same_chunks=True)


class ThreeWay(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pair = ClipLoss()

    def forward(self, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return self.pair(a, b).loss + 0.5 * self.pair(b, c).loss


@case("three towers")
def three_towers() -> Case:
    return Case([mlp(12), mlp(10), mlp(12)], [images(), texts(), images()], ThreeWay())


@case("a submodule in two towers")
def shared_submodule() -> Case:
    shared = nn.Sequential(nn.Linear(24, 24), nn.GELU(), nn.Linear(24, 8))
    encoders = [nn.Sequential(nn.Linear(width, 24), shared) for width in (12, 10)]
    return Case(encoders, [images(), texts()])


class TwoOutputs(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body, self.a, self.b = mlp(width), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        body = self.body(x)
        return self.a(body), {"logits": self.b(body), "index": body.argmax(1)}


class UsesOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pair = ClipLoss()

    def forward(self, a: tuple[Tensor, dict[str, Tensor]], b: Tensor) -> Tensor:
        pooled, rest = a
        return self.pair(pooled, b).loss + F.cross_entropy(rest["logits"], rest["index"] % 3)


@case("several outputs, one of integers")
def several_outputs() -> Case:
    return Case([TwoOutputs(12), mlp(10)], [images(), texts()], UsesOutputs())


class Routed(nn.Module):
    """Two experts; the cost of each row's routing comes back as a second feature."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(12, 2), nn.ModuleList([mlp(12), mlp(12)])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        share = self.gate(x).softmax(-1)
        features = sum(share[:, i : i + 1] * expert(x) for i, expert in enumerate(self.experts))
        return features, (share * share.log()).sum(-1)


class WithAuxiliary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pair = ClipLoss()

    def forward(self, routed: tuple[Tensor, Tensor], other: Tensor) -> Tensor:
        features, cost = routed
        return self.pair(features, other).loss + 0.01 * cost.mean()


@case("an auxiliary loss of the encoder")
def auxiliary() -> Case:
    return Case([Routed(), mlp(10)], [images(), texts()], WithAuxiliary())


@case("hard negatives of their own number")
def hard_negatives() -> Case:
    documents = mlp(10)
    inputs = [images(), texts(), texts(2 * ROWS + 1)]
    return Case([mlp(12), documents, documents], inputs, InfoNCELoss())


@case("labels through loss_kwargs")
def labels() -> Case:
    kwargs = {"labels": torch.arange(ROWS) // 2, "ids": torch.arange(ROWS) // 3}
    return Case([mlp(12), mlp(10)], [images(), texts()], loss_kwargs=kwargs)


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pair = ClipLoss()

    def forward(self, a: Tensor, b: Tensor, factor: float) -> Tensor:
        return factor * self.pair(a, b).loss


@case("an outer scale")
def outer_scale() -> Case:
    return Case([mlp(12), mlp(10)], [images(), texts()], Outer(), {"factor": 1024.0})


@case("three accumulated steps, dropout")
def accumulated() -> Case:
    encoders = [mlp(12, dropout=0.2), mlp(10, dropout=0.2)]
    return Case(encoders, [images(), texts()], same_chunks=True, steps=3)


def to_dtype(nested: Any, dtype: torch.dtype) -> Any:
    def cast(x: Any) -> Any:
        return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

    return pytree.tree_map(cast, nested)


def one_graph(encoders, loss, inputs, loss_kwargs, chunk_size: int | None) -> Tensor:
    """The loss in one graph, over the whole batch or chunk by chunk; outputs may be nested."""

    def embed(encoder: nn.Module, given: Any) -> Any:
        rows = count_rows(given, "inputs")
        size = chunk_size or rows
        parts = [
            call_encoder(encoder, take_rows(given, start, start + size))
            for start in range(0, rows, size)
        ]
        return pytree.tree_map(lambda *leaves: torch.cat(leaves), *parts)

    pairs = zip(encoders, inputs, strict=True)
    output = loss(*(embed(encoder, given) for encoder, given in pairs), **loss_kwargs)
    return output if isinstance(output, Tensor) else output.loss


def chunk_bytes(encoder: nn.Module, inputs: Any) -> int:
    """What the graph of one chunk keeps, measured on a copy."""
    copied = copy.deepcopy(encoder)
    chunk = take_rows(inputs, 0, CHUNK)
    tensors = [*copied.parameters(), *copied.buffers(), *pytree.tree_leaves(chunk)]
    saved = SavedBytes(tensor for tensor in tensors if isinstance(tensor, Tensor))
    with saved.counting(True), torch.random.fork_rng(devices=[]):
        call_encoder(copied, chunk)
    return saved.total


def memory_budget(budget: str, given: Case) -> int | None:
    some = int(2.5 * chunk_bytes(given.encoders[0], given.inputs[0]))
    return {"none": None, "some": some, "whole": 10**9}[budget]


@contextlib.contextmanager
def ignoring(message: str) -> Iterator[None]:
    with warnings.catch_warnings():
        if message:
            warnings.filterwarnings("ignore", message=message)
        yield


def step_errors(given: Case, budget: int | None) -> dict[str, float]:
    (*ours, loss), (*truth, true_loss) = twins(*given.encoders, given.loss)
    prepared = {id(module): given.prepare(module) for module in ours}
    cache = GradCache(
        [prepared[id(module)] for module in ours], loss, chunk_size=CHUNK, memory_budget=budget
    )
    torch.manual_seed(1)
    for _ in range(given.steps):
        out = cache(*given.inputs, loss_kwargs=given.loss_kwargs)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    for _ in range(given.steps):
        chunk_size = CHUNK if given.same_chunks else None
        expected = one_graph(truth, true_loss, given.inputs, given.loss_kwargs, chunk_size)
        expected.backward()
    assert torch.equal(state, torch.get_rng_state()), "the generators went another way"
    torch.testing.assert_close(out.loss, expected.detach())
    for buffer, true_buffer in zip(
        nn.ModuleList(ours).buffers(), nn.ModuleList(truth).buffers(), strict=True
    ):
        torch.testing.assert_close(buffer, true_buffer)
    return gradient_errors([*ours, loss], [*truth, true_loss])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_one_graph(name, dtype, record_property):
    given = CASES[name]()
    given.inputs = to_dtype(given.inputs, dtype)
    nn.ModuleList([*given.encoders, given.loss]).to(dtype)
    errors = {}
    for budget in BUDGETS:
        with ignoring(given.warns):
            found = step_errors(given, memory_budget(budget, given))
        errors |= {f"{parameter}, {budget}": error for parameter, error in found.items()}
    parameter, error = worst(errors)
    dtype_name = str(dtype).removeprefix("torch.")
    record_property(WORST_ERROR, (f"{name}, {dtype_name}, each budget", parameter, error))
    assert error < LIMIT[dtype], errors


def flat_gradient(modules: Sequence[nn.Module]) -> Tensor:
    parameters = nn.ModuleList(modules).parameters()
    return torch.cat([parameter.grad.double().flatten() for parameter in parameters])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast_is_within_the_spread_of_the_one_shot_step(dtype, record_property):
    """One graph in one piece and one graph chunk by chunk round differently; so may the cache."""
    rows, chunk_size = 40, 8
    modules, inputs = [mlp(12), mlp(10), ClipLoss()], [images(rows), texts(rows)]
    *encoders, loss = modules

    def gradient(chunk_size: int | None, *, autocast: bool = True) -> Tensor:
        nn.ModuleList(modules).zero_grad()
        with torch.autocast("cpu", dtype, enabled=autocast):
            value = one_graph(encoders, loss, inputs, {}, chunk_size)
        value.backward()
        return flat_gradient(modules)

    truth, whole, chunked = gradient(None, autocast=False), gradient(None), gradient(chunk_size)
    spread = (chunked - whole).norm()
    for budget in BUDGETS:
        nn.ModuleList(modules).zero_grad()
        retained = {"none": None, "some": 20_000, "whole": 10**9}[budget]
        with torch.autocast("cpu", dtype):
            GradCache(encoders, loss, chunk_size=chunk_size, memory_budget=retained)(*inputs)
        cached = flat_gradient(modules)
        error = float((cached - whole).norm() / whole.norm())
        name = str(dtype).removeprefix("torch.")
        setting = f"autocast {name}, budget {budget} (spread {spread / whole.norm():.1e})"
        record_property(WORST_ERROR, (setting, "all parameters", error))
        assert (cached - whole).norm() <= spread
        furthest = max((each - truth).norm() for each in (whole, chunked))
        assert (cached - truth).norm() <= 1.02 * furthest


class Projection(nn.Module):
    """Features of a row are as small as its input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 8, bias=False)
        self.finite: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        features = self.linear(x)
        if features.requires_grad:
            features.register_hook(lambda grad: self.finite.append(bool(grad.isfinite().all())))
        return features


@pytest.mark.parametrize("budget", [None, 10**9])
def test_a_grad_scaler_grows_backs_off_and_skips_as_in_the_one_shot_step(budget):
    (*ours, loss), (*truth, true_loss) = twins(Projection(12), Projection(10), ClipLoss())
    scaler, true_scaler = (
        torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2) for _ in range(2)
    )
    optimizer = torch.optim.SGD(nn.ModuleList([*ours, loss]).parameters(), 0.1)
    true_optimizer = torch.optim.SGD(nn.ModuleList([*truth, true_loss]).parameters(), 0.1)
    cache = GradCache(
        ours, loss, chunk_size=CHUNK, strategy=LocalStrategy(scaler), memory_budget=budget
    )
    scales = []
    for step in range(6):
        batch = [images(), texts()]
        if step == 3:
            batch[0][4] *= 1e-4  # Its gradient overflows in fp16, in the second chunk alone.
        before = copy.deepcopy([*ours, loss])
        optimizer.zero_grad()
        true_optimizer.zero_grad()
        ours[0].finite.clear()
        with torch.autocast("cpu", torch.float16):
            cache(*batch)
            value = one_graph(truth, true_loss, batch, {}, None)
        true_scaler.scale(value).backward()
        assert sorted(ours[0].finite) == [False] * (step == 3) + [True] * (4 - (step == 3))
        for each, its in ((scaler, optimizer), (true_scaler, true_optimizer)):
            each.step(its)
            each.update()
        scales.append(scaler.get_scale() / 2.0**10)
        assert scaler.get_scale() == true_scaler.get_scale()
        moved = [
            not torch.equal(now, was)
            for now, was in zip(
                nn.ModuleList([*ours, loss]).parameters(),
                nn.ModuleList(before).parameters(),
                strict=True,
            )
        ]
        assert moved == [step != 3] * len(moved)
    assert scales == [1, 2, 2, 1, 1, 2]
    ours_flat, truth_flat = (
        torch.cat([p.detach().flatten() for p in nn.ModuleList(modules).parameters()])
        for modules in (ours, truth)
    )
    torch.testing.assert_close(ours_flat, truth_flat, rtol=0, atol=2e-3)


@pytest.mark.parametrize("budget", [None, 10**9])
def test_gradients_that_exist_stay_where_they_are(budget):
    (*ours, loss), (*truth, true_loss) = twins(mlp(12), mlp(10), ClipLoss())
    inputs, before = [images(), texts()], {}
    for one, other in zip(
        nn.ModuleList([*ours, loss]).parameters(),
        nn.ModuleList([*truth, true_loss]).parameters(),
        strict=True,
    ):
        one.grad = torch.randn_like(one)
        other.grad = one.grad.clone()
        before[one] = one.grad
    GradCache(ours, loss, chunk_size=CHUNK, memory_budget=budget)(*inputs)
    one_graph(truth, true_loss, inputs, {}, None).backward()
    assert worst(gradient_errors([*ours, loss], [*truth, true_loss]))[1] < 1e-5
    assert all(parameter.grad is grad for parameter, grad in before.items())


@pytest.mark.parametrize("budget", [None, 10**9])
@pytest.mark.parametrize("reentrant", [False, True])
def test_batch_norm_inside_a_checkpoint_records_each_chunk_once(reentrant, budget):
    """Its recomputation in the backward of a retained graph must save what its forward saved."""
    encoder = Checkpointed(mlp(12, norm=nn.BatchNorm1d(24)), reentrant=reentrant)
    (*ours, loss), (*truth, true_loss) = twins(mlp(10), encoder, ClipLoss())
    inputs = [texts(12), images(12)]
    with ignoring("batch norm in train mode|None of the inputs"):
        GradCache(ours, loss, chunk_size=4, memory_budget=budget)(*inputs)
    one_graph(truth, true_loss, inputs, {}, 4).backward()
    assert worst(gradient_errors([*ours, loss], [*truth, true_loss]))[1] < 1e-5
    assert ours[1].inner[1].num_batches_tracked == 3


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_batch_norm_without_running_statistics_is_named(training):
    """It normalises by the chunk in either mode."""
    norm = nn.BatchNorm1d(24, track_running_stats=False)
    encoder = mlp(12, norm=norm).train(training)
    with pytest.warns(UserWarning, match=r"batch norm.*normalises each chunk by itself.*: 1\."):
        GradCache([encoder, mlp(10)], ClipLoss(), chunk_size=4)(images(12), texts(12))


def test_a_head_with_batch_norm_in_get_features_is_treated_alike():
    head = nn.Sequential(nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8))
    (*ours, head, loss), (*truth, true_head, true_loss) = twins(mlp(12), mlp(10), head, ClipLoss())
    inputs = [images(12), texts(12)]
    cache = GradCache(ours, loss, chunk_size=4, get_features=[head, None], embed_chunk_size=12)
    with pytest.warns(UserWarning, match="batch norm in train mode"):
        cache(*inputs)
    encoders = [nn.Sequential(truth[0], true_head), truth[1]]
    one_graph(encoders, true_loss, inputs, {}, 4).backward()
    assert head[1].num_batches_tracked == 3
    errors = gradient_errors([*ours, head, loss], [*truth, true_head, true_loss])
    assert worst(errors)[1] < 1e-5


def test_warnings_point_at_the_call():
    encoder = mlp(12, norm=nn.BatchNorm1d(24))
    with pytest.warns(UserWarning, match="batch norm in train mode") as caught:
        GradCache([encoder, mlp(10)], ClipLoss(), chunk_size=4)(images(12), texts(12))
    assert caught[0].filename == __file__


@pytest.mark.parametrize("on_out_of_memory", ["halve", "raise"])
def test_a_mismatch_that_warns_points_at_the_call(on_out_of_memory):
    class Drifts(nn.Linear):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x) + self.calls

    cache = GradCache(
        [Drifts(12, 8), mlp(10)],
        ClipLoss(),
        check_replay="warn",
        on_out_of_memory=on_out_of_memory,
    )
    with pytest.warns(UserWarning, match="changed by") as caught:
        cache(images(12), texts(12))
    assert caught[0].filename == __file__


class Rows(nn.Module):
    """Notes how many rows each call has."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(len(x))
        return self.inner(x)


class DrawsForSome(nn.Module):
    """No random numbers for the rows of the first chunk."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp(12)

    def forward(self, x: Tensor) -> Tensor:
        if not x[:, 0].any():
            return self.inner(x)
        return self.inner(x * (torch.rand_like(x) < 0.7))


def normed(**options: Any) -> nn.Module:
    return mlp(12, norm=nn.BatchNorm1d(24, **options))


# The encoder, embed_chunk_size, and the rows of each call in embed and replay.
ALIKE = [3, 3, 3, 2]
EMBEDS = {
    "nothing random": (lambda: mlp(12), 6, [3, 6, 2], ALIKE),
    "all but the first": (lambda: mlp(12), 99, [3, 8], ALIKE),
    "one chunk": (lambda: mlp(12), 3, ALIKE, ALIKE),
    "dropout": (lambda: mlp(12, dropout=0.3), 6, ALIKE, ALIKE),
    "draws for some": (DrawsForSome, 6, [3, 6, 2], [3, 6, 2]),
    "batch norm, train": (normed, 6, ALIKE, ALIKE),
    "batch norm, eval": (lambda: normed().eval(), 6, [3, 6, 2], ALIKE),
    "no statistics, eval": (lambda: normed(track_running_stats=False).eval(), 6, ALIKE, ALIKE),
}


@pytest.mark.parametrize(("build", "size", "embedded", "replayed"), EMBEDS.values(), ids=EMBEDS)
def test_rows_that_are_embedded_at_once(build, size, embedded, replayed):
    """Fewer and larger passes, where a replay of other rows computes and draws the same."""
    (*ours, loss), (*truth, true_loss) = twins(Rows(build()), mlp(10), ClipLoss())
    inputs = [images(), texts()]
    inputs[0][:CHUNK, 0] = 0
    cache = GradCache(ours, loss, chunk_size=CHUNK, embed_chunk_size=size, check_rows="off")
    torch.manual_seed(1)
    with ignoring("batch norm"):
        cache(*inputs)
    assert ours[0].seen == [*embedded, *replayed]
    torch.manual_seed(1)
    # The replayed chunks are those whose draws and statistics the gradients belong to.
    features = torch.cat([truth[0](x) for x in inputs[0].split(replayed)])
    true_loss(features, truth[1](inputs[1])).loss.backward()
    assert worst(gradient_errors([*ours, loss], [*truth, true_loss]))[1] < 1e-5


def test_retained_chunks_are_embedded_alone():
    encoders = [Rows(mlp(12)), Rows(mlp(10))]
    budget = 2 * chunk_bytes(encoders[0], images())
    cache = GradCache(
        encoders,
        ClipLoss(),
        chunk_size=CHUNK,
        embed_chunk_size=6,
        memory_budget=budget,
        check_rows="off",
    )
    cache(images(), texts())
    # Two graphs fit; the other two chunks are embedded at once and replayed one by one.
    assert encoders[0].seen == [3, 3, 5, 3, 2]
    # The last chunk of the step keeps its graph.
    assert encoders[1].seen == [3, 6, 2, 3, 3, 3]


@pytest.mark.parametrize("size", [0, -1, 2.5, "auto", True, (4, 0)])
def test_embed_chunk_sizes_that_are_none(size):
    with pytest.raises(ValueError, match="embed_chunk_size: expected a positive integer"):
        GradCache([mlp(12), mlp(10)], ClipLoss(), embed_chunk_size=size)


@pytest.mark.parametrize("name", ["Auto", "max"])
def test_a_chunk_size_in_words(name):
    with pytest.raises(ValueError, match='chunk_size: expected a positive integer.*"auto"'):
        GradCache([mlp(12), mlp(10)], ClipLoss(), chunk_size=name)


def test_the_code_blocks_of_the_documentation_run():
    page = Path(__file__).parent.parent / "docs" / "engine.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 5
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, str(page), "exec"), names)
