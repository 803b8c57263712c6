"""LoRA around tiny models of transformers, checkpointed."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn


def decoder(**options: Any) -> nn.Module:
    from transformers import Qwen3Config, Qwen3Model

    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2}
    return Qwen3Model(Qwen3Config(**sizes, **heads, use_cache=False, pad_token_id=0, **options))


def with_lora(model: nn.Module, *, dropout: float = 0.0) -> nn.Module:
    """LoRA whose two matrices are both drawn, so that every gradient is other than zero."""
    from peft import LoraConfig, get_peft_model

    modules = ["q_proj", "down_proj"]
    settings = LoraConfig(
        r=3, target_modules=modules, init_lora_weights=False, lora_dropout=dropout
    )
    with warnings.catch_warnings():
        # peft asks transformers by a name that is being replaced, as is the method below.
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        return get_peft_model(model, settings)
