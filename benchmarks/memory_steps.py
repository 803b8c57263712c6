"""The ways to train that memory_vs_batch.py compares: their encoders, steps, bytes, operations.

B pairs a batch, c pairs a chunk, L tokens a text, D feature width.
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

import torch
from engine_steps import IMAGE_TEXT, VOCABULARY, Bert, Step, Workload, encode, rows_of
from fresh_process import PeakGrowth, interleaved_times_ms
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeCopyMode,
    FakeTensorMode,
)
from torch.utils.flop_counter import FlopCounterMode

from gradcache_clip import ClipLoss
from gradcache_clip.memory import LiveBytes, count_cached_step

FEATURES = 512
"""Width of the features of every pair of encoders."""
_ALIKE = 2
_ADAMW_STATES = 2

# Encoders and batches

Inputs = tuple[Tensor, dict[str, Tensor]]


@dataclass(frozen=True)
class ModelSize:
    """A pair of encoders and the shape of their inputs."""

    description: str
    image: dict[str, Any]
    """Arguments of timm.create_model; empty for an MLP that needs no library."""
    text: tuple[int, ...]
    """Width, layers and heads of a BERT."""
    image_size: int = 64
    tokens: int = 32
    vocabulary: int = VOCABULARY


SIZES = {
    "small": ModelSize(
        "ViT-S/16 at 64 px + BERT-small (4 x 512) at 32 tokens",
        {"model_name": "vit_small_patch16_224"},
        (512, 4, 8),
    ),
    "mini": ModelSize(
        "ViT (4 x 192, patch 16) at 64 px + BERT-mini (2 x 256) at 32 tokens",
        {"model_name": "vit_tiny_patch16_224", "depth": 4},
        (256, 2, 4),
    ),
    "mlp": ModelSize("two MLPs, to try the script itself", {}, (), 16, 8, 512),
}


class Encoders(NamedTuple):
    """An image and a text encoder with features of the same width."""

    image: nn.Module
    text: nn.Module


class BagOfWords(nn.Module):
    """The text side of the "mlp" pair."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, 64)
        self.layers = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, FEATURES))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.layers(self.embedding(input_ids) * attention_mask.unsqueeze(-1)).mean(1)


def build_encoders(size: ModelSize, *, checkpointed: bool = False) -> Encoders:
    """Randomly initialised encoders; the same weights for the same seed.

    Args:
        checkpointed: whether every block (of an MLP: all of it) computes its activations again.
    """
    if not size.image:
        return _mlps(size, checkpointed)
    import timm

    image = timm.create_model(**size.image, img_size=size.image_size, num_classes=FEATURES)
    text = Bert(*size.text, FEATURES, mean=False)
    if checkpointed:
        image.set_grad_checkpointing()
        # Older versions of transformers know it by another name.
        enable = getattr(text.bert, "activation_checkpointing_enable", None)
        (enable or text.bert.gradient_checkpointing_enable)()
    return Encoders(image, text)


def make_inputs(size: ModelSize, batch_size: int) -> Inputs:
    """Random images (B, 3, H, W), and token ids and mask (B, L)."""
    images = torch.randn(batch_size, 3, size.image_size, size.image_size)
    ids = torch.randint(size.vocabulary, (batch_size, size.tokens))
    return images, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _mlps(size: ModelSize, checkpointed: bool) -> Encoders:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    layers = nn.Linear(3 * size.image_size**2, 256), nn.GELU(), nn.Linear(256, FEATURES)
    encoders = nn.Sequential(nn.Flatten(), *layers), BagOfWords(size.vocabulary)
    return Encoders(*(map(checkpoint_wrapper, encoders) if checkpointed else encoders))


# Ways to train


@dataclass(frozen=True)
class Method:
    """A way to take the gradients of a batch."""

    label: str
    """Its name in tables and pictures."""
    make: Callable[[Workload, int], Step]
    """From the encoders, the batch and c to a step that leaves gradients."""
    chunked: bool = True
    """Whether encoders see c pairs at once; all B if not."""
    checkpointed: bool = False
    """Whether the encoders are built with activation checkpointing."""
    encoder_passes: int = 4
    """Passes over the encoders; a backward counts as two."""
    loss_products: int = 6
    """Multiply-adds of one loss, forward and backward, over B x B x D, times two."""
    loss_every_chunk: bool = False
    """Whether the loss over the batch is computed for each chunk anew."""


