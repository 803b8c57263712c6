"""Sections of a configuration that every program has, validated when they are built."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from pydantic import Field, field_validator, model_validator

from gradcache_clip.train.config_errors import ConfigError, checked
from gradcache_clip.train.config_section import Section, changeable, expect

Self = TypeVar("Self", bound="Section")


class DataConfig(Section):
    """Where samples come from and how they are read."""

    # A resumed run may find its data elsewhere: the loader's state records names and sizes only.
    train: str = changeable("data/train", min_length=1)
    """Training set: a folder, file, glob or brace pattern (`shards/{000..099}.tar`)."""

    validation: str = changeable("")
    """Validation set, in the same form; empty disables evaluation while training."""

    workers: int = changeable(0, ge=0, le=1024)
    """Worker processes that read and decode, per training process; 0 reads in that process."""

    max_broken_share: float = changeable(0.05, ge=0, le=1)
    """Share of samples that may be unreadable; beyond it the run stops."""


class OptimizerConfig(Section):
    """AdamW with linear warm-up and cosine decay."""

    learning_rate: float = Field(1e-3, gt=0)
    """Peak learning rate."""

    weight_decay: float = Field(0.2, ge=0)
    """Weight decay of matrices; norms, biases, embeddings and the logit scale have none."""

    beta1: float = Field(0.9, ge=0, lt=1)
    """Decay rate of the mean of gradients."""

    beta2: float = Field(0.98, ge=0, lt=1)
    """Decay rate of the mean of squared gradients."""

    eps: float = Field(1e-6, gt=0)
    """Added to the denominator."""

    warmup_steps: int = Field(100, ge=0)
    """Steps over which the learning rate rises linearly from zero; fewer than `train.steps`."""

    max_grad_norm: float = Field(0.0, ge=0)
    """Clip gradients to this global norm; 0 disables clipping."""


class TrainConfig(Section):
    """The loop."""

    output: str = changeable("runs/clip", min_length=1)
    """Folder of the run; an existing run is resumed with `train.resume=true`, never overwritten."""

    resume: bool = changeable(False)
    """Continue from the newest good checkpoint in `output`."""

    batch_size: int = Field(1024, ge=2, le=2**31)
    """Samples per step, over all processes; each competes with every other in the loss."""

    chunk_size: int = Field(64, ge=1)
    """Samples per pass through an encoder; determines the memory of a step."""

    memory_budget_gib: float = changeable(0.0, ge=0)
    """Memory in GiB for graphs that are kept instead of replayed; 0 keeps that of one chunk."""

    batch_device: Literal["device", "host"] = changeable("device")
    """Where the batch is stored: on the `device`, or on the `host`, where each chunk is copied one
    ahead of use, so that device memory does not grow with the images of a batch."""

    exchange: Literal["gather", "ring"] = changeable("gather")
    """How processes exchange features: `gather` all at once, or pass them round a `ring`."""

    grad_cache: bool = True
    """Cache gradients, so that all samples of a batch compete. `false` accumulates plainly, with a
    loss per chunk; for comparison."""

    steps: int = changeable(1000, ge=1, le=2**53)
    """Number of optimizer steps."""

    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """`fp32`, or autocast to `bf16` or `fp16` (with gradient scaling)."""

    device: str = changeable("auto", min_length=1)
    """`cpu`, `cuda`, `cuda:1`; `auto` takes an accelerator if there is one."""

    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of weights, data order and dropout; rank r draws dropout masks with `seed + r`."""

    log_every: int = changeable(1, ge=1)
    """Steps between log rows."""

    evaluate_every: int = changeable(0, ge=0)
    """Steps between evaluations on the validation set; 0: at the end only."""

    checkpoint_every: int = changeable(100, ge=0)
    """Steps between checkpoints; 0: at the end only."""

    keep_checkpoints: int = changeable(2, ge=1)
    """Number of newest checkpoints to keep."""

    ema_decay: float = Field(0.0, ge=0, lt=1)
    """Decay of an exponential moving average of the weights, used to evaluate; 0: off."""

    compile: bool = changeable(False)
    """Compile the encoders with torch.compile."""

    impl: Literal["auto", "reference", "tiled", "triton"] = "auto"
    """Implementation of the loss."""

    @model_validator(mode="after")
    def _check_chunks(self: Self) -> Self:
        """Without gradient caching, refuse chunks of one sample, which have no negatives."""
        assert isinstance(self, TrainConfig)
        if self.grad_cache:
            return self
        expect(self, "train.batch_device", "device", "train.grad_cache=false")
        if self.chunk_size == 1:
            raise ConfigError(
                "train.chunk_size: expected at least 2 with train.grad_cache=false, got 1; "
                "a chunk of one sample has no negatives"
            )
        if self.batch_size % self.chunk_size == 1:
            raise ConfigError(
                f"train.batch_size: expected no last chunk of one sample, which has no negatives, "
                f"with train.grad_cache=false, got {self.batch_size} in chunks of "
                f"{self.chunk_size}; use train.batch_size={self.batch_size - 1}"
            )
        return self


