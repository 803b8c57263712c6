"""AdamW for contrastive training, and its learning rate at each step."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

if TYPE_CHECKING:
    from gradcache_clip.train.config import OptimizerConfig

# Lookup tables and learned tokens of timm and transformers. A row of a table gets a gradient only
# in steps that use it, while decay would pull it to zero in every step and wear rare words away.
_TABLE = re.compile(
    r"(^|[._])(pos_embed|cls_token|reg_token|dist_token|mask_token|position_bias_table"
    r"|class_embedding|positional_embedding)$"
    r"|(^|[._])(embeddings?|embed_tokens|wte|wpe|relative_attention_bias)\.weight$"
)
_FUSED_DEVICES = frozenset({"cpu", "cuda"})


def build_optimizer(
    named_parameters: Iterable[tuple[str, Parameter]], config: OptimizerConfig
) -> torch.optim.AdamW:
    """AdamW in two groups: matrices decay; everything else does not.

    No decay on parameters with fewer than two dimensions (biases, norm gains, `log_logit_scale`),
    on embedding and position tables, and on class tokens. Frozen parameters are left out, and a
    parameter under two names (tied weights) is updated once.

    Args:
        named_parameters: `(name, parameter)` of all towers and of the loss.
        config: `learning_rate`, `weight_decay`, `beta1`, `beta2`, `eps`, `warmup_steps`.

    Returns:
        The optimizer, its groups named "decay" and "no_decay" (an empty one is left out).

    Raises:
        ValueError: a value of `config` is out of range, or no parameter needs a gradient.

    Source:
        Loshchilov and Hutter 2019 (AdamW); Radford et al. 2021, section 2.5 (no decay on gains or
        biases).

    Example:
        >>> from types import SimpleNamespace
        >>> config = SimpleNamespace(learning_rate=1e-3, weight_decay=0.1, beta1=0.9, beta2=0.98,
        ...                          eps=1e-6, warmup_steps=10)
        >>> optimizer = build_optimizer(torch.nn.Linear(4, 2).named_parameters(), config)
        >>> [(group["name"], group["weight_decay"]) for group in optimizer.param_groups]
        [('decay', 0.1), ('no_decay', 0.0)]
    """
    _check_config(config)
    groups = parameter_groups(named_parameters)
    everything = [parameter for group in groups for parameter in group["params"]]
    return torch.optim.AdamW(
        [{"weight_decay": config.weight_decay, **group} for group in groups],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=all(p.device.type in _FUSED_DEVICES and p.is_floating_point() for p in everything),
    )


def parameter_groups(named_parameters: Iterable[tuple[str, Parameter]]) -> list[dict[str, Any]]:
    """Trainable parameters in the groups "decay", with the optimizer's decay, and "no_decay".

    Raises:
        ValueError: no parameter needs a gradient.
    """
    groups: dict[bool, list[Parameter]] = {True: [], False: []}
    for name, parameter in _unique_trainable(named_parameters):
        groups[decays(name, parameter)].append(parameter)
    if not groups[True] and not groups[False]:
        raise ValueError(
            "named_parameters: expected at least one that requires a gradient, got none; "
            "unfreeze a tower or pass loss.named_parameters() too"
        )
    both = (
        {"name": "decay", "params": groups[True]},
        {"name": "no_decay", "params": groups[False], "weight_decay": 0.0},
    )
    return [group for group in both if group["params"]]


def decays(name: str, parameter: Parameter) -> bool:
    """Whether weight decay applies to this parameter: a matrix or kernel that is no lookup table.

    Example:
        >>> matrix = Parameter(torch.zeros(2, 2))
        >>> decays("text.embeddings.word_embeddings.weight", matrix)
        False
        >>> decays("image.patch_embed.proj.weight", matrix)
        True
    """
    return parameter.ndim >= 2 and not _TABLE.search(name)


def learning_rate_at(step: int, config: OptimizerConfig, total_steps: int) -> float:
    """Learning rate of one step: linear warm-up, then half a cosine down to zero.

    Args:
        step: optimizer steps taken before this one, 0 to `total_steps`.
        config: `learning_rate` (the peak) and `warmup_steps`.
        total_steps: optimizer steps of the whole run.

    Returns:
        The peak is reached at `warmup_steps - 1`, zero at `total_steps`.

    Raises:
        ValueError: `step` is outside the run, or the warm-up is as long as the run.

    Example:
        >>> from types import SimpleNamespace
        >>> config = SimpleNamespace(learning_rate=1.0, warmup_steps=2)
        >>> [round(learning_rate_at(step, config, 6), 3) for step in range(6)]
        [0.5, 1.0, 1.0, 0.854, 0.5, 0.146]
    """
    if not 0 <= config.warmup_steps < max(total_steps, 1):
        raise ValueError(
            f"warmup_steps: expected 0 to less than the {total_steps} steps of the run, "
            f"got {config.warmup_steps}; pass e.g. optimizer.warmup_steps={total_steps // 10}"
        )
    if not 0 <= step <= total_steps:
        raise ValueError(
            f"step: expected 0 to {total_steps}, got {step}; raise train.steps to train longer"
        )
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / (total_steps - config.warmup_steps)
    return config.learning_rate * 0.5 * (1.0 + math.cos(math.pi * progress))


def apply_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set the learning rate of every group for the next step."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def _unique_trainable(
    named_parameters: Iterable[tuple[str, Parameter]],
) -> Iterable[tuple[str, Parameter]]:
    seen: set[int] = set()
    for name, parameter in named_parameters:
        if parameter.requires_grad and id(parameter) not in seen:
            seen.add(id(parameter))
            yield name, parameter


def _check_config(config: OptimizerConfig) -> None:
    _check("learning_rate", config.learning_rate, "positive", config.learning_rate > 0, "5e-4")
    _check("weight_decay", config.weight_decay, "0 or more", config.weight_decay >= 0, "0.1")
    _check("beta1", config.beta1, "0 to below 1", 0 <= config.beta1 < 1, "0.9")
    _check("beta2", config.beta2, "0 to below 1", 0 <= config.beta2 < 1, "0.98")
    _check("eps", config.eps, "positive", config.eps > 0, "1e-6")
    _check("warmup_steps", config.warmup_steps, "0 or more", config.warmup_steps >= 0, "100")


def _check(name: str, value: float, expected: str, valid: bool, example: str) -> None:
    if not (valid and math.isfinite(value)):
        raise ValueError(
            f"optimizer.{name}: expected {expected}, got {value}; pass e.g. "
            f"optimizer.{name}={example}"
        )


def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Global norm of the gradients before they are scaled down to `max_norm`; 0 leaves them."""
    given = [parameter for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in given if p.grad is not None])
    if max_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(given, max_norm, norm)
    return norm
