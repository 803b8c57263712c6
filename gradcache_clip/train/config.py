"""The configuration of a run: nested dataclasses, checked when built."""

from __future__ import annotations

from dataclasses import dataclass, field

from gradcache_clip.train.config_checks import (
    ConfigError,
    above,
    at_least,
    check,
    in_range,
    not_empty,
    one_of,
)
from gradcache_clip.train.config_data import SMALLEST_VOCABULARY, DataConfig
from gradcache_clip.train.config_model import (
    LossConfig,
    ModelConfig,
    check_frozen_features,
    check_tokens,
    check_widths,
)
from gradcache_clip.train.config_views import AugmentConfig, check_contrast

__all__ = [
    "SMALLEST_VOCABULARY",
    "AugmentConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "DistributedConfig",
    "EvaluationConfig",
    "LossConfig",
    "ModelConfig",
    "OptimizerConfig",
    "TrainConfig",
]


@dataclass
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay."""

    learning_rate: float = 1e-3
    """Peak learning rate."""

    weight_decay: float = 0.2
    """Decay of matrices; norms, biases, embeddings and the logit scale have none."""

    beta1: float = 0.9
    """Decay of the gradient's mean."""

    beta2: float = 0.98
    """Decay of the gradient's square."""

    eps: float = 1e-6
    """Added to the denominator."""

    warmup_steps: int = 100
    """Steps over which the learning rate rises linearly from zero; fewer than `train.steps`."""

    max_grad_norm: float = 0.0
    """Gradients are scaled down to this global norm; 0 leaves them."""

    def __post_init__(self) -> None:
        at_least(0, "optimizer", self, "weight_decay", "warmup_steps", "max_grad_norm")
        above(0, "optimizer", self, "learning_rate", "eps")
        in_range("[0, 1)", "optimizer", self, "beta1", "beta2")


@dataclass
class TrainConfig:
    """The loop."""

    output: str = "runs/clip"
    """Folder of the run; an existing run is resumed with `train.resume=true`, never overwritten."""

    resume: bool = False
    """Go on from the newest good checkpoint in `output`."""

    batch_size: int = 1024
    """Pairs in a step, of all processes together; every pair meets every other in the loss."""

    chunk_size: int = 64
    """Pairs that go through an encoder at once; sets the memory of a step."""

    memory_budget_gib: float = 0.0
    """Memory for graphs that are kept instead of replayed; 0: that of one chunk."""

    sort_by_length: bool = False
    """Chunks of captions of similar length, each trimmed to its longest."""

    chunk_tokens: int = 0
    """Tokens of texts that go through an encoder at once, padding included, with `sort_by_length`;
    0: `chunk_size` texts, however long."""

    inputs: str = "device"
    """Where a batch waits: on the `device`, or on the `host`, from which chunks are copied one
    ahead of use, so that memory does not grow with its images."""

    exchange: str = "gather"
    """How features of other processes arrive: `gather`, all at once, or `ring`, one by one."""

    negatives: str = "batch"
    """`batch`: gradient caching, all pairs compete. `chunk`: plain accumulation, for comparison."""

    steps: int = 1000
    """Optimizer steps."""

    precision: str = "fp32"
    """`fp32`, or autocast to `bf16` or `fp16` (with gradient scaling)."""

    device: str = "auto"
    """`auto` takes an accelerator where there is one; else `cpu`, `cuda`, `cuda:1`."""

    seed: int = 0
    """Of weights, data order and dropout; process r draws its dropout with `seed + r`."""

    log_every: int = 1
    """Steps between two log rows."""

    evaluate_every: int = 0
    """Steps between two evaluations on the validation pairs; 0: at the end only."""

    checkpoint_every: int = 100
    """Steps between two checkpoints; 0: at the end only."""

    keep_checkpoints: int = 2
    """Checkpoints that are kept, newest first."""

    ema_decay: float = 0.0
    """Decay of an exponential moving average of the weights, used to evaluate; 0: off."""

    compile: bool = False
    """Run the encoders through torch.compile."""

    impl: str = "auto"
    """Implementation of the loss: `auto`, `reference`, `tiled`, `triton`."""

    def __post_init__(self) -> None:
        not_empty("train", self, "output", "device")
        at_least(2, "train", self, "batch_size")
        at_least(1, "train", self, "chunk_size", "steps", "log_every", "keep_checkpoints")
        at_least(0, "train", self, "evaluate_every", "checkpoint_every", "chunk_tokens")
        if self.chunk_tokens:
            with_it = "with train.chunk_tokens"
            check(self.sort_by_length, "train", self, "sort_by_length", f"true {with_it}")
            check(self.negatives == "batch", "train", self, "negatives", f"batch {with_it}")
        check(0 <= self.seed < 2**63, "train", self, "seed", "a number from 0 to 2**63 - 1")
        one_of(("batch", "chunk"), "train", self, "negatives")
        one_of(("fp32", "bf16", "fp16"), "train", self, "precision")
        one_of(("auto", "reference", "tiled", "triton"), "train", self, "impl")
        one_of(("gather", "ring"), "train", self, "exchange")
        one_of(("device", "host"), "train", self, "inputs")
        at_least(0, "train", self, "memory_budget_gib")
        in_range("[0, 1)", "train", self, "ema_decay")
        if self.negatives == "chunk":
            self._check_chunks()

    def _check_chunks(self) -> None:
        """With `negatives: chunk`, a chunk of one pair has nothing to learn from."""
        check(self.inputs == "device", "train", self, "inputs", "device with train.negatives=chunk")
        if self.chunk_size == 1:
            raise ConfigError(
                "train.chunk_size: expected at least 2 with train.negatives=chunk, got 1; "
                "a chunk of one pair has no negatives"
            )
        if self.batch_size % self.chunk_size == 1:
            raise ConfigError(
                f"train.batch_size: expected no last chunk of one pair, which has no negatives, "
                f"with train.negatives=chunk, got {self.batch_size} in chunks of "
                f"{self.chunk_size}; use train.batch_size={self.batch_size - 1}"
            )


