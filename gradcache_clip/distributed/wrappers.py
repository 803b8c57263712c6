"""Modules that somebody else has wrapped: what reduces or shards their gradients by itself."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence

from torch import nn

DP, DDP, FSDP1, FSDP2, DEEPSPEED = (
    "DataParallel",
    "DistributedDataParallel",
    "FullyShardedDataParallel",
    "FSDPModule",
    "DeepSpeedEngine",
)
_HOMES = {
    DP: "torch.nn.parallel",
    DDP: "torch.nn.parallel",
    FSDP1: "torch.distributed.fsdp",
    FSDP2: "torch.distributed.fsdp",
    DEEPSPEED: "deepspeed",
}
_REASONS = {
    # Its threads draw masks on every device, and a replay restores the generator of one.
    DP: "which draws random numbers on devices whose generators no replay restores",
}
_REMEDIES = {
    DP: "start one process per GPU with torchrun and pass strategy=DDPStrategy()",
    DDP: "pass strategy=DDPStrategy()",
    FSDP1: "shard with torch.distributed.fsdp.fully_shard and pass strategy=FSDPStrategy()",
    FSDP2: "pass strategy=FSDPStrategy()",
    DEEPSPEED: "pass strategy=DeepSpeedStrategy(engine)",
}


def innermost(module: nn.Module) -> nn.Module:
    """Below DistributedDataParallel, a DeepSpeed engine and torch.compile."""
    inner = uncompiled(module)
    if is_kind(inner, DDP) or is_kind(inner, DEEPSPEED):
        wrapped = inner.module
        assert isinstance(wrapped, nn.Module)
        return innermost(wrapped)
    return inner


def uncompiled(module: nn.Module) -> nn.Module:
    """Below torch.compile."""
    inner = getattr(module, "_orig_mod", module)
    assert isinstance(inner, nn.Module)
    return inner


def is_kind(module: object, name: str) -> bool:
    """Whether `module` is one of these; its class is not imported to find out."""
    kind = getattr(sys.modules.get(_HOMES[name]), name, None)
    return kind is not None and isinstance(module, kind)


def wrapper_in(module: nn.Module) -> str | None:
    """Name of the wrapper around the module or a part of it."""
    kinds = [(name, getattr(sys.modules.get(home), name, None)) for name, home in _HOMES.items()]
    loaded = [(name, kind) for name, kind in kinds if kind is not None]
    for part in uncompiled(module).modules():
        for name, kind in loaded:
            if isinstance(part, kind):
                return name
    return None


def refuse_wrappers(
    modules: Sequence[nn.Module], strategy: object, allowed: Collection[str] = ()
) -> None:
    """Raise for encoders whose gradients another strategy must take.

    Raises:
        ValueError: an encoder, or a part of it, is in a wrapper that is not `allowed`.
    """
    for index, module in enumerate(modules):
        wrapper = wrapper_in(module)
        if wrapper is not None and wrapper not in allowed:
            reason = _REASONS.get(wrapper, "which reduces or shards them in its own way")
            raise ValueError(
                f"encoder {index}: expected one that {type(strategy).__name__} gives the right "
                f"gradients to, got a {wrapper}, {reason}; {_REMEDIES[wrapper]}"
            )


def refuse_heads(heads: Sequence[nn.Module], strategy: object) -> None:
    """Raise for trained modules beside the encoders, which no wrapper would reduce.

    Raises:
        ValueError: a module in `get_features` has trainable parameters.
    """
    for head in heads:
        if trained := [name for name, p in head.named_parameters() if p.requires_grad]:
            raise ValueError(
                f"get_features: expected no trainable parameters under {type(strategy).__name__}, "
                f"got {trained[0]} of {type(head).__name__}, whose gradients nobody would reduce; "
                "make the head a part of its encoder before wrapping that"
            )
