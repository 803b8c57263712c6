from __future__ import annotations

import dataclasses
import types
import warnings
import weakref
from collections import UserDict, namedtuple
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import WORST_ERROR
from one_shot import gradient_errors, one_shot, twins, worst
from torch import Tensor, nn

from gradcache_clip import ClipLoss, GradCache, ReplayMismatchError
from gradcache_clip.cache import replay_check
from gradcache_clip.cache.schedule import replay_order
from gradcache_clip.distributed import LocalStrategy
from gradcache_clip.memory import LiveBytes

LIMIT = {torch.float64: 1e-10, torch.float32: 1e-5}
ROWS = 23


def mlp(width_in: int, *, dropout: float = 0.0, norm: nn.Module | None = None) -> nn.Sequential:
    layers = [nn.Linear(width_in, 32), norm or nn.LayerNorm(32), nn.GELU(), nn.Dropout(dropout)]
    return nn.Sequential(*layers, nn.Linear(32, 16))


def batch(dtype: torch.dtype = torch.float32, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 12, dtype=dtype), torch.randn(rows, 20, dtype=dtype)


def compare(encoders, inputs, *, chunk_size=4, same_chunks=False, loss=None, **options):
    """Gradients of the cached step against those of one graph; returns worst name and error."""
    pairs, truth = twins(*encoders, loss or ClipLoss())
    *towers, loss = pairs
    *true_towers, true_loss = truth
    seed = torch.initial_seed()
    torch.manual_seed(seed)
    expected = one_shot(true_towers, true_loss, inputs, chunk_size if same_chunks else None)
    state_after = torch.get_rng_state()
    torch.manual_seed(seed)
    out = GradCache(towers, loss, chunk_size=chunk_size, **options)(*inputs)
    assert torch.equal(torch.get_rng_state(), state_after)
    torch.testing.assert_close(out.loss, expected.loss.detach())
    assert not out.loss.requires_grad
    return worst(gradient_errors(pairs, truth))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("chunk_size", [1, 4, 5, ROWS - 1, ROWS, 100])
def test_gradients_equal_the_one_shot_step(dtype, chunk_size, record_property):
    encoders = [mlp(12).to(dtype), mlp(20).to(dtype)]
    name, error = compare(encoders, batch(dtype), chunk_size=chunk_size, loss=ClipLoss().to(dtype))
    record_property(WORST_ERROR, (f"two MLPs, {dtype}, chunk {chunk_size} of {ROWS}", name, error))
    assert error < LIMIT[dtype], name


def test_every_parameter_got_a_gradient_that_is_not_zero():
    encoders, loss = [mlp(12), mlp(20)], ClipLoss()
    GradCache(encoders, loss, chunk_size=4)(*batch())
    for parameter in nn.ModuleList([*encoders, loss]).parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0


def test_dropout_equals_one_graph_over_the_same_chunks(record_property):
    encoders = [mlp(12, dropout=0.3).double(), mlp(20, dropout=0.3).double()]
    name, error = compare(
        encoders, batch(torch.float64), same_chunks=True, loss=ClipLoss().double()
    )
    record_property(WORST_ERROR, ("dropout 0.3, the same draws, fp64", name, error))
    assert error < LIMIT[torch.float64]


def test_a_replay_without_the_random_state_would_be_caught(monkeypatch):
    from gradcache_clip.cache.random_state import RandomState

    monkeypatch.setattr(RandomState, "restore", lambda self: None)
    with pytest.raises(ReplayMismatchError, match="encoder 0"):
        GradCache([mlp(12, dropout=0.3), mlp(20)], ClipLoss(), chunk_size=4)(*batch())


def test_chunk_sizes_of_other_integer_types():
    assert GradCache([mlp(12)], ClipLoss(), chunk_size=np.int64(4)).chunk_size == 4


def test_a_submodule_that_is_called_module():
    both = Both()
    both.module = nn.Linear(2, 2)
    assert GradCache(both, ClipLoss()).encoders is both


def test_several_chunk_sizes():
    _, error = compare([mlp(12), mlp(20)], batch(), chunk_size=4)
    cache = GradCache([mlp(12), mlp(20)], ClipLoss(), chunk_size=(3, 7))
    cache(*batch())
    assert error < 1e-5 and cache.chunk_size == (3, 7)


