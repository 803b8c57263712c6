"""Encoders of today whose inputs are packed: cached gradients beside those of one shot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import WORST_ERROR
from one_shot import gradient_errors, twins, worst
from packed_inputs import (
    LastToken,
    PackedModernBert,
    compute_in_double,
    packed,
    vision_batch,
    vision_models,
)
from torch import Tensor, nn

from gradcache_clip import ByLength, GradCache, PackedPatches, PackedTokens
from gradcache_clip.cache.trunk import call_encoder

pytestmark = pytest.mark.encoders

Record = Callable[[str, Any], None]


LENGTHS = 5, 1, 9, 3, 3, 7, 2


def dot_product(x: Tensor, y: Tensor) -> Tensor:
    return ((x @ y.T) ** 2).mean()


def assert_exact(
    name: str, encoder: nn.Module, inputs: Any, count: int, record_property: Record, **options: Any
) -> None:
    """Compare a cached step with the one-shot step, in fp64."""
    ours, truth = twins(encoder.double(), nn.Linear(3, _width_of(encoder, inputs)).double())
    numbers = torch.randn(count, 3).double()
    dot_product(call_encoder(truth[0], inputs), truth[1](numbers)).backward()
    division = options.pop("rows", None)
    cache = GradCache(tuple(ours), dot_product, chunk_size=2, rows=[division, None], **options)
    cache(inputs, numbers)
    parameter, error = worst(gradient_errors(ours, truth))
    record_property(WORST_ERROR, (name, parameter, error))
    assert error < 1e-10


@torch.no_grad()
def _width_of(encoder: nn.Module, inputs: Any) -> int:
    return call_encoder(encoder, inputs).shape[1]


@pytest.mark.parametrize("budget", [None, 2**30])
@pytest.mark.parametrize("name", ["Qwen2-VL", "Qwen2.5-VL", "Qwen3-VL"])
def test_vision_language(name, budget, record_property, monkeypatch):
    """Rows with 0, 1 and 2 images, and with videos."""
    encoder = LastToken(vision_models()[name]())
    compute_in_double(encoder, monkeypatch)
    batch = vision_batch(by_frame=name == "Qwen3-VL")
    options = {"rows": PackedPatches(), "memory_budget": budget}
    setting = f"{name}, 0 to 2 images a row" + (", graphs kept" if budget else "")
    assert_exact(setting, encoder, batch, 7, record_property, **options)


def test_vision_language_sorted_and_trimmed(record_property, monkeypatch):
    encoder = LastToken(vision_models()["Qwen2.5-VL"]())
    compute_in_double(encoder, monkeypatch)
    options = {"rows": PackedPatches(), "sort_by_length": [ByLength(), None]}
    name = "Qwen2.5-VL, sorted by length"
    assert_exact(name, encoder, vision_batch(), 7, record_property, **options)


@pytest.mark.parametrize("sorting", [None, [ByLength(), None]])
def test_modernbert_packed(sorting, record_property, monkeypatch):
    from transformers import ModernBertConfig, ModernBertModel

    special = ["pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"]
    config = ModernBertConfig(
        vocab_size=100, hidden_size=16, intermediate_size=24, num_hidden_layers=4,
        num_attention_heads=2, local_attention=4, **dict.fromkeys(special, 0),
    )  # fmt: skip
    encoder = PackedModernBert(ModernBertModel(config))
    compute_in_double(encoder, monkeypatch)
    name = "ModernBERT packed" + (", sorted by length" if sorting else "")
    options = {"rows": PackedTokens(), "sort_by_length": sorting}
    assert_exact(name, encoder, packed(LENGTHS, bounds=True), 7, record_property, **options)


class PackedCausal(nn.Module):
    """The last token of each sequence; transformers sees them in `position_ids`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        output = self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False)
        starts = torch.cat([position_ids[0, 1:] == 0, torch.ones(1, dtype=torch.bool)])
        return output.last_hidden_state[0, starts]


def test_qwen3_packed(record_property, monkeypatch):
    from transformers import Qwen3Config, Qwen3Model

    config = Qwen3Config(
        vocab_size=100, hidden_size=16, intermediate_size=24, num_hidden_layers=2, head_dim=8,
        num_attention_heads=2, num_key_value_heads=1, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    encoder = PackedCausal(Qwen3Model(config))
    compute_in_double(encoder, monkeypatch)
    batch = packed(LENGTHS, bounds=False)
    assert_exact("Qwen3 packed", encoder, batch, 7, record_property, rows=PackedTokens())


class JaggedMean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 8), nn.Linear(8, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = torch.nn.functional.gelu(self.inner(tokens))
        return self.outer(torch.nested.to_padded_tensor(hidden, 0.0).sum(1))


@pytest.mark.parametrize("sorting", [None, [ByLength(), None]])
def test_jagged(sorting, record_property):
    rows = [torch.randn(length, 4).double() for length in LENGTHS]
    jagged = torch.nested.nested_tensor(rows, layout=torch.jagged)
    name = "jagged NestedTensor" + (", sorted by length" if sorting else "")
    assert_exact(name, JaggedMean(), jagged, 7, record_property, sort_by_length=sorting)


@pytest.mark.parametrize("last", [False, True])
def test_embedding_bag(last, record_property):
    bags = nn.EmbeddingBag(50, 8, mode="sum", include_last_offset=last)
    bounds = torch.tensor([0, 4, 4, 5, 9, 9]) if last else torch.tensor([0, 4, 4, 5, 9])
    given = {"input": torch.randint(50, (9,)), "offsets": bounds}
    given["per_sample_weights"] = torch.randn(9).double()
    name = "EmbeddingBag" + (", last offset included" if last else "")
    rows = PackedTokens(include_last_offset=last)
    assert_exact(name, bags, given, 5, record_property, rows=rows)
