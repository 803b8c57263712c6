"""The first step finds encoders whose rows mix, that draw elsewhere, and losses that read more."""

from __future__ import annotations

import contextlib
import gc
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from one_shot import gradient_errors, one_shot, twins, worst
from torch import Tensor, nn

from gradcache_clip import ByLength, ClipLoss, GradCache, ReplayMismatchError, deferred_step, verify

ROWS, CHUNK, WIDTH = 16, 4, 8


def batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(ROWS, WIDTH, dtype=dtype), torch.randn(ROWS, WIDTH, dtype=dtype)


def clip(a: Tensor, b: Tensor) -> Tensor:
    logits = 5 * F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T
    return F.cross_entropy(logits, torch.arange(len(logits)))


def cache_of(encoder: nn.Module, loss: Any = clip, **options: Any) -> GradCache:
    encoders = encoder.double(), nn.Linear(WIDTH, WIDTH).double()
    return GradCache(encoders, loss, **{"chunk_size": CHUNK, **options})


class Mixing(nn.Module):
    """Takes a share of the mean over rows off."""

    def __init__(self, strength: float = 1.0, *, only_in_training: bool = False) -> None:
        super().__init__()
        self.strength, self.only_in_training = strength, only_in_training

    def forward(self, x: Tensor) -> Tensor:
        if self.only_in_training and not self.training:
            return x
        return x - self.strength * x.mean(0)


# Rows that mix.


def image_encoder(middle: nn.Module) -> tuple[nn.Module, dict[str, Tensor]]:
    import timm

    sizes = {"embed_dim": 48, "depth": 4, "num_heads": 3}
    vit = timm.models.VisionTransformer(
        img_size=16, patch_size=4, num_classes=WIDTH, drop_path_rate=0.1, **sizes
    )
    vit.blocks.insert(2, middle)
    return vit, {"x": torch.randn(64, 3, 16, 16)}


def text_encoder(middle: nn.Module) -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import BertConfig, BertModel

    # Its dropout is 0.1, as published.
    config = BertConfig(
        vocab_size=99,
        hidden_size=48,
        num_hidden_layers=4,
        num_attention_heads=3,
        intermediate_size=96,
    )
    bert = BertModel(config)
    mixed = nn.Sequential(bert.encoder.layer[2].output.LayerNorm, middle)
    bert.encoder.layer[2].output.LayerNorm = mixed
    mask = (torch.arange(12) < torch.randint(3, 13, (64, 1))).long()
    return bert, {"input_ids": torch.randint(99, (64, 12)) * mask, "attention_mask": mask}


PRECISIONS = ["fp32", "bf16 autocast", "bf16 weights"]


def step_in(precision: str, build: Callable[..., Any], middle: nn.Module, **options: Any) -> None:
    """A step over 32 chunks."""
    encoder, given = build(middle)
    other, inputs = nn.Linear(WIDTH, 48 if build is text_encoder else WIDTH), torch.randn(64, WIDTH)
    if precision == "bf16 weights":
        encoder, other, inputs = encoder.bfloat16(), other.bfloat16(), inputs.bfloat16()
        given = {k: v.bfloat16() if v.is_floating_point() else v for k, v in given.items()}
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16 autocast")
    with autocast:
        GradCache((encoder, other), ClipLoss(), chunk_size=2, **options)(given, inputs)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("build", [image_encoder, text_encoder])
def test_real_encoders_with_dropout_as_published(build, precision):
    step_in(precision, build, nn.Identity())


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("build", [image_encoder, text_encoder])
@pytest.mark.parametrize("only_in_training", [False, True])
def test_a_little_mixing_inside_them(build, precision, only_in_training):
    with pytest.raises(ValueError, match="do not depend on the other rows"):
        step_in(precision, build, Mixing(0.02, only_in_training=only_in_training))
    with pytest.warns(UserWarning, match="do not depend on the other rows"):
        step_in(precision, build, Mixing(0.02), check_rows="warn")
    step_in(precision, build, Mixing(0.02), check_rows="off")


@pytest.mark.parametrize("p", [0.0, 1e-9, 0.1, 0.5])
@pytest.mark.parametrize("chunk_size", [1, 5, ROWS])
def test_rows_that_mix_beside_dropout(p, chunk_size):
    encoder = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(p), Mixing())
    with pytest.raises(ValueError, match="do not depend on the other rows"):
        cache_of(encoder, chunk_size=chunk_size)(*batch())
    assert all(p.grad is None for p in encoder.parameters())