METHODS = {
    "plain": Method("plain step", IMAGE_TEXT["plain step"], chunked=False, encoder_passes=3),
    "checkpointed": Method(
        "activation checkpointing", IMAGE_TEXT["plain step"], chunked=False, checkpointed=True
    ),
    "accumulated": Method(
        "open_clip's accumulation", IMAGE_TEXT["open_clip accumulation"], loss_every_chunk=True
    ),
    "published": Method("gradient cache as published", IMAGE_TEXT["gradient cache as published"]),
    "cached": Method("gradcache-clip", IMAGE_TEXT["gradcache-clip"], loss_products=8),
}


def step_flops(name: str, batch_size: int, chunk_size: int, pair_flops: float) -> float:
    """Floating-point operations of one step.

    Args:
        name: one of `METHODS`.
        pair_flops: of one pair going forward through both encoders.

    Example:
        >>> step_flops("plain", 2, 2, 100.0) == 3 * 2 * 100 + 6 * 2**2 * 512
        True
    """
    method = METHODS[name]
    losses = -(-batch_size // chunk_size) if method.loss_every_chunk else 1
    encoders = method.encoder_passes * pair_flops * batch_size
    return encoders + losses * method.loss_products * batch_size**2 * FEATURES


# Measurements, each in a fresh process


def measure_memory(arguments: dict[str, Any]) -> dict[str, Any]:
    """Growth of peak resident memory over model, optimizer, inputs and steps; time of a step."""
    warnings.simplefilter("ignore")
    size, method = SIZES[arguments["size"]], arguments["method"]
    _load_libraries(size, method)
    with PeakGrowth() as growth:
        steps = make_steps([method], size, arguments["batch_size"], arguments["chunk_size"])
        rounds = interleaved_times_ms(steps, arguments["steps"], arguments["seconds"])
    return {
        "peak_growth_bytes": growth.bytes,
        "step_ms": median(duration for (duration,) in rounds),
        "steps": len(rounds),
    }


def measure_pair(arguments: dict[str, Any]) -> dict[str, Any]:
    """Plain and cached steps that take turns in one process: the median ratio of their times."""
    warnings.simplefilter("ignore")
    shape = SIZES[arguments["size"]], arguments["batch_size"], arguments["chunk_size"]
    steps = make_steps(["plain", "cached"], *shape)
    rounds = interleaved_times_ms(steps, arguments["steps"], arguments["seconds"])
    return {"cached_over_plain_time": median(cached / plain for plain, cached in rounds)}


def make_steps(
    methods: Sequence[str], size: ModelSize, batch_size: int, chunk_size: int
) -> list[Callable[[], None]]:
    """One step of each method on the same model, inputs and optimizer: gradients, then AdamW."""
    torch.manual_seed(0)
    checkpointed = any(METHODS[name].checkpointed for name in methods)
    encoders = build_encoders(size, checkpointed=checkpointed)
    work = Workload(encoders, make_inputs(size, batch_size))
    optimizer = torch.optim.AdamW(nn.ModuleList(encoders).parameters(), lr=1e-4)
    # Two pairs make the optimizer's states, which then stand in memory from the first step on.
    few = Workload(encoders, tuple(rows_of(given, slice(2)) for given in work.inputs))
    _with_update(METHODS["plain"].make(few, 2), optimizer)()
    return [_with_update(METHODS[name].make(work, chunk_size), optimizer) for name in methods]


def _with_update(gradients: Step, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    def step() -> None:
        gradients()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _load_libraries(size: ModelSize, method: str) -> None:
    """Import what a step imports on its way; code is no part of a step's memory."""
    if size.image:
        import timm  # noqa: F401
        from transformers import BertConfig, BertModel  # noqa: F401
    for step in make_steps([method], SIZES["mlp"], 2, 1):
        step()


# Bytes and operations, counted on fake tensors: nothing is computed


class Counted(NamedTuple):
    """Bytes of live tensors in a step."""

    peak_bytes: int
    """All tensors, at their peak."""
    floor_bytes: int
    """Model, optimizer and batch, which every method holds."""


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