def test_the_same_module_for_both_inputs():
    shared = mlp(12).double()
    inputs = torch.randn(ROWS, 12).double(), torch.randn(ROWS, 12).double()
    _, error = compare([shared, shared], inputs, loss=ClipLoss().double())
    assert error < LIMIT[torch.float64]


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.towers = nn.ModuleList([mlp(12), mlp(20)])

    def forward(self, tower: int, inputs: Tensor) -> Tensor:
        return self.towers[tower](inputs)


def test_one_module_with_a_tower_argument():
    (both, loss), (true_both, true_loss) = twins(Both(), ClipLoss())
    inputs = batch()
    GradCache(both, loss, chunk_size=5)(*inputs)
    one_shot(true_both.towers, true_loss, inputs)
    assert worst(gradient_errors([both, loss], [true_both, true_loss]))[1] < 1e-5


def test_accumulates_onto_gradients_that_exist():
    (encoder, other, loss), (true_encoder, true_other, true_loss) = twins(
        mlp(12), mlp(20), ClipLoss()
    )
    cache, inputs = GradCache([encoder, other], loss, chunk_size=4), batch()
    cache(*inputs)
    cache(*inputs)
    for _ in range(2):
        one_shot([true_encoder, true_other], true_loss, inputs)
    errors = gradient_errors([encoder, other, loss], [true_encoder, true_other, true_loss])
    assert worst(errors)[1] < 1e-5


def test_a_frozen_encoder_is_embedded_and_never_replayed():
    frozen, trained = mlp(12).requires_grad_(False), mlp(20)
    calls = []
    frozen.register_forward_hook(lambda *_: calls.append("frozen"))
    trained.register_forward_hook(lambda *_: calls.append("trained"))
    GradCache([frozen, trained], ClipLoss(), chunk_size=6, check_rows="off")(*batch())
    # Four chunks are embedded; three are replayed, and the graph of the last one was kept.
    assert calls.count("frozen") == 4 and calls.count("trained") == 7
    assert compare([frozen, trained], batch(), chunk_size=6)[1] < 1e-5


def test_a_partly_frozen_encoder():
    encoder = mlp(12)
    encoder[0].requires_grad_(False)
    assert compare([encoder, mlp(20)], batch())[1] < 1e-5


Pair = namedtuple("Pair", "left right")


@dataclasses.dataclass(frozen=True)
class Record:
    left: Tensor
    scale: float
    right: Tensor


