"""Chunks of real encoders, trimmed on either side: the gradients of the one-shot step."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from conftest import WORST_ERROR
from one_shot import gradient_errors, one_shot, twins, worst
from torch import Tensor, nn
from trimmed_inputs import (
    LENGTH,
    ROWS,
    WIDTH,
    NaFlex,
    Siglip2,
    naflex_images,
    siglip2_images,
    tokens,
)

from gradcache_clip import ByLength, ClipLoss, GradCache

pytestmark = pytest.mark.encoders

Errors = dict[str, float]


class Pooled(nn.Module):
    """A transformers encoder, pooled at the last token or over all that the mask keeps."""

    def __init__(self, inner: nn.Module, pooling: str) -> None:
        super().__init__()
        self.inner, self.pooling = inner, pooling
        self.widths: list[int] = []

    def forward(self, **given: Tensor) -> Tensor:
        if self.training:
            self.widths.append(given["input_ids"].shape[1])
        hidden = self.inner(**given).last_hidden_state
        kept = given["attention_mask"]
        if self.pooling == "mean":
            weights = kept[..., None].to(hidden)
            return (hidden * weights).sum(1) / weights.sum(1)
        last = (torch.arange(kept.shape[1]) * kept).amax(1)
        return hidden[torch.arange(len(hidden)), last]


def qwen3() -> nn.Module:
    from transformers import Qwen3Config, Qwen3Model

    config = Qwen3Config(
        vocab_size=40,
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=LENGTH,
        use_cache=False,
    )
    return Pooled(Qwen3Model(config), "last")


def bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=40,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=LENGTH,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return Pooled(BertModel(config, add_pooling_layer=False), "mean")


def modern_bert() -> nn.Module:
    from transformers import ModernBertConfig, ModernBertModel

    config = ModernBertConfig(
        vocab_size=40,
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        local_attention=4,
        pad_token_id=0,
    )
    return Pooled(ModernBertModel(config), "mean")


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2Model

    sizes = {"n_embd": WIDTH, "n_layer": 2, "n_head": 2, "n_positions": LENGTH}
    dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = GPT2Config(vocab_size=40, use_cache=False, **sizes, **dropouts)
    return Pooled(GPT2Model(config), "last")


def opt() -> nn.Module:
    from transformers import OPTConfig, OPTModel

    config = OPTConfig(
        vocab_size=40,
        hidden_size=WIDTH,
        ffn_dim=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        word_embed_proj_dim=WIDTH,
        dropout=0.0,
        use_cache=False,
    )
    return Pooled(OPTModel(config), "last")


TEXT_ENCODERS = {
    "Qwen3": qwen3,
    "BERT": bert,
    "ModernBERT": modern_bert,
    "GPT-2": gpt2,
    "OPT": opt,
}


def step_errors(encoder: nn.Module, inputs: Any, by_length: ByLength, **options: Any) -> Errors:
    """Errors of gradients beside the one-shot step over untrimmed rows, in fp64."""
    ours, truth = twins(encoder.double(), nn.Linear(5, WIDTH).double(), ClipLoss().double())
    both = inputs, torch.randn(ROWS, 5).double()
    GradCache(ours[:2], ours[2], chunk_size=2, sort_by_length=[by_length, None], **options)(*both)
    one_shot(truth[:2], truth[2], both)
    errors = gradient_errors(ours, truth)
    # A key bias moves no softmax: its gradient is zero but for rounding.
    return {k: v for k, v in errors.items() if not k.endswith(("key.bias", "k_proj.bias"))}


TRIMMED = {
    "rows": ByLength(),
    "tokens": ByLength(max_tokens=2 * LENGTH),
    "multiples": ByLength(max_tokens=2 * LENGTH, pad_to_multiple_of=4),
}


@pytest.mark.parametrize("by", TRIMMED)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", TEXT_ENCODERS)
def test_texts_padded_on_either_side(name, side, by, record_property):
    encoder = TEXT_ENCODERS[name]()
    worst_error = worst(step_errors(encoder, tokens(side), TRIMMED[by]))
    record_property(WORST_ERROR, (f"{name} padded on the {side}, {by}, fp64", *worst_error))
    assert worst_error[1] < 1e-10 and min(encoder.widths) < LENGTH - 1


@pytest.mark.parametrize("name", ["OPT", "BERT", "GPT-2", "Qwen3"])
def test_padding_on_the_right_needs_no_positions(name):
    given = tokens("right", positions=False)
    assert worst(step_errors(TEXT_ENCODERS[name](), given, ByLength()))[1] < 1e-10


def test_positions_that_a_model_counts_from_the_mask():
    """OPT does: padding on the left moves nothing."""
    encoder = opt()
    assert worst(step_errors(encoder, tokens("left", positions=False), ByLength()))[1] < 1e-10
    assert min(encoder.widths) < LENGTH - 1


@pytest.fixture
def all_in_fp64(monkeypatch):
    """Models compute positions in fp32, whatever their precision is."""
    monkeypatch.setattr(Tensor, "float", Tensor.double)


@pytest.mark.parametrize("name", ["Qwen3", "ModernBERT"])
def test_relative_positions_may_be_counted_from_the_left(name, all_in_fp64):
    given = tokens("left", positions=False)
    assert worst(step_errors(TEXT_ENCODERS[name](), given, ByLength()))[1] < 1e-10


def test_angles_in_fp32_move_features_by_their_rounding_alone():
    given = tokens("left", positions=False)
    assert 1e-10 < worst(step_errors(qwen3(), given, ByLength()))[1] < 1e-5


@pytest.mark.parametrize("budget", [None, 10**9], ids=["replayed", "retained"])
@pytest.mark.parametrize("name", ["GPT-2", "BERT"])
def test_positions_counted_from_the_left_are_refused(name, budget):
    encoder = TEXT_ENCODERS[name]()
    with pytest.raises(ValueError) as raised:
        step_errors(encoder, tokens("left", positions=False), ByLength(), memory_budget=budget)
    found = r"do not depend on padding, got .* without its first \d+ of 12 columns; .*position_ids"
    assert re.search(rf"encoder 0 \(Pooled\): expected features that {found}", str(raised.value))
    assert all(parameter.grad is None for parameter in encoder.parameters())
    assert all(module.training for module in encoder.modules())


# SigLIP 2 of older transformers resizes its positions in fp32 on a CPU.
VISION_ENCODERS = {
    "SigLIP 2": (Siglip2, siglip2_images, 1e-6),
    "NaFlexViT": (NaFlex, naflex_images, 1e-10),
}


@pytest.mark.parametrize("by", TRIMMED)
@pytest.mark.parametrize("name", VISION_ENCODERS)
def test_images_of_any_number_of_patches(name, by, record_property, all_in_fp64):
    build, given, allowed = VISION_ENCODERS[name]
    encoder = build()
    errors = step_errors(encoder, given(), TRIMMED[by])
    record_property(WORST_ERROR, (f"{name} trimmed to its patches, {by}, fp64", *worst(errors)))
    assert worst(errors)[1] < allowed and min(encoder.widths) < LENGTH - 1
