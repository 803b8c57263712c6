"""A tiny decoder, LoRA around it, texts for it, and a loss of their features."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from gradcache_clip import InfoNCELoss

LENGTH = 8
contrast = InfoNCELoss(init_logit_scale=5.0).requires_grad_(False)


def info_nce(model: Any, *features: Tensor) -> Any:
    return contrast(*features)


def texts(rows: int, side: str) -> dict[str, Tensor]:
    mask = (torch.arange(LENGTH) < torch.randint(1, LENGTH, (rows, 1))).long()
    mask = mask.flip(1) if side == "left" else mask
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    ids = torch.randint(1, 50, mask.shape) * mask
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


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