class FromAnything(nn.Module):
    """Takes its two tensors from whatever container they came in."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(20, 16)

    def forward(self, left: Any, right: Any = None, scale: float = 1.0) -> Tensor:
        if isinstance(left, (Record, list)):
            pairs = (left.left, left.right) if isinstance(left, Record) else zip(*left, strict=True)
            left, right = pairs
        if not isinstance(left, Tensor):
            left, right = torch.stack(left), torch.stack(right)
        return self.linear(torch.cat([left, right], 1) * scale)


@pytest.mark.parametrize(
    "pack",
    [
        lambda a, b: {"left": a, "right": b},
        lambda a, b: {"left": a, "right": b, "scale": 1.0},
        lambda a, b: UserDict(left=a, right=b),
        lambda a, b: (a, b),
        lambda a, b: Pair(a, b),
        lambda a, b: Record(a, 1.0, b),
        lambda a, b: list(zip(a, b, strict=True)),
    ],
    ids=["dict", "dict with a number", "mapping", "tuple", "namedtuple", "dataclass", "list"],
)
def test_nested_inputs(pack):
    inputs = pack(torch.randn(ROWS, 8), torch.randn(ROWS, 12)), torch.randn(ROWS, 20)
    assert compare([FromAnything(), mlp(20)], inputs)[1] < 1e-5


def test_batch_encoding_and_model_output():
    import transformers
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(50, 16)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> BaseModelOutputWithPooling:
            hidden = self.embedding(input_ids) * attention_mask[..., None]
            return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=hidden.sum(1))

    def inputs() -> Any:
        ids = torch.randint(50, (ROWS, 7), generator=torch.Generator().manual_seed(1))
        return transformers.BatchEncoding({"input_ids": ids, "attention_mask": (ids > 5).long()})

    text, image, loss = Text(), mlp(12), ClipLoss()
    (text, image, loss), (true_text, true_image, true_loss) = twins(text, image, loss)
    images = torch.randn(ROWS, 12)
    GradCache([image, text], loss, chunk_size=4)(images, inputs())
    true_loss(true_image(images), true_text(**inputs()).pooler_output).loss.backward()
    errors = gradient_errors([text, image, loss], [true_text, true_image, true_loss])
    assert worst(errors)[1] < 1e-5
    first = GradCache(
        [image, text], loss, get_features=[None, lambda output: output.last_hidden_state[:, 0]]
    )
    assert first(images, inputs()).loss.isfinite()


class TwoOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 16), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self.a(x), {"extra": self.b(x)}


def test_nested_outputs_reach_the_loss_with_their_structure():
    def loss(features: tuple[Tensor, dict[str, Tensor]], text: Tensor) -> Tensor:
        pooled, more = features
        return F.mse_loss(pooled, text) + more["extra"].square().mean()

    (image, text), (true_image, true_text) = twins(TwoOutputs(), mlp(20))
    images, texts = batch()
    out = GradCache([image, text], loss, chunk_size=4)(images, texts)
    loss(true_image(images), true_text(texts)).backward()
    assert worst(gradient_errors([image, text], [true_image, true_text]))[1] < 1e-5
    assert out.loss.dim() == 0 and not out.loss.requires_grad


def test_loss_kwargs_reach_the_loss():
    def loss(a: Tensor, b: Tensor, weight: float) -> Tensor:
        return weight * F.mse_loss(a, b)

    encoder, inputs = mlp(12), (torch.randn(ROWS, 12), torch.randn(ROWS, 16))
    out = GradCache([encoder, nn.Identity()], loss)(*inputs, loss_kwargs={"weight": 3.0})
    expected = 3 * F.mse_loss(encoder(inputs[0]), inputs[1])
    torch.testing.assert_close(out.loss, expected.detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_reaches_the_replay_and_the_weights(dtype):
    """A cast made without a graph must not be reused: the gradient would silently be missing."""
    (a, b, loss), (true_a, true_b, true_loss) = twins(mlp(12), mlp(20), ClipLoss())
    inputs = batch()
    seen = []
    a[0].register_forward_hook(lambda _m, _i, output: seen.append(output.dtype))
    with torch.autocast("cpu", dtype):
        GradCache([a, b], loss, chunk_size=ROWS, check_rows="off")(*inputs)
        expected = true_loss(true_a(inputs[0]), true_b(inputs[1])).loss
    expected.backward()
    assert seen == [dtype, dtype]
    errors = gradient_errors([a, b, loss], [true_a, true_b, true_loss])
    assert worst(errors)[1] < 1e-6, errors
    assert a[0].weight.grad.dtype is torch.float32


def test_the_backward_does_not_run_under_autocast():
    seen = []

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            seen.append(torch.is_autocast_enabled("cpu"))
            return grad

    class Probed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp(12)

        def forward(self, x: Tensor) -> Tensor:
            return Probe.apply(self.inner(x))

    with torch.autocast("cpu", torch.bfloat16):
        GradCache([Probed(), mlp(20)], ClipLoss(), chunk_size=10)(*batch())
        assert torch.is_autocast_enabled("cpu")
    assert seen == [False] * 3


def test_grad_scaler_scales_every_gradient():
    (a, b, loss), (true_a, true_b, true_loss) = twins(mlp(12), mlp(20), ClipLoss())
    scaler = torch.amp.GradScaler("cpu", init_scale=512.0)
    inputs = batch()
    GradCache([a, b], loss, chunk_size=4, strategy=LocalStrategy(scaler))(*inputs)
    (512.0 * true_loss(true_a(inputs[0]), true_b(inputs[1])).loss).backward()
    errors = gradient_errors([a, b, loss], [true_a, true_b, true_loss])
    assert worst(errors)[1] < 1e-5


@pytest.mark.parametrize("momentum", [0.1, None])
def test_batch_norm_records_each_chunk_once(momentum):
    encoders = [mlp(12, norm=nn.BatchNorm1d(32, momentum=momentum)), mlp(20)]
    with pytest.warns(UserWarning, match=r"batch norm in train mode.*: 1\."):
        _, error = compare(encoders, batch(), chunk_size=4, same_chunks=True)
    assert error < 1e-5
    (ours, other), (truth, _) = twins(*encoders)
    with pytest.warns(UserWarning, match="batch norm"):
        cache = GradCache([ours, other], ClipLoss(), chunk_size=4)
        cache(*(inputs := batch()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache(*inputs)
    for _ in range(2):
        one_shot([truth], lambda x: x.sum(), inputs[:1], chunk_size=4)
    assert ours[1].num_batches_tracked == truth[1].num_batches_tracked == 18
    torch.testing.assert_close(ours[1].running_var, truth[1].running_var)
    assert ours[1].track_running_stats


class Unrepeatable(nn.Module):
    """Draws from numpy, which no replay of torch's generators can repeat."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.from_numpy(np.random.randn(*x.shape)).to(x)