class TextTrainConfig(TrainConfig):
    """The loop, for samples with texts."""

    sort_by_length: bool = False
    """Put texts of similar length into one chunk, and trim each chunk to its longest."""

    chunk_tokens: int = Field(0, ge=0)
    """With `sort_by_length`: tokens per pass through an encoder, padding included; 0: `chunk_size`
    texts, whatever their length."""

    @model_validator(mode="after")
    def _check_tokens(self) -> TextTrainConfig:
        if self.chunk_tokens:
            expect(self, "train.sort_by_length", True, "train.chunk_tokens")
            expect(self, "train.grad_cache", True, "train.chunk_tokens")
        return self


class EvaluationConfig(Section):
    """Evaluation on the validation set."""

    batch_size: int = changeable(256, ge=1, le=2**31)
    """Samples embedded at once; affects memory, not results."""

    gallery: int = changeable(6, ge=1)
    """Queries shown in the gallery picture."""

    at_start: bool = changeable(False)
    """Also evaluate before the first step, to measure pretrained weights."""


class RetrievalConfig(EvaluationConfig):
    """Retrieval on the validation set."""

    recall_at: list[int] = changeable([1, 5, 10])
    """The k of recall@k."""

    @field_validator("recall_at")
    @classmethod
    def _check_depths(cls, depths: list[int]) -> list[int]:
        if not depths or min(depths) < 1:
            raise ConfigError(
                f"evaluation.recall_at: expected positive integers, got {depths}; use [1, 5, 10]"
            )
        return depths


class DistributedConfig(Section):
    """Several processes, started by `gradcache-clip launch`, torchrun or deepspeed."""

    strategy: Literal["ddp", "fsdp", "deepspeed"] = changeable("ddp")
    """How parameters are stored and gradients reduced."""

    zero: int = changeable(-1, ge=-1, le=3)
    """ZeRO stage of DeepSpeed, 0 to 3; -1 takes that of `deepspeed_config`, or 2 without one."""

    deepspeed_config: str = changeable("")
    """Your own DeepSpeed configuration (JSON), used unchanged; empty generates one."""

    timeout_s: int = changeable(600, ge=1, le=2**31)
    """Seconds that a process waits for the others, or for its workers, before it fails."""


class Config(Section):
    """A configuration; each program declares the contents of its sections."""

    program: str
    """`pairs` of images and captions, two `views` of each image, or `texts`."""

    data: DataConfig = DataConfig()
    """Samples and how they are read."""

    model: Any = None
    """The encoder."""

    loss: Any = None
    """The training objective."""

    optimizer: OptimizerConfig = OptimizerConfig()
    """The optimizer and its schedule."""

    train: TrainConfig = TrainConfig()
    """The loop."""

    evaluation: EvaluationConfig = EvaluationConfig()
    """Evaluation on held-out samples."""

    distributed: DistributedConfig = DistributedConfig()
    """Several processes."""

    @model_validator(mode="after")
    def _check_run(self) -> Config:
        steps, warmup = self.train.steps, self.optimizer.warmup_steps
        if warmup >= steps:
            raise ConfigError(
                f"optimizer.warmup_steps: expected 0 to less than the {steps} steps of the run, "
                f"got {warmup}; use optimizer.warmup_steps={steps // 10} or raise train.steps"
            )
        if self.evaluation.at_start and not self.data.validation:
            raise ConfigError(
                "data.validation: expected something to evaluate on with evaluation.at_start, got "
                "''; change it in the config or with data.validation=PATH"
            )
        if self.distributed.strategy == "deepspeed":
            # ZeRO-3 may offload parameters, so their device does not say where chunks must go.
            expect(self, "train.batch_device", "device", "distributed.strategy=deepspeed")
            # The logit scale has an optimizer of its own there, which needs a parameter to step.
            if self.loss is not None:
                expect(self, "loss.learn_logit_scale", True, "distributed.strategy=deepspeed")
        if isinstance(self.train, TextTrainConfig) and self.distributed.strategy != "ddp":
            # Every forward is collective there, and ranks may get different numbers of chunks.
            strategy = f"distributed.strategy={self.distributed.strategy}"
            expect(self, "train.chunk_tokens", 0, strategy)
        return self

    def updated(self: Self, changes: Mapping[str, Any]) -> Self:
        """Return a validated copy with other values.

        Example:
            >>> class Plain(Config):
            ...     program: Literal["plain"] = "plain"
            >>> Plain().updated({"train.steps": 500}).train.steps
            500
        """
        sections = self.model_dump()
        for key, value in changes.items():
            section, name = key.split(".")
            sections[section][name] = value
        return checked(type(self), sections)
