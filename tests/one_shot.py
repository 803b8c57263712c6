"""The step that gradient caching must equal: every encoder once, one graph, one backward."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradcache_clip.cache.batch_tree import count_rows, take_rows
from gradcache_clip.cache.trunk import call_encoder


def one_shot(
    encoders: Sequence[nn.Module],
    loss: Callable[..., Any],
    inputs: Sequence[Any],
    chunk_size: int | None = None,
) -> Any:
    """Forward and backward in one graph; with `chunk_size`, over the same chunks in that graph."""
    features = [
        embed_in_chunks(encoder, given, chunk_size)
        for encoder, given in zip(encoders, inputs, strict=True)
    ]
    output = loss(*features)
    (output if isinstance(output, Tensor) else output.loss).backward()
    return output


def embed_in_chunks(encoder: nn.Module, inputs: Any, chunk_size: int | None) -> Tensor:
    rows = count_rows(inputs, "inputs")
    size = chunk_size or rows
    chunks = [take_rows(inputs, start, start + size) for start in range(0, rows, size)]
    return torch.cat([call_encoder(encoder, chunk) for chunk in chunks])


def twins(*modules: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """The modules without gradients and exact copies, sharing kept."""
    together = nn.ModuleList(modules)
    together.zero_grad()
    return list(together), list(copy.deepcopy(together))


def gradient_errors(modules: Sequence[nn.Module], truth: Sequence[nn.Module]) -> dict[str, float]:
    """Relative error of each parameter's gradient; a missing gradient counts as infinite."""
    ours = dict(nn.ModuleList(modules).named_parameters())
    theirs = dict(nn.ModuleList(truth).named_parameters())
    assert ours.keys() == theirs.keys()
    return {name: _error(ours[name].grad, theirs[name].grad) for name in ours}


def _error(ours: Tensor | None, theirs: Tensor | None) -> float:
    if ours is None or theirs is None:
        return 0.0 if ours is theirs else float("inf")
    scale = theirs.double().norm().clamp_min(1e-30)
    return float((ours.double() - theirs.double()).norm() / scale)


def worst(errors: dict[str, float]) -> tuple[str, float]:
    return max(errors.items(), key=lambda pair: pair[1])