def test_an_encoder_that_cannot_be_replayed_is_named():
    encoder = nn.Sequential(nn.Linear(12, 16), Unrepeatable(), nn.Linear(16, 16))
    message = r"encoder 0 \(Sequential\): 1 \(Unrepeatable\) draws from numpy"
    with pytest.raises(ReplayMismatchError, match=message):
        GradCache([encoder, mlp(20)], ClipLoss(), chunk_size=4)(*batch())


def test_an_input_changed_in_place_is_found():
    class Doubles(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp(12)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.mul_(2))

    # Doubling again during the diagnosis must not be blamed on a module's own randomness.
    with pytest.raises(ReplayMismatchError, match="encoder 0"):
        GradCache([Doubles(), mlp(20)], ClipLoss(), chunk_size=4)(*batch())


def test_the_replay_check_can_warn_or_be_off():
    encoder = nn.Sequential(nn.Linear(12, 16), Unrepeatable())
    with pytest.warns(UserWarning, match="(?s)draws from numpy.*changed by"):
        GradCache([encoder, mlp(20)], ClipLoss(), check_replay="warn")(*batch())
    GradCache([encoder, mlp(20)], ClipLoss(), check_replay="off")(*batch())


class FirstToken(nn.Module):
    """Its features are a view into the hidden states of all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 16)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.layer(tokens)[:, 0]


def test_what_went_wrong_elsewhere_is_asked_on_the_device_of_the_features():
    class Asked(LocalStrategy):
        def on_any_rank(self, flag: Tensor) -> bool:
            return self.anywhere(bool(flag), flag.device)

        def anywhere(self, found: bool, device: torch.device) -> bool:
            asked.append(device)
            return found

    asked: list[torch.device] = []
    encoders, inputs = [mlp(12), mlp(20)], batch()
    options = {"chunk_size": 4, "strategy": Asked(), "check_rows": "off"}
    GradCache(encoders, ClipLoss(), **options)(*inputs)
    assert asked == [inputs[0].device] * 3
    GradCache(encoders, ClipLoss(), **options, check_replay="off")(*inputs)
    assert len(asked) == 4, "features are looked at, the replay is not"


def test_memory_does_not_grow_with_the_batch_but_for_its_features():
    peaks = {}
    for rows in (64, 1024):
        inputs = torch.randn(rows, 50, 8), torch.randn(rows, 20)
        cache = GradCache([FirstToken(), mlp(20)], ClipLoss(), chunk_size=16)
        with LiveBytes() as live:
            cache(*inputs)
        peaks[rows] = live.peak_bytes
    features = 2 * 1024 * 16 * 4
    hidden_states = 1024 * 50 * 16 * 4
    # Features and their gradients, normalised copies in the loss, and a tile of 1,024 x 1,024.
    assert peaks[1024] - peaks[64] < 8 * features + 2 * 4 * 1024**2
    without_tile = peaks[1024] - 2 * 4 * 1024**2
    assert without_tile < hidden_states / 2, "hidden states of all chunks were alive"


class Saved:
    """A tensor that autograd saved for a backward, for as long as it does."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def test_every_graph_is_freed_before_the_next_replay():
    alive: weakref.WeakSet[Saved] = weakref.WeakSet()
    counts: list[int] = []

    def save(tensor: Tensor) -> Saved:
        saved = Saved(tensor)
        alive.add(saved)
        return saved

    encoder = mlp(12)
    encoder.register_forward_pre_hook(
        lambda *_: counts.append(len(alive)) if torch.is_grad_enabled() else None
    )
    with torch.autograd.graph.saved_tensors_hooks(save, lambda saved: saved.tensor):
        GradCache([encoder, nn.Identity()], F.mse_loss, chunk_size=4)(
            torch.randn(ROWS, 12), torch.randn(ROWS, 16)
        )
    assert counts == [0] * 6


