"""Predicted steps against the same counter on real ones, and against sums made by hand."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from packed_inputs import vision_batch, vision_models
from torch import Tensor, nn

from gradcache_clip import ClipLoss, GradCache, PackedPatches, PackedTokens
from gradcache_clip.memory import (
    LiveBytes,
    count_cached_step,
    count_plain_step,
    peak_resident_bytes,
    reset_peak_resident_bytes,
    resident_bytes,
)


class _Bert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        config = BertConfig(
            vocab_size=100,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=16,
        )
        self.bert = BertModel(config, add_pooling_layer=False)
        self.projection = nn.Linear(32, 24)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return self.projection(hidden[:, 0])


@pytest.fixture(scope="module", params=["vit", "convnext"])
def encoders(request):
    import timm

    torch.manual_seed(0)
    if request.param == "vit":
        image = timm.create_model(
            "vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=48, num_heads=2, num_classes=24
        )
    else:
        image = timm.create_model("convnext_atto", depths=(1, 1, 1, 1), num_classes=24)
    return image, _Bert()


def _inputs(rows: int) -> tuple[Tensor, dict[str, Tensor]]:
    ids = torch.randint(100, (rows, 12))
    return torch.randn(rows, 3, 32, 32), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _state(modules: Iterable[nn.Module], inputs: tuple[Tensor, dict[str, Tensor]]) -> list[Tensor]:
    tensors = [
        tensor for module in modules for tensor in module.state_dict(keep_vars=True).values()
    ]
    return [*tensors, inputs[0], *inputs[1].values()]


@pytest.mark.parametrize(("batch_size", "autocast"), [(8, False), (16, False), (16, True)])
def test_plain_step_is_predicted_within_two_percent(encoders, batch_size, autocast):
    loss, inputs = ClipLoss(impl="reference"), _inputs(batch_size)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        predicted = count_plain_step(encoders, loss, _inputs(2), batch_size, optimizer_states=0)
    with LiveBytes(start=_state([*encoders, loss], inputs)) as live:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            out = loss(encoders[0](inputs[0]), encoders[1](**inputs[1]))
        out.loss.backward()
    _clear(*encoders)
    assert predicted.total_bytes == pytest.approx(live.peak_bytes, rel=0.02)
    assert predicted.activation_bytes > predicted.input_bytes > 0


@pytest.mark.parametrize(
    ("batch_size", "autocast"), [(4, False), (8, False), (18, False), (16, True)]
)
def test_cached_step_is_predicted_within_two_percent(encoders, batch_size, autocast):
    loss, inputs = ClipLoss(), _inputs(batch_size)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        predicted = count_cached_step(encoders, loss, _inputs(2), batch_size, 4, optimizer_states=0)
        with LiveBytes(start=_state([*encoders, loss], inputs)) as live:
            GradCache(encoders, loss, chunk_size=4)(*inputs)
    _clear(*encoders)
    assert predicted.total_bytes == pytest.approx(live.peak_bytes, rel=0.02)


def _clear(*modules: nn.Module) -> None:
    for module in modules:
        module.zero_grad()


def _linear_step(count: Any, *sizes: int, encoders: Any = None, **options: Any) -> Any:
    encoders = encoders or (nn.Linear(8, 4, bias=False), nn.Linear(8, 4, bias=False))
    example = torch.ones(2, 8), torch.ones(2, 8)
    return count(encoders, _dot, example, *sizes, **options)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum()


def test_parts_of_a_linear_step_by_hand():
    memory = _linear_step(count_cached_step, 1000, 10)
    weight = 8 * 4 * 4
    assert memory.parameter_bytes == 2 * weight
    assert memory.optimizer_bytes == 4 * weight
    assert memory.input_bytes == 2 * 1000 * 8 * 4
    # Both features and both gradients of them.
    assert memory.feature_bytes == 4 * 1000 * 4 * 4
    # In the last replay live both weights' gradients, a chunk's features, a new gradient, the loss.
    assert memory.gradient_bytes == 2 * weight
    assert memory.activation_bytes == weight + 10 * 4 * 4 + 4


def test_counting_allocates_nothing_and_leaves_the_modules_as_they_are():
    encoders = nn.Linear(8, 4), nn.Linear(8, 4)
    before = [parameter.data_ptr() for module in encoders for parameter in module.parameters()]
    reset_peak_resident_bytes()
    start = resident_bytes()
    memory = _linear_step(count_plain_step, 10**9, encoders=encoders)
    assert memory.total_bytes > 64 * 10**9
    assert peak_resident_bytes() - start < 500 * 2**20
    parameters = [parameter for module in encoders for parameter in module.parameters()]
    assert [parameter.data_ptr() for parameter in parameters] == before
    assert all(parameter.grad is None for parameter in parameters)


def test_modules_on_the_meta_device_count_the_same():
    with torch.device("meta"):
        built = nn.Linear(8, 4, bias=False), nn.Linear(8, 4, bias=False)
    for count, sizes in ((count_plain_step, (64,)), (count_cached_step, (64, 16))):
        assert _linear_step(count, *sizes, encoders=built) == _linear_step(count, *sizes)


def test_a_shared_encoder_counts_once():
    shared = nn.Linear(8, 4, bias=False)
    memory = _linear_step(count_plain_step, 64, encoders=(shared, shared))
    assert memory.parameter_bytes == 8 * 4 * 4


def test_a_frozen_encoder_keeps_no_graph_and_no_optimizer_states():
    large = nn.Sequential(nn.Linear(8, 512), nn.Tanh(), nn.Linear(512, 4))
    encoders = large, nn.Linear(8, 4)
    trained = _linear_step(count_plain_step, 512, encoders=encoders)
    large.requires_grad_(False)
    frozen = _linear_step(count_plain_step, 512, encoders=encoders)
    assert frozen.optimizer_bytes < trained.optimizer_bytes / 10
    assert frozen.activation_bytes < trained.activation_bytes
    cached = _linear_step(count_cached_step, 512, 64, encoders=encoders)
    assert cached.gradient_bytes <= 4 * (8 * 4 + 4), "the frozen encoder is not replayed"


class _TwoTowers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.towers = nn.ModuleList([nn.Linear(8, 4, bias=False) for _ in range(2)])

    def forward(self, tower: int, inputs: Tensor) -> Tensor:
        return self.towers[tower](inputs)


def test_one_module_with_towers_counts_like_two_modules():
    assert _linear_step(count_plain_step, 64, encoders=_TwoTowers()) == _linear_step(
        count_plain_step, 64
    )


class _SkipsPadding(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if bool((x > 0).all()) else x


def test_a_module_that_needs_data_is_named():
    branching = nn.Sequential(nn.Linear(8, 4), nn.ModuleDict({"skip": _SkipsPadding()})["skip"])
    with pytest.raises(ValueError, match=r"encoder 1, module '1' \(_SkipsPadding\): expected ops"):
        _linear_step(count_plain_step, 64, encoders=(nn.Linear(8, 4), branching))
    nn.Linear(8, 4)(torch.ones(1, 8))


def test_packed_tokens_are_predicted_within_two_percent():
    encoders = nn.EmbeddingBag(50, 64, mode="sum"), nn.Linear(8, 64)
    offsets = torch.tensor([0, 4, 4, 5, 9, 16, 18, 19])
    bags = {"input": torch.randint(50, (21,)), "offsets": offsets}
    inputs, rows = (bags, torch.ones(8, 8)), [PackedTokens(), None]
    counted = count_cached_step(encoders, _dot, inputs, 8, 2, rows=rows, optimizer_states=0)
    with LiveBytes(start=_state(encoders, (inputs[1], bags))) as live:
        GradCache(encoders, _dot, chunk_size=2, rows=rows)(*inputs)
    assert counted.total_bytes == pytest.approx(live.peak_bytes, rel=0.02)


def test_images_whose_grids_are_read_are_refused_and_named():
    encoders = vision_models()["Qwen2.5-VL"](), nn.Linear(8, 32)
    inputs, options = (vision_batch(), torch.ones(7, 8)), {"rows": [PackedPatches(), None]}
    with pytest.raises(ValueError, match=r"encoder 0, module 'visual' .* needs the values of"):
        count_cached_step(encoders, _dot, inputs, 14, 2, **options)


@pytest.mark.parametrize("sizes", [(0,), (-1,), (True,), (2.5,)])
def test_sizes_are_checked(sizes):
    with pytest.raises(ValueError, match="batch_size: expected a positive integer"):
        _linear_step(count_plain_step, *sizes)


def test_number_of_examples_is_checked():
    with pytest.raises(ValueError, match="example_inputs: expected 2, one for each encoder, got 1"):
        count_plain_step((nn.Linear(8, 4), nn.Linear(8, 4)), _dot, [torch.ones(2, 8)], 4)
