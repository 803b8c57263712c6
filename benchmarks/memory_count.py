"""Bytes and operations of a training step, counted on fake tensors: nothing is computed.

B pairs a batch.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from engine_models import Workload, encode
from memory_methods import METHODS
from memory_models import FEATURES, Encoders, ModelSize, build_encoders, make_inputs
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeCopyMode,
    FakeTensorMode,
)
from torch.utils.flop_counter import FlopCounterMode

from gradcache_clip import ClipLoss
from gradcache_clip.memory import LiveBytes, count_cached_step

_ALIKE = 2
_ADAMW_STATES = 2


class Counted(NamedTuple):
    """What lives in a step."""

    peak_bytes: int
    """Of all tensors at once."""
    floor_bytes: int
    """Of model, optimizer and batch, which no method can do without."""


def count_step(method: str, size: ModelSize, batch_size: int, chunk_size: int) -> Counted:
    """Bytes of one step of a method; the very code that is measured runs on fake tensors.

    Of chunks that are alike two run: the second one meets the gradients that the first one left,
    and a third would change nothing. A step of `GradCache` is counted by `count_cached_step`.

    Args:
        method: one of `METHODS`.
    """
    encoders = build_encoders(size, checkpointed=METHODS[method].checkpointed)
    if method == "cached":
        example = make_inputs(size, 2)
        memory = count_cached_step(encoders, ClipLoss(), example, batch_size, chunk_size)
        held = memory.parameter_bytes + memory.optimizer_bytes + memory.input_bytes
        return Counted(memory.total_bytes, held)
    with _fake(encoders) as twins:
        inputs = make_inputs(size, batch_size)
        held = _held(twins, inputs)  # a name, for the states to live as long as the step
        live = LiveBytes(start=held)
        step = METHODS[method].make(Workload(_first_chunks(twins), inputs), chunk_size)
        # A step ends by reading its loss, which has no value here.
        with live, suppress(_SeenEnough, DataDependentOutputException):
            step()
    return Counted(live.peak_bytes, live.start_bytes)


def count_pair_flops(size: ModelSize) -> float:
    """Operations of one pair that goes forward through both encoders."""
    with _fake(build_encoders(size)) as twins, FlopCounterMode(display=False) as flops:
        for encoder, given in zip(twins, make_inputs(size, _ALIKE), strict=True):
            encode(encoder, given)
    return flops.get_total_flops() / _ALIKE


@contextmanager
def _fake(encoders: Encoders) -> Iterator[Encoders]:
    """The encoders with fake parameters, in a mode in which new tensors are fake as well."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        with FakeCopyMode(mode):
            twins = copy.deepcopy(encoders)
        yield twins


def _held(encoders: Encoders, inputs: tuple[Tensor, dict[str, Tensor]]) -> list[Tensor]:
    modules = nn.ModuleList(encoders)
    parameters = list(modules.parameters())
    states = [torch.empty_like(each) for each in parameters for _ in range(_ADAMW_STATES)]
    images, texts = inputs
    return [*parameters, *modules.buffers(), *states, images, *texts.values()]


def _first_chunks(encoders: Encoders) -> tuple[nn.Module, nn.Module]:
    runs: Counter[tuple[int, bool]] = Counter()
    return _FirstChunks(encoders.image, 0, runs), _FirstChunks(encoders.text, 1, runs)


class _SeenEnough(Exception):
    """All further chunks of both encoders are like those before."""


class _FirstChunks(nn.Module):
    """Runs an encoder for its first chunks, with and without a graph; then makes features only."""

    def __init__(self, encoder: nn.Module, place: int, runs: Counter[tuple[int, bool]]) -> None:
        super().__init__()
        self.encoder, self.place, self.runs = encoder, place, runs

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        with_graph = torch.is_grad_enabled()
        self.runs[self.place, with_graph] += 1
        if self.runs[self.place, with_graph] <= _ALIKE:
            return self.encoder(*args, **kwargs)
        if min(self.runs[place, True] for place in (0, 1)) > _ALIKE:
            raise _SeenEnough
        rows = len(next(iter((*args, *kwargs.values()))))
        return torch.zeros(rows, FEATURES, requires_grad=with_graph)