def test_a_head_in_get_features_is_trained_on_a_frozen_encoder():
    (body, other, head, loss), (true_body, true_other, true_head, true_loss) = twins(
        mlp(12).requires_grad_(False), mlp(20), nn.Linear(16, 16), ClipLoss()
    )
    inputs = batch()
    GradCache([body, other], loss, chunk_size=4, get_features=[head, None])(*inputs)
    true_loss(true_head(true_body(inputs[0])), true_other(inputs[1])).loss.backward()
    ours, truth = [other, head, loss], [true_other, true_head, true_loss]
    assert worst(gradient_errors(ours, truth))[1] < 1e-5


def test_a_frozen_tower_of_one_module_is_not_replayed():
    both, calls = Both(), []
    both.towers[0].requires_grad_(False)
    both.towers[0].register_forward_hook(lambda *_: calls.append(0))
    both.towers[1].register_forward_hook(lambda *_: calls.append(1))
    GradCache(both, ClipLoss(), chunk_size=6, check_rows="off")(*batch())
    assert (calls.count(0), calls.count(1)) == (4, 7)


class EnablesGrad(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp(12)

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            return self.inner(x)


def test_an_encoder_that_enables_gradients_itself():
    assert compare([EnablesGrad(), mlp(20)], batch())[1] < 1e-5


def test_an_output_buffer_that_is_used_again():
    class Reuses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp(12)
            self.buffer = torch.empty(0)

        def forward(self, x: Tensor) -> Tensor:
            features = self.inner(x)
            if torch.is_grad_enabled():
                return features
            self.buffer.resize_(features.shape).copy_(features)
            return self.buffer

    assert compare([Reuses(), mlp(20)], batch(rows=20))[1] < 1e-5


def test_cached_parametrizations_are_refused():
    encoder = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(12, 16)))
    cache = GradCache([encoder, mlp(20)], ClipLoss(), chunk_size=4)
    with (
        pytest.raises(RuntimeError, match="parametrize.cached"),
        nn.utils.parametrize.cached(),
    ):
        cache(*batch())
    cache(*batch())
    assert all(parameter.grad is not None for parameter in encoder.parameters())


def test_the_fast_path_of_transformer_layers_is_not_taken():
    """Without gradients it computes padded positions differently."""

    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
            self.layers = nn.TransformerEncoder(layer, 1).eval()

        def forward(self, x: Tensor, padding: Tensor) -> Tensor:
            return self.layers(x, src_key_padding_mask=padding).mean(1)

    padding = torch.arange(6) >= torch.randint(2, 7, (ROWS, 1))
    texts = torch.randn(ROWS, 6, 16), padding
    GradCache([mlp(12), Text()], ClipLoss(), chunk_size=5)(torch.randn(ROWS, 12), texts)
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_mismatch_is_raised_even_if_its_cause_cannot_be_found(monkeypatch):
    class Drifts(nn.Linear):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x) * (1 + 0.01 * self.calls)

    encoder = Drifts(12, 16)

    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError("no room for another pass")

    monkeypatch.setattr(replay_check, "watch", fail)
    with pytest.raises(ReplayMismatchError, match="could not be found.*no room"):
        GradCache([encoder, mlp(20)], ClipLoss(), chunk_size=4)(*batch())


