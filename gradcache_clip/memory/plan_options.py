"""Options and result of a plan. B: pairs of the whole batch."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from gradcache_clip.memory.cards import Card, parse_bytes

OPTIMIZER_STATES = {"adamw": 2, "adam": 2, "lion": 1, "momentum": 1, "sgd": 0}
"""fp32 states that an optimizer keeps per trained parameter."""

PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
"""Weights are fp32 throughout; tf32 affects speed only, bf16 and fp16 mean autocast."""


@dataclass(frozen=True)
class PlanOptions:
    """Options of the step to plan, validated when built.

    Raises:
        ValueError: a value out of range; the error names it.
    """

    batch_size: int = 32768
    """Pairs per step, over all processes."""
    chunk_size: int = 64
    """Pairs that go through a tower at once."""
    precision: str = "bf16"
    """One of `PRECISIONS`."""
    optimizer: str = "adamw"
    """One of `OPTIMIZER_STATES`."""
    world_size: int = 1
    """Number of processes, one per card."""
    zero: int = 0
    """ZeRO stage: 1 shards optimizer states, 2 also gradients, 3 also parameters."""
    image_trainable: float = 1.0
    """Share of the image model's parameters to train, counted from its end."""
    text_trainable: float = 1.0
    """The same for the text model; projections are always trained."""
    checkpointing: bool = False
    """Activation checkpointing in the blocks of both towers."""
    memory_budget: int | str | None = None
    """Memory for graphs kept from the embed: bytes, an amount such as "8GB", or "auto"."""
    ema: bool = False
    """Keep a moving average of the weights."""
    batch_device: str = "device"
    """Where the batch is stored: on the "device" or on the "host"."""
    context_bytes: int = 512 * 2**20
    """Memory used outside of the allocator: CUDA context, library code, driver."""
    image_size: int | None = None
    """Height and width in pixels; the model's own when None. This and the next two apply to models
    given by name; a configuration has its own."""
    context_length: int = 77
    """Tokens of a text."""
    feature_dim: int = 512
    """Width D of the features."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "chunk_size", "world_size", "context_length", "feature_dim"):
            _check(name, getattr(self, name), "a positive integer", _positive(getattr(self, name)))
        _check("batch_size", self.batch_size, "at least 2", self.batch_size >= 2)
        one_of = " or ".join(PRECISIONS)
        _check("precision", self.precision, one_of, self.precision in PRECISIONS)
        known = " or ".join(OPTIMIZER_STATES)
        _check("optimizer", self.optimizer, known, self.optimizer in OPTIMIZER_STATES)
        _check("zero", self.zero, "0, 1, 2 or 3", self.zero in (0, 1, 2, 3))
        for name in ("image_trainable", "text_trainable"):
            share = getattr(self, name)
            _check(name, share, "a share from 0 to 1", 0 <= share <= 1)
        place = self.batch_device
        _check("batch_device", place, "device or host", place in ("device", "host"))
        _check("context_bytes", self.context_bytes, "0 or more", self.context_bytes >= 0)
        if self.batch_size % self.world_size:
            _check(
                "batch_size", self.batch_size, f"a multiple of world_size={self.world_size}", False
            )

    @property
    def rows(self) -> int:
        """Pairs per process."""
        return self.batch_size // self.world_size

    @property
    def budget_bytes(self) -> int | None:
        """The memory budget in bytes; None for "auto" and without a budget."""
        if self.memory_budget in (None, "auto"):
            return None
        if isinstance(self.memory_budget, str):
            return parse_bytes(self.memory_budget, "memory_budget")
        return self.memory_budget


@dataclass(frozen=True)
class Method:
    """A way to train, and the largest batch that fits."""

    name: str
    largest_batch: int | None
    """Pairs over all processes; 0 if not even the smallest fits, None if it cannot be planned."""
    at_least: bool = False
    """Whether the search stopped at its limit, so that more may fit."""
    note: str = ""
    """Why it cannot be planned."""
    curve: tuple[tuple[int, int], ...] = ()
    """(batch, bytes of tensors on one card) pairs."""


@dataclass(frozen=True)
class Plan:
    """Requirements of a training step with gradient caching on one card. Sizes are in bytes."""

    image: str
    text: str
    card: Card
    options: PlanOptions
    image_parameters: int
    text_parameters: int
    trained_parameters: int
    parameter_bytes: int
    """Parameters and buffers on the card."""
    gradient_bytes: int
    optimizer_bytes: int
    """Optimizer states, and the moving average of the weights."""
    input_bytes: int
    feature_bytes: int
    """Features of the batch and their gradients."""
    loss_bytes: int
    """Workspace of the loss: memory beyond the features at its peak."""
    image_graph_bytes: int
    """Graph of one chunk: activations kept for its backward."""
    text_graph_bytes: int
    kept_chunks: tuple[int, int]
    """Number of further chunks of each tower whose graphs are kept, so that they need no replay."""
    embed_peak_bytes: int
    """Peak of the embed (below: of the loss, of the replay), with all tensors that are alive."""
    loss_peak_bytes: int
    replay_peak_bytes: int
    peak_phase: str
    """The phase with the largest peak."""
    peak_bytes: int
    """Peak of all tensors, rounded like the allocator: `torch.cuda.max_memory_allocated`, except
    for memory that libraries use inside one kernel."""
    kinds_by_phase: dict[str, dict[str, int]]
    """Composition of the peaks of "embed", "loss" and "replay"."""
    allocator_bytes: int
    """Segments of the allocator beyond the peak: rounding and fragmentation."""
    total_bytes: int
    """Total with the CUDA context, which the card must have."""
    fits: bool
    largest_chunk: int
    """Largest chunk with which this batch fits; 0 if none does."""
    methods: tuple[Method, ...]
    flops: float
    """Flops of matrix products, convolutions and attention per step on one card."""
    least_step_ms: float | None
    """Lower bound of the step time, at the card's full matrix rate; None if that is unknown."""
    recomputed_share: float
    """Share of the flops that is spent on replays."""
    seconds: float
    """Time that planning took."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, strings, lists and dicts, for JSON."""
        return asdict(self)


def _positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _check(name: str, value: Any, expected: str, valid: bool) -> None:
    number = not isinstance(value, float) or math.isfinite(value)
    if not (valid and number):
        flag = name.replace("_", "-")
        raise ValueError(f"{name}: expected {expected}, got {value!r}; change --{flag}")
