"""Questions and answers of a plan. B: pairs of the whole batch."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from gradcache_clip.memory.cards import Card, parse_bytes

OPTIMIZER_STATES = {"adamw": 2, "adam": 2, "lion": 1, "momentum": 1, "sgd": 0}
"""fp32 numbers that an optimizer keeps for each parameter that it trains."""

PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
"""fp32 weights throughout; tf32 changes the speed alone, bf16 and fp16 mean autocast."""


@dataclass(frozen=True)
class PlanOptions:
    """How the step is taken; checked when built.

    Raises:
        ValueError: a value out of range; the error names it.
    """

    batch_size: int = 32768
    """Pairs in a step, of all processes together."""
    chunk_size: int = 64
    """Pairs that go through a tower at once."""
    precision: str = "bf16"
    """One of `PRECISIONS`."""
    optimizer: str = "adamw"
    """One of `OPTIMIZER_STATES`."""
    world_size: int = 1
    """Processes, each with a card of its own."""
    zero: int = 0
    """ZeRO stage: from 1 on states, from 2 on gradients, from 3 on parameters are divided."""
    image_trainable: float = 1.0
    """Share of the image model's parameters that is trained, counted from its end."""
    text_trainable: float = 1.0
    """The same of the text model; projections are trained in any case."""
    checkpointing: bool = False
    """Whether the towers compute the activations of their blocks again."""
    memory_budget: int | str | None = None
    """For graphs kept from the embed: bytes, an amount such as "8GB", or "auto"."""
    ema: bool = False
    """Whether an average of the weights is kept."""
    inputs: str = "device"
    """Where the batch waits: on the "device", as in training, or on the "host"."""
    context_bytes: int = 512 * 2**20
    """Memory of the card that is not the allocator's: CUDA context, libraries' code, driver."""
    image_size: int | None = None
    """Pixels of an edge; the model's own where None. Of named models, like the next two."""
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
        _check("inputs", self.inputs, "device or host", self.inputs in ("device", "host"))
        _check("context_bytes", self.context_bytes, "0 or more", self.context_bytes >= 0)
        if self.batch_size % self.world_size:
            _check(
                "batch_size", self.batch_size, f"a multiple of world_size={self.world_size}", False
            )

    @property
    def rows(self) -> int:
        """Pairs that one process embeds."""
        return self.batch_size // self.world_size

    @property
    def budget_bytes(self) -> int | None:
        """The memory budget as bytes; None for "auto" and where there is none."""
        if self.memory_budget in (None, "auto"):
            return None
        if isinstance(self.memory_budget, str):
            return parse_bytes(self.memory_budget, "memory_budget")
        return self.memory_budget


@dataclass(frozen=True)
class Method:
    """A way to train, and the largest batch with which it fits."""

    name: str
    largest_batch: int | None
    """Pairs of all processes together; 0: not even the smallest fits; None: cannot be planned."""
    at_least: bool = False
    """Whether the search ended here, and more might fit."""
    note: str = ""
    """Why it cannot be planned."""
    curve: tuple[tuple[int, int], ...] = ()
    """(batch, bytes of tensors on one card) pairs."""


@dataclass(frozen=True)
class Plan:
    """Needs of a training step with gradient caching on one card; all sizes in bytes."""

    image: str
    text: str
    card: Card
    options: PlanOptions
    image_parameters: int
    text_parameters: int
    trained_parameters: int
    parameter_bytes: int
    """Parameters and buffers that live on the card."""
    gradient_bytes: int
    optimizer_bytes: int
    """States of the optimizer, and the average of the weights."""
    input_bytes: int
    feature_bytes: int
    """Features of the batch and their gradients."""
    loss_bytes: int
    """Workspace of the loss: what it takes beyond the features at its peak."""
    image_graph_bytes: int
    """Bytes that one chunk's graph keeps for its backward."""
    text_graph_bytes: int
    kept_chunks: tuple[int, int]
    """Further chunks of each tower whose graph is kept, so that they need no replay."""
    embed_peak_bytes: int
    """The most tensors of the embed, the loss, the replay, each with all that lives meanwhile."""
    loss_peak_bytes: int
    replay_peak_bytes: int
    peak_phase: str
    """The part of the step in which most is needed."""
    peak_bytes: int
    """The most tensors at once, rounded as the allocator rounds: `torch.cuda.max_memory_allocated`,
    but for what a library takes inside of one kernel."""
    kinds_by_phase: dict[str, dict[str, int]]
    """Parts of the peaks of "embed", "loss" and "replay"."""
    allocator_bytes: int
    """Segments beyond them that the allocator holds: rounding and fragmentation."""
    total_bytes: int
    """Everything, with the context: what the card must have."""
    fits: bool
    largest_chunk: int
    """Chunk with which this batch still fits; 0 if none does."""
    methods: tuple[Method, ...]
    flops: float
    """Operations of matrix products, convolutions and attention in one step on one card."""
    least_step_ms: float | None
    """At the card's full matrix rate: no step is faster. None where no data sheet gives it."""
    recomputed_share: float
    """Share of the flops that a plain step would not need."""
    seconds: float
    """That the plan took."""

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, texts, lists and mappings, for JSON."""
        return asdict(self)


def _positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _check(name: str, value: Any, expected: str, valid: bool) -> None:
    number = not isinstance(value, float) or math.isfinite(value)
    if not (valid and number):
        flag = name.replace("_", "-")
        raise ValueError(f"{name}: expected {expected}, got {value!r}; change --{flag}")