def test_one_wrong_row_of_a_large_chunk_is_enough():
    class OneRow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.calls = mlp(12), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            scale = torch.ones(len(x), 1)
            scale[7] += 0.1 * self.calls
            return self.inner(x) * scale

    with (
        pytest.raises(ReplayMismatchError, match="encoder 0"),
        torch.autocast("cpu", torch.bfloat16),
    ):
        GradCache([OneRow(), mlp(20)], ClipLoss(), chunk_size=1024)(*batch(rows=1024))


def test_instance_norm_records_each_chunk_once():
    encoders = [
        nn.Sequential(nn.Unflatten(1, (3, 4)), nn.InstanceNorm1d(3, track_running_stats=True),
                      nn.Flatten(), nn.Linear(12, 16)),
        mlp(20),
    ]  # fmt: skip
    (ours, other), (truth, _) = twins(*encoders)
    inputs = batch()
    GradCache([ours, other], ClipLoss(), chunk_size=4)(*inputs)
    for start in range(0, ROWS, 4):
        truth(inputs[0][start : start + 4])
    torch.testing.assert_close(ours[1].running_mean, truth[1].running_mean)


def test_inputs_with_a_graph_are_refused_before_anything_is_changed():
    upstream, encoders = nn.Linear(5, 12), [mlp(12), mlp(20)]
    _, texts = batch()
    cache = GradCache(encoders, ClipLoss(), chunk_size=4)
    with pytest.raises(ValueError, match="encoder 0.*expected inputs that are leaves"):
        cache(upstream(torch.randn(ROWS, 5)), texts)
    assert_no_gradient(*encoders)


def test_inputs_that_are_leaves_get_their_gradient():
    encoders, (images, texts) = [mlp(12), mlp(20)], batch()
    images.requires_grad_()
    GradCache(encoders, ClipLoss(), chunk_size=4)(images, texts)
    expected = torch.autograd.grad(ClipLoss()(encoders[0](images), encoders[1](texts)).loss, images)
    torch.testing.assert_close(images.grad, expected[0])


def test_a_loss_that_writes_into_the_features_is_refused():
    def loss(a: Tensor, b: Tensor) -> Tensor:
        with torch.no_grad():
            a.clamp_(-0.1, 0.1)
        return F.mse_loss(a, b)

    with pytest.raises(ValueError, match="changed in place"):
        GradCache([mlp(12), mlp(20)], loss, chunk_size=4)(*batch())


def test_any_object_with_a_loss_comes_back_detached():
    def loss(a: Tensor, b: Tensor) -> types.SimpleNamespace:
        return types.SimpleNamespace(loss=F.mse_loss(a, b), parts={"mse": F.mse_loss(a, b)}, n=3)

    out = GradCache([mlp(12), mlp(20)], loss, chunk_size=4)(*batch())
    assert not out.loss.requires_grad and not out.parts["mse"].requires_grad and out.n == 3


def test_numpy_arrays_are_cut_like_tensors():
    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp(12)

        def forward(self, x: Tensor, weight: Any) -> Tensor:
            return self.inner(x) * torch.from_numpy(weight).float()[:, None]

    inputs = {"x": torch.randn(ROWS, 12), "weight": np.arange(ROWS)}, torch.randn(ROWS, 20)
    assert compare([Weighted(), mlp(20)], inputs)[1] < 1e-5


