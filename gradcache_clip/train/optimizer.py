"""AdamW with parameter groups, and the learning rate schedule."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from gradcache_clip.train.config import OptimizerConfig

# Embedding tables and learned tokens of timm and transformers. A row of a table gets gradients only
# in steps that use it, but decay would shrink it in every step, rare words most of all.
_TABLES = (
    *("pos_embed", "cls_token", "reg_token", "dist_token", "mask_token", "position_bias_table"),
    *("class_embedding", "positional_embedding", "embedding.weight", "embeddings.weight"),
    *("embed_tokens.weight", "wte.weight", "wpe.weight", "relative_attention_bias.weight"),
)
_FUSED_DEVICES = frozenset({"cpu", "cuda"})


def build_optimizer(config: OptimizerConfig, *modules: nn.Module) -> torch.optim.AdamW:
    """Build AdamW with weight decay on matrices only.

    Parameters with fewer than two dimensions (biases, norm gains, `log_logit_scale`), embedding and
    position tables, and class tokens do not decay. Frozen parameters are left out, and tied
    parameters are updated once.

    Args:
        config: `learning_rate`, `weight_decay`, `beta1`, `beta2`, `eps`.
        modules: the encoder and the loss.

    Source:
        Loshchilov and Hutter 2019 (AdamW); Radford et al. 2021, section 2.5 (no decay on gains or
        biases).

    Example:
        >>> from types import SimpleNamespace
        >>> config = SimpleNamespace(learning_rate=1e-3, weight_decay=0.1, beta1=0.9, beta2=0.98,
        ...                          eps=1e-6)
        >>> optimizer = build_optimizer(config, torch.nn.Linear(4, 2))
        >>> [(len(group["params"]), group["weight_decay"]) for group in optimizer.param_groups]
        [(1, 0.0), (1, 0.1)]
    """
    groups = parameter_groups(*modules)
    everything = [parameter for group in groups for parameter in group["params"]]
    return torch.optim.AdamW(
        groups,
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=all(p.device.type in _FUSED_DEVICES and p.is_floating_point() for p in everything),
    )


def parameter_groups(*modules: nn.Module) -> list[dict[str, Any]]:
    """Group trainable parameters: those without decay, and those with the optimizer's."""
    from timm.optim import param_groups_weight_decay

    # nn.ModuleList prefixes every name with an index and a dot.
    tables = [f"*[._]{name}" for name in _TABLES]
    groups = param_groups_weight_decay(nn.ModuleList(modules), 1.0, no_weight_decay_list=tables)
    for group in groups:
        # Leave the decay of this group to the optimizer; 1.0 above only told the two apart.
        if group["weight_decay"]:
            del group["weight_decay"]
    return groups


def learning_rate_at(step: int, config: OptimizerConfig, total_steps: int) -> float:
    """Return the learning rate of a step: linear warm-up, then half a cosine down to zero.

    Args:
        step: optimizer steps taken before this one, 0 to `total_steps`.
        config: `learning_rate` (the peak) and `warmup_steps`, fewer than `total_steps`.
        total_steps: optimizer steps of the whole run.

    Returns:
        The rate, which peaks at step `warmup_steps - 1` and is zero at `total_steps`.

    Example:
        >>> from types import SimpleNamespace
        >>> config = SimpleNamespace(learning_rate=1.0, warmup_steps=2)
        >>> [round(learning_rate_at(step, config, 6), 3) for step in range(6)]
        [0.5, 1.0, 1.0, 0.854, 0.5, 0.146]
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / (total_steps - config.warmup_steps)
    return config.learning_rate * 0.5 * (1.0 + math.cos(math.pi * progress))