@dataclass
class EvaluationConfig:
    """Retrieval on the validation pairs."""

    batch_size: int = 256
    """Pairs embedded at once; changes memory, not results."""

    recall_at: list[int] = field(default_factory=lambda: [1, 5, 10])
    """The k of recall@k."""

    gallery: int = 6
    """Queries shown in the gallery picture in each direction."""

    folds: int = 1
    """Consecutive parts of the validation images over which recall is averaged; 5 for COCO's 1K."""

    at_start: bool = False
    """Also before the first step: what pretrained weights bring along."""

    neighbours: int = 20
    """Training images that vote on the label of a held-out one, where `data.views` is 2."""

    def __post_init__(self) -> None:
        at_least(1, "evaluation", self, "batch_size", "gallery", "folds", "neighbours")
        if not self.recall_at or min(self.recall_at) < 1:
            raise ConfigError(
                f"evaluation.recall_at: expected positive integers, got {self.recall_at}; "
                "use [1, 5, 10]"
            )


@dataclass
class DistributedConfig:
    """Several processes: `gradcache-clip launch`, torchrun or deepspeed start them."""

    engine: str = "ddp"
    """What holds parameters and reduces gradients: `ddp`, `fsdp` or `deepspeed`."""

    zero: int = -1
    """ZeRO stage of DeepSpeed, 0 to 3; -1: that of `deepspeed_config`, or 2 without one."""

    deepspeed_config: str = ""
    """A DeepSpeed configuration of your own (JSON), used as it is; empty: one is made."""

    timeout_s: int = 600
    """Longest that a process waits for the others before it gives up."""

    def __post_init__(self) -> None:
        one_of(("ddp", "fsdp", "deepspeed"), "distributed", self, "engine")
        check(-1 <= self.zero <= 3, "distributed", self, "zero", "0 to 3, or -1")
        at_least(1, "distributed", self, "timeout_s")


@dataclass
class Config:
    """Everything that defines a run; saved beside its results."""

    data: DataConfig = field(default_factory=DataConfig)
    """Shards and how they are read."""

    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """How two views of an image differ."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The towers."""

    loss: LossConfig = field(default_factory=LossConfig)
    """What is minimised."""

    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The optimizer and its schedule."""

    train: TrainConfig = field(default_factory=TrainConfig)
    """The loop."""

    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Retrieval on held-out pairs."""

    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    """Several processes."""

    def __post_init__(self) -> None:
        check_widths(self.model, self.loss)
        check_tokens(self.model, self.loss)
        check_contrast(self)
        check_frozen_features(self)
        # Whose parameters may lie elsewhere than they are used, as ZeRO-3 offloads them.
        there = self.distributed.engine != "deepspeed" or self.train.inputs == "device"
        check(there, "train", self.train, "inputs", "device with distributed.engine=deepspeed")
        looks = self.data.validation or not self.evaluation.at_start
        expected = "something to evaluate on with evaluation.at_start"
        check(bool(looks), "data", self.data, "validation", expected)
        # A forward waits for all ranks there, whose tokens need not make as many chunks.
        alike = self.distributed.engine == "ddp" or not self.train.chunk_tokens
        check(alike, "train", self.train, "chunk_tokens", "0 without distributed.engine=ddp")
        steps, warmup = self.train.steps, self.optimizer.warmup_steps
        if warmup >= steps:
            raise ConfigError(
                f"optimizer.warmup_steps: expected 0 to less than the {steps} steps of the run, "
                f"got {warmup}; use optimizer.warmup_steps={steps // 10} or raise train.steps"
            )
        if self.model.text_pretrained and self.data.tokenizer == "train":
            raise ConfigError(
                "data.tokenizer: expected the one that the weights of model.text were trained with "
                "(model.text_pretrained=true), got 'train', which learns another; use "
                f"data.tokenizer={self.model.text}"
            )