def test_replay_order_with_joint_ends():
    order = replay_order(["abc", "xy", "s"], joint_first_and_last=True)
    assert order == [["a", "x"], ["b"], ["c", "y", "s"]]
    assert replay_order([], joint_first_and_last=True) == []


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"chunk_size": 0}, ValueError, "chunk_size: expected a positive integer.*got 0"),
        ({"chunk_size": (4, -1)}, ValueError, "chunk_size: expected a positive integer"),
        ({"chunk_size": True}, ValueError, "chunk_size: expected"),
        ({"chunk_size": 64.0}, ValueError, "chunk_size: expected.*got 64.0"),
        ({"chunk_size": None}, ValueError, "chunk_size: expected.*got None"),
        ({"chunk_size": (4, 4, 4)}, ValueError, "chunk_size: expected one for each of 2 inputs"),
        ({"check_replay": "loud"}, ValueError, "check_replay: expected 'error', 'warn' or 'off'"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        GradCache([mlp(12), mlp(20)], ClipLoss(), **options)(*batch())


def assert_no_gradient(*modules: nn.Module) -> None:
    assert all(p.grad is None for module in modules for p in module.parameters())


def test_bad_inputs_leave_every_gradient_untouched():
    encoders, loss = [mlp(12), mlp(20)], ClipLoss()
    cache = GradCache(encoders, loss, chunk_size=4)
    images, texts = batch()
    with pytest.raises(ValueError, match="inputs: expected 2, one for each encoder, got 1"):
        cache(images)
    with pytest.raises(ValueError, match=r"text_features: expected the shape.*\(23, 16\).*\(22"):
        cache(images, texts[1:])
    with pytest.raises(ValueError, match="at least 2 pairs, got 1"):
        cache(images[:1], texts[:1])
    with pytest.raises(ValueError, match="expected tensors or lists"):
        cache("an image", texts)
    with pytest.raises(ValueError, match="expected a list of strings, got a tuple"):
        cache(images, ("a", "b"))
    with pytest.raises(ValueError, match="input 1: expected at least one row, got none"):
        cache(images, texts[:0])
    with pytest.raises(RuntimeError, match="no_grad"), torch.no_grad():
        cache(images, texts)
    assert_no_gradient(*encoders, loss)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_located(value):
    encoders, loss = [mlp(12), nn.Linear(20, 16)], ClipLoss()
    images, texts = batch()
    texts[9] = value
    with pytest.raises(ValueError, match=r"encoder 1 \(Linear\).*chunk 2 of 6 \(rows 8 to 11\)"):
        GradCache(encoders, loss, chunk_size=4)(images, texts)
    assert_no_gradient(*encoders, loss)


def test_inputs_that_disagree_are_named():
    cache = GradCache([FromAnything(), mlp(20)], ClipLoss())
    inputs = {"left": torch.randn(4, 8), "right": torch.randn(3, 12)}
    with pytest.raises(ValueError, match=r"input 0: .*got 4 in input 0\['left'\] and 3"):
        cache(inputs, torch.randn(4, 20))


class Returns(nn.Module):
    def __init__(self, output: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.output = output

    def forward(self, x: Tensor) -> Any:
        return self.output


@pytest.mark.parametrize(
    ("output", "error", "message"),
    [
        ("text", TypeError, "got str; extract them with get_features"),
        (None, TypeError, "got NoneType"),
        (UserDict(hidden=torch.ones(4, 2)), TypeError, "got UserDict with hidden; say which"),
        ({"loss": torch.ones(())}, TypeError, r"weight for every loss.*got 'loss'.*get_features"),
        (torch.ones(4, 2, dtype=torch.complex64), TypeError, "expected features .a real tensor"),
        (torch.ones(3, 2), ValueError, r"expected features with 4 rows.*got shape \(3, 2\)"),
        (torch.ones(()), ValueError, r"got shape \(\)"),
    ],
)
def test_outputs_that_are_no_features(output, error, message):
    with pytest.raises(error, match=message):
        GradCache([Returns(output), mlp(20)], ClipLoss())(torch.ones(4, 1), torch.randn(4, 20))


def test_encoders_and_losses_that_are_none():
    with pytest.raises(ValueError, match="one module with forward"):
        GradCache(mlp(12), ClipLoss())
    with pytest.raises(TypeError, match=r"torch\.nn\.Module, got function at 1"):
        GradCache([mlp(12), lambda x: x], ClipLoss())
    with pytest.raises(ValueError, match="at least one module"):
        GradCache([], ClipLoss())
    with pytest.raises(TypeError, match=r"loss: expected a scalar.*shape \(23, 16\)"):
        GradCache([mlp(12)], lambda x: x)(torch.randn(ROWS, 12))
    with pytest.raises(TypeError, match="loss: expected a scalar.*got int"):
        GradCache([mlp(12)], lambda x: 3)(torch.randn(ROWS, 12))
    with pytest.raises(ValueError, match="every encoder is frozen"):
        GradCache([mlp(12).requires_grad_(False)], lambda x: x.sum())(torch.randn(ROWS, 12))