class SeesRowsBefore(nn.Linear):
    """As packed sequences do whose causal mask knows no borders."""

    def forward(self, x: Tensor) -> Tensor:
        features = super().forward(x)
        return features + 0.1 * F.pad(features[:-1], (0, 0, 1, 0))


class SeesRowsBehind(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        features = super().forward(x)
        return features + 0.1 * F.pad(features[1:], (0, 0, 0, 1))


@pytest.mark.parametrize("kind", [SeesRowsBefore, SeesRowsBehind])
def test_rows_that_see_one_side_alone(kind):
    with pytest.raises(ValueError, match="do not depend on the other rows"):
        cache_of(kind(WIDTH, WIDTH))(*batch())


class MixesUp(nn.Linear):
    """Mixup inside the encoder."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(0.9 * x + 0.1 * x[torch.randperm(len(x))])


def test_rows_that_meet_by_chance():
    with pytest.raises(ValueError, match="do not depend on the other rows"):
        cache_of(MixesUp(WIDTH, WIDTH))(*batch())


class Pads(nn.Module):
    """Pads rows to the longest, whatever dropout; the mean is over tokens, or all columns."""

    def __init__(self, *, masks: bool) -> None:
        super().__init__()
        self.embedding, self.drop, self.masks = nn.Embedding(20, WIDTH), nn.Dropout(0.1), masks

    def forward(self, lists: list[Tensor]) -> Tensor:
        padded = nn.utils.rnn.pad_sequence(lists, batch_first=True)
        tokens = self.drop(self.embedding(padded))
        if not self.masks:
            return tokens.mean(1)
        kept = (padded != 0)[..., None]
        return (tokens * kept).sum(1) / kept.sum(1)


@pytest.mark.parametrize("lengths", [[3] * CHUNK + [2, 5] * 6, [2, 5, 3, 1] * CHUNK])
def test_rows_padded_inside_the_encoder(lengths):
    """Draws are of other shapes in other company, which is no mixing; padding that counts is."""
    lists = [torch.randint(1, 20, (length,)) for length in lengths]
    cache_of(Pads(masks=True))(lists, batch()[1])
    with pytest.raises(ValueError, match="padding to the longest row of a list"):
        cache_of(Pads(masks=False))(lists, batch()[1])


class Routes(nn.Module):
    """Sends every row to one of two experts, which then see chunks of other sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(256, 2)
        self.experts = nn.ModuleList(nn.Linear(256, 256) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        chosen, out = self.router(x).argmax(1), torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            out = out.index_put((chosen == index,), expert(x[chosen == index]))
        return out.float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_are_no_mixing(dtype):
    encoders = Routes().to(dtype), nn.Linear(WIDTH, 256)
    GradCache(encoders, ClipLoss(), chunk_size=16)(
        torch.randn(64, 256).to(dtype), torch.randn(64, WIDTH)
    )


class TakesHalves(nn.Linear):
    """Computes in 16 bits, and sums in another order where there are few rows."""

    def forward(self, x: Tensor) -> Tensor:
        x, weight, half = x.bfloat16().float(), self.weight.bfloat16().float(), x.shape[1] // 2
        if len(x) < 32:
            features = x[:, :half] @ weight[:, :half].T + x[:, half:] @ weight[:, half:].T
        else:
            features = x @ weight.T
        for _ in range(6):
            features = torch.tanh(3 * features.bfloat16()).float() @ weight.T
        return features


@pytest.mark.parametrize("options", [{}, {"embed_chunk_size": 32}])
def test_an_encoder_that_computes_in_16_bits_and_returns_32(options):
    """Neither its rows nor its replays are refused for how 16 bits round."""
    encoders = TakesHalves(256, 256), nn.Linear(WIDTH, 256)
    cache = GradCache(encoders, ClipLoss(), chunk_size=16, **options)
    cache(torch.randn(64, 256), torch.randn(64, WIDTH))


class Noisy(nn.Linear):
    """Draws in eval mode as well."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.randn(len(x), self.out_features, dtype=x.dtype)


def test_draws_in_every_mode_are_no_mixing():
    cache_of(Noisy(WIDTH, WIDTH))(*batch())


def test_batch_norm_beside_other_mixing():
    """Batch norm has a warning, and hides nothing else."""
    encoder = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), Mixing())
    with (
        pytest.warns(UserWarning, match="batch norm"),
        pytest.raises(ValueError, match="do not depend on the other rows"),
    ):
        cache_of(encoder)(*batch())


@pytest.mark.parametrize("words", [True, False, "raise", None])
@pytest.mark.parametrize("setting", ["check_rows", "check_replay"])
def test_words_that_no_check_knows(setting, words):
    with pytest.raises(ValueError, match=f"{setting}: expected 'error', 'warn' or 'off', got"):
        cache_of(nn.Linear(WIDTH, WIDTH), **{setting: words})


# Draws that no replay repeats.


class DrawsElsewhere(nn.Linear):
    def __init__(self, noise: float, source: str) -> None:
        super().__init__(WIDTH, WIDTH)
        self.noise, self.source = noise, source

    def forward(self, x: Tensor) -> Tensor:
        drawn = np.random.randn() if self.source == "numpy" else random.gauss(0, 1)
        return super().forward(x) * (1 + self.noise * drawn)


@pytest.mark.parametrize("source", ["numpy", "random"])
@pytest.mark.parametrize("noise", [1e-12, 0.01])
@pytest.mark.parametrize("autocast", [False, True])
def test_draws_that_no_replay_repeats(source, noise, autocast):
    encoders = DrawsElsewhere(noise, source), nn.Linear(WIDTH, WIDTH)
    inputs = batch(torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with pytest.raises(ReplayMismatchError, match=r"encoder 0 .*draws from numpy, random"):
            GradCache(encoders, ClipLoss(), chunk_size=CHUNK)(*inputs)
        GradCache(encoders, ClipLoss(), chunk_size=CHUNK, check_replay="off")(*inputs)


def test_a_frozen_encoder_may_draw_where_it_likes():
    encoder = DrawsElsewhere(0.1, "numpy").requires_grad_(False)
    cache_of(encoder)(*batch())


def test_draws_of_another_thread_are_not_the_encoders():
    class Beside(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    encoder, first = Beside(WIDTH, WIDTH), [True]

    def another_thread(*_: Any) -> None:
        if first and first.pop():
            np.random.rand()

    encoder.register_forward_hook(another_thread)
    cache_of(encoder)(*batch())


# What goes past the features.


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router, self.expert = nn.Linear(WIDTH, 4), nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(0.1)
        self.kept: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        shares = self.router(x).softmax(-1)
        if self.training:
            self.kept["balance"] = shares.square().sum(1).mean()
        return self.dropout(self.expert(x)) * (1 + shares[:, :1])


def reads_an_attribute(encoder: Routed) -> Callable[..., Tensor]:
    return lambda a, b: clip(a, b) + 0.1 * encoder.kept["balance"]


def reads_what_a_hook_collects(encoder: Routed) -> Callable[..., Tensor]:
    penalties: list[Tensor] = []
    encoder.expert.register_forward_hook(lambda *each: penalties.append(each[2].square().mean()))
    return lambda a, b: clip(a, b) + 0.1 * sum(penalties) / len(penalties)


def reads_a_hidden_state(encoder: Routed) -> Callable[..., Tensor]:
    kept: dict[str, Tensor] = {}
    encoder.expert.register_forward_hook(lambda *each: kept.update(hidden=each[2]))
    return lambda a, b: clip(a, b) + 0.1 * kept["hidden"].square().mean()


SIDE_DOORS = {
    reads_an_attribute: r"encoder 0 \(Routed\) keeps as kept",
    reads_what_a_hook_collects: r"made in expert \(Linear\) of encoder 0",
    reads_a_hidden_state: r"made in expert \(Linear\) of encoder 0",
}


@pytest.mark.parametrize("habit", SIDE_DOORS)
@pytest.mark.parametrize("chunk_size", [1, 5, ROWS])
@pytest.mark.parametrize("budget", [None, 2**30])
def test_a_loss_that_reads_what_an_encoder_keeps(habit, chunk_size, budget):
    encoder = Routed()
    cache = cache_of(encoder, habit(encoder), chunk_size=chunk_size, memory_budget=budget)
    message = f"nothing of an encoder but its features.*{SIDE_DOORS[habit]}"
    with pytest.raises(ValueError, match=message):
        cache(*batch())
    assert all(p.grad is None for p in encoder.parameters())


@pytest.mark.parametrize("habit", SIDE_DOORS)
def test_the_same_in_a_deferred_step_and_as_a_warning(habit):
    encoder = Routed()
    with pytest.raises(ValueError, match="nothing of an encoder but its features"):
        deferred_step(cache_of(encoder, habit(encoder)), *batch())
    with pytest.warns(UserWarning, match="nothing of an encoder but its features") as caught:
        cache_of(encoder, habit(encoder), check_rows="warn")(*batch())
    assert caught[0].filename == __file__


def test_what_an_encoder_keeps_is_its_own_while_no_loss_reads_it():
    ours, truth = twins(Routed().eval(), nn.Linear(WIDTH, WIDTH), ClipLoss())
    for module in (*ours, *truth):
        module.double()
    inputs = batch()
    for encoder in (ours[0], truth[0]):
        encoder.expert.register_forward_hook(lambda module, *_: setattr(module, "seen", _[1]))
    GradCache(ours[:2], ours[2], chunk_size=CHUNK)(*inputs)
    one_shot(truth[:2], truth[2], inputs)
    assert worst(gradient_errors(ours, truth))[1] < 1e-10


def test_frozen_objects_stay_frozen():
    gc.freeze()
    try:
        cache_of(nn.Linear(WIDTH, WIDTH))(*batch())
        assert gc.get_freeze_count()
    finally:
        gc.unfreeze()


class ActNorm(nn.Module):
    """Sets its shift by the first rows that it sees."""

    def __init__(self, *, by_data: bool) -> None:
        super().__init__()
        self.body, self.shift = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.zeros(WIDTH))
        self.register_buffer("ready", torch.tensor(False))
        self.by_data = by_data

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        if not self.ready:
            shift = self.shift.data if self.by_data else self.shift
            with torch.no_grad():
                shift.copy_(-x.mean(0))
                self.ready.fill_(True)
        return x + self.shift


@pytest.mark.parametrize("by_data", [False, True])
@pytest.mark.parametrize("chunk_size", [1, 5, ROWS])
def test_a_forward_that_writes_to_a_parameter(by_data, chunk_size):
    encoder = ActNorm(by_data=by_data)
    cache, inputs = cache_of(encoder, chunk_size=chunk_size), batch()
    with pytest.raises(ValueError, match=r"encoder 0 \(ActNorm\): shift: expected a forward"):
        cache(*inputs)
    assert encoder.body.weight.grad is None


def test_the_remedy_for_it():
    encoder, inputs = ActNorm(by_data=True).double(), batch()
    with torch.no_grad():
        encoder(inputs[0])
    cache_of(encoder)(*inputs)


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_embeddings_of_a_largest_norm_are_exact(kind):
    """Each forward writes to the rows that it looks up, every time the same."""
    words, others = torch.randint(20, (ROWS, 3)), batch()[1]
    encoder = nn.Sequential(kind(20, WIDTH, max_norm=0.5), nn.Flatten())
    width = encoder(words[:1]).shape[1]
    modules = encoder.double(), nn.Linear(WIDTH, width).double()
    ours, truth = twins(*modules)
    GradCache(ours, clip, chunk_size=CHUNK)(words, others)
    one_shot(truth, clip, (words, others))
    assert worst(gradient_errors(ours, truth))[1] < 1e-10


def test_lazy_modules_take_their_shape_in_the_embed():
    encoder = nn.LazyLinear(WIDTH)
    cache_of(encoder)(*batch())
    assert encoder.weight.grad is not None


# What nothing in a first step can see.


class Clipped(nn.Linear):
    """Clips the gradient of all its rows, as far as it sees them."""

    def forward(self, x: Tensor) -> Tensor:
        features = super().forward(x)
        if features.requires_grad:
            features.register_hook(lambda g: g * (0.01 / g.norm()).clamp(max=1))
        return features


def test_verify_finds_what_looks_at_the_gradient_of_all_rows():
    report = verify(cache_of(Clipped(WIDTH, WIDTH)), *batch())
    assert not report.exact
    assert any("gradient of all rows" in reason for reason in report.reasons)
    assert {row.name.split(":")[0] for row in report.rows if "chunks" in row.verdict} == {
        "encoder 0"
    }


class DrawsByRows(nn.Linear):
    """Draws as many numbers as its rows have positive entries, and mixes rows while it trains."""

    def forward(self, x: Tensor) -> Tensor:
        kept = x > 0
        noise = torch.zeros_like(x).masked_scatter(kept, torch.randn(int(kept.sum())).to(x))
        x = x + noise
        return super().forward(x - x.mean(0) if self.training else x)


def test_mixing_in_training_mode_that_draws_by_its_rows():
    """As the page says, this is not seen: in other company such rows meet other draws."""
    images, texts = batch()
    images[:CHUNK].abs_()
    cache_of(DrawsByRows(WIDTH, WIDTH))(images, texts)


def test_rows_that_mix_later():
    encoder, inputs = nn.Sequential(nn.Linear(WIDTH, WIDTH), Mixing(0.0)), batch()
    cache = cache_of(encoder)
    cache(*inputs)
    encoder[1].strength = 1.0
    cache(*inputs)
    report = verify(cache, *inputs)
    assert not report.exact and any("rows look at other rows" in each for each in report.reasons)


class Counts(nn.Linear):
    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


def test_buffers_count_embed_and_replay():
    ours, truth = twins(Counts(), nn.Linear(WIDTH, WIDTH))
    for module in (*ours, *truth):
        module.double()
    inputs = batch()
    GradCache(ours, clip, chunk_size=CHUNK)(*inputs)
    one_shot(truth, clip, inputs)
    assert worst(gradient_errors(ours, truth))[1] < 1e-10
    assert (ours[0].calls, truth[0].calls) == (2 * ROWS // CHUNK, 1)


class DelayedScaling(Counts):
    """Rounds to 16 steps of the largest value that its earlier forwards have seen."""

    def forward(self, x: Tensor) -> Tensor:
        scale = self.calls.clamp_min(1.0) / 16
        self.calls.copy_(torch.maximum(self.calls, x.abs().amax()))
        x = x + ((x / scale).round() * scale - x).detach()
        return nn.functional.linear(x, self.weight, self.bias)


def test_delayed_scaling():
    encoder, (images, texts) = DelayedScaling(), batch()
    images[:, 0] = torch.arange(ROWS) + 1
    with pytest.raises(ReplayMismatchError, match="expected the replay to repeat the embed"):
        cache_of(encoder)(images, texts)
    # Once that it has seen the largest value, nothing moves.
    cache_of(encoder)(images, texts)


# Costs.


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def growth(step: Callable[[], Any], steps: int) -> int:
    step()
    gc.collect()
    before = resident_bytes()
    for _ in range(steps):
        step()
    gc.collect()
    return resident_bytes() - before


@pytest.mark.parametrize("budget", [1, 2**20, "auto"])
def test_a_graph_that_was_measured_is_freed(budget):
    """It holds 8 MiB a step, where an output that its own node saves closes a cycle."""
    encoders = [
        nn.Sequential(nn.Linear(64, 4096), nn.Tanh(), nn.Linear(4096, 16)) for _ in range(2)
    ]
    inputs = torch.randn(1024, 64), torch.randn(1024, 64)
    cache = GradCache(encoders, ClipLoss(), chunk_size=256, memory_budget=budget)
    assert growth(lambda: cache(*inputs), 12) < 32 * 2**20


class Tight(nn.Module):
    """Has no memory left for its last layer, once that it has built up 64 MiB."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(64, 8192), nn.Linear(8192, 16)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.wide(x))
        if len(x) > 1024:
            raise torch.OutOfMemoryError("injected")
        return self.narrow(hidden)


def test_what_ran_out_of_memory_while_it_was_measured_is_freed(monkeypatch):
    # Larger chunks are faster, whatever else this machine does.
    clock = iter(range(10**6))
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    inputs = torch.randn(2048, 64), torch.randn(2048, 64)
    encoders = Tight(), Tight()

    def step() -> None:
        cache = GradCache(encoders, ClipLoss(), chunk_size="auto")
        cache(*inputs)
        assert cache.chunk_size == (1024, 1024)

    assert growth(step, 2) < 48 * 2**20


def test_replays_share_the_casts_of_autocast():
    class Counts(torch.utils._python_dispatch.TorchDispatchMode):
        casts = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            is_cast = function is torch.ops.aten._to_copy.default
            narrows = is_cast and (kwargs or {}).get("dtype") is torch.bfloat16
            self.casts += narrows and args[0].shape == (24, WIDTH)
            return function(*args, **(kwargs or {}))

    encoders = [nn.Sequential(nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)) for _ in range(2)]
    cache, inputs = GradCache(encoders, ClipLoss(), chunk_size=1), batch(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        cache(*inputs)
        with Counts() as counts:
            cache(*inputs)
    # One of each of two weights in the embed, one where it has a graph, one in the replay; none of
    # them for each of 16 chunks.
    assert counts.casts <= 8


def test_chunks_of_a_sorted_batch_are_ranges():
    """An index that the host holds would make a device wait, once a tensor and chunk."""

    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(100, WIDTH)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return (self.embedding(input_ids) * attention_mask[..., None]).sum(1)

    class Counts(torch.utils._python_dispatch.TorchDispatchMode):
        by_rows = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = function.overloadpacket.__name__.strip("_")
            if name in ("index", "index_put", "index_put_impl", "index_select", "gather"):
                given = args[1] if isinstance(args[1], (list, tuple)) else args[2:3]
                sizes = [each.numel() for each in given if isinstance(each, Tensor)]
                self.by_rows += any(each in (CHUNK, 1) for each in sizes)
            return function(*args, **(kwargs or {}))

    mask = (torch.arange(40) < torch.randint(1, 41, (ROWS, 1))).long()
    texts = {"input_ids": torch.randint(100, (ROWS, 40)) * mask, "attention_mask": mask}
    sorting = [None, ByLength()]
    cache = GradCache(
        (nn.Linear(WIDTH, WIDTH), Words()), ClipLoss(), chunk_size=CHUNK, sort_by_length=sorting
    )
    cache(torch.randn(ROWS, WIDTH), texts)
    with Counts() as counts:
        cache(torch.randn(ROWS, WIDTH), texts)
    assert counts.by_rows == 0


def test_inputs_that_ask_for_gradients_may_be_sorted():
    class Pools(nn.Linear):
        def forward(self, inputs_embeds: Tensor, attention_mask: Tensor) -> Tensor:
            return super().forward((inputs_embeds * attention_mask[..., None]).sum(1))

    mask = (torch.arange(9) < torch.randint(1, 10, (ROWS, 1))).double()
    given = torch.randn(ROWS, 9, WIDTH, dtype=torch.float64)
    gradients, encoder, other = [], Pools(WIDTH, WIDTH).double(), nn.Linear(WIDTH, WIDTH).double()
    images = batch()[1]
    for sorting in (None, [ByLength(), None]):
        leaf = given.clone().requires_grad_()
        texts = {"inputs_embeds": leaf, "attention_mask": mask}
        GradCache((encoder, other), clip, chunk_size=CHUNK, sort_by_length=sorting)(texts, images)
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-14)


def test_features_that_are_not_finite_are_found_before_any_gradient_and_keep_queues():
    """Also in later steps, where they are read once the loss is queued."""
    seen: list[int] = []

    class Kept(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            self.calls += 1
            seen.append(len(a))
            return clip(a, b)

    for loss, calls in ((clip, 0), (Kept(), 1)):
        seen.clear()
        cache, inputs = cache_of(nn.Linear(WIDTH, WIDTH), loss, on_out_of_memory="raise"), batch()
        cache(*inputs)
        encoder = cache.encoders[0]
        encoder.zero_grad()
        with pytest.raises(ValueError, match="expected finite features, got NaN"):
            cache(inputs[0] * float("nan"), inputs[1])
        assert encoder.weight.grad is None and len(seen) == calls
        with contextlib.suppress(AttributeError):
            assert loss.calls == calls
        cache(*inputs)


def test_a_function_that_extracts_features_may_hold_parameters_of_its_own():
    """Whichever chunk uses which: after out of memory no gradient is counted twice."""
    heads = [nn.Linear(WIDTH, WIDTH).double() for _ in range(2)]
    encoder, inputs, calls = nn.Linear(WIDTH, WIDTH).double(), batch(), list[int]()

    def extract(output: Tensor) -> Tensor:
        calls.append(len(output))
        # The last replay of the first try, once that all other chunks have left gradients.
        if len(calls) == fails_at:
            raise torch.OutOfMemoryError("injected")
        return torch.cat([heads[int(row[0] > 0)](row[None]) for row in output])

    found = []
    for fails_at in (-1, ROWS - 1):
        torch.manual_seed(1)
        calls.clear()
        nn.ModuleList([encoder, *heads]).zero_grad()
        cache = cache_of(encoder, get_features=[extract, None], chunk_size=2, check_rows="off")
        with pytest.warns(UserWarning) if fails_at > 0 else contextlib.nullcontext():
            cache(*inputs)
        found.append([head.weight.grad for head in heads])
    for once, again in zip(*found, strict=True):
        torch.testing.assert_close(once, again, rtol=1e-10, atol=1e-12)
