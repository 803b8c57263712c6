"""The state of a training run: built from its program, saved and restored as a whole."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gradcache_clip.train.checkpoint import (
    Checkpoint,
    CheckpointError,
    capture_rng,
    load_checkpoint,
    load_latest,
    restore_rng,
    save_checkpoint,
    seed_rng,
)
from gradcache_clip.train.checkpoint.files import sha256_of
from gradcache_clip.train.config_errors import ConfigError
from gradcache_clip.train.data import join_states
from gradcache_clip.train.device import choose_device
from gradcache_clip.train.ema import moving_average
from gradcache_clip.train.engine import Engine, build_engine
from gradcache_clip.train.peers import Peers
from gradcache_clip.train.probe import check_towers
from gradcache_clip.train.programs.program import Program
from gradcache_clip.train.run_folder import RunFolder, fixed_settings
from gradcache_clip.train.sources.splits import track
from gradcache_clip.train.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

if TYPE_CHECKING:
    from timm.utils import ModelEmaV3


# What torch, NumPy and our own checks raise for values that do not fit.
_UNFIT = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


@contextmanager
def _restoring(checkpoint: Checkpoint) -> Iterator[None]:
    try:
        yield
    except _UNFIT as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise CheckpointError(
            f"{checkpoint.path}: expected the state of this run, got another or an altered one "
            f"({reason}); restore the folder from a backup, or remove this checkpoint to go on "
            "from the one before it"
        ) from error


@dataclass
class TrainState:
    """Everything that training changes, in one process of a run."""

    run: RunFolder
    peers: Peers
    encoder: nn.Module
    engine: Engine
    """Steps encoder and loss."""
    loss: nn.Module
    ema: ModelEmaV3 | None
    loader: Any
    """Endless batches, beginning with that of the next step."""
    on_save: Callable[[], None] = lambda: None
    """Called with every checkpoint, to write files that live outside of it."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings that a resumed run must have, too."""
    tokenizer_digest: str = ""
    """SHA-256 of the tokenizer's file as this run wrote or found it."""
    step: int = 0
    """Optimizer steps taken."""
    saved_step: int = 0

    def batches(self) -> Generator[Any, None, None]:
        """Yield training batches from the next step on; closing it ends the worker processes."""
        yield from self.loader

    @property
    def evaluated(self) -> nn.Module:
        """The encoder to evaluate: the moving average if there is one."""
        return self.ema.module if self.ema else self.engine.evaluated

    def save(self, keep: int) -> None:
        """Write a checkpoint, called by all processes together; keep the newest `keep`.

        Raises:
            ValueError: a weight is NaN or infinite; earlier checkpoints are untouched.
            OSError: the disk is full; earlier checkpoints are untouched.
        """
        self.peers.set_phase(f"saving after step {self.step}")
        weights, state = self.engine.weights(), self.engine.state()
        loaders = self.peers.gather_to_rank0(self.loader.state_dict())
        generators = self.peers.gather_to_rank0(capture_rng())
        self.on_save()
        if self.peers.is_first:
            self.run.check_is_there()
            state = {**state, "loader": join_states(loaders), "rng": generators}
            state["run"] = {"settings": self.settings, "tokenizer": self.tokenizer_digest}
            modules = self._modules(weights)
            save_checkpoint(
                self.run.checkpoints, self.step, modules=modules, state=state, keep=keep
            )
        self.saved_step = self.step

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue exactly from a checkpoint, whatever number of processes wrote it.

        Raises:
            CheckpointError: it is not of this run, or was altered.
        """
        with _restoring(checkpoint):
            self._restore(checkpoint)

    def _restore(self, checkpoint: Checkpoint) -> None:
        _check_run(checkpoint, self.run, self.settings if self.peers.is_first else {})
        self.step = self.saved_step = checkpoint.step
        self.engine.load_weights(checkpoint.modules["encoder"])
        self.loss.load_state_dict(checkpoint.modules["loss"])
        if checkpoint.step and not checkpoint.state["optimizer"]:
            raise ValueError("optimizer: expected moments of every parameter, got none")
        self.engine.load_state(checkpoint.state)
        self.loader.load_state_dict(checkpoint.state["loader"])
        if self.ema is not None:
            self.ema.module.load_state_dict(checkpoint.modules["ema"])
        generators = checkpoint.state["rng"]
        if not (isinstance(generators, list) and generators):
            raise ValueError(f"rng: expected the generators of each rank, got {generators!r}")
        # A rank that did not exist before keeps the generators that `start` seeded.
        if self.peers.rank < len(generators):
            restore_rng(generators[self.peers.rank])

    def _modules(self, weights: dict[str, Tensor]) -> dict[str, Any]:
        modules: dict[str, Any] = {"encoder": weights, "loss": self.loss.state_dict()}
        self._check_finite({**weights, **modules["loss"]})
        if self.ema is not None:
            modules["ema"] = self.ema.module.state_dict()
        return modules

    def _check_finite(self, weights: dict[str, Tensor]) -> None:
        finite = torch.stack([weight.isfinite().all() for weight in weights.values()])
        if finite.all():
            return
        name = [*weights][int((~finite).nonzero()[0])]
        raise ValueError(
            f"weights: expected finite numbers after step {self.step}, got NaN or infinity in "
            f"{name}; nothing was saved, and earlier checkpoints are untouched. Lower "
            "optimizer.learning_rate or set optimizer.max_grad_norm"
        )


def tokenizer_digest(run: RunFolder) -> str:
    """Return the SHA-256 of a run's tokenizer, empty where it has none."""
    return sha256_of(run.tokenizer) if run.tokenizer.is_file() else ""


def _check_run(checkpoint: Checkpoint, run: RunFolder, settings: Mapping[str, Any]) -> None:
    """Raise ValueError if a checkpoint was trained with other settings or another tokenizer."""
    saved = checkpoint.state.get("run", {})
    for key, got in settings.items():
        expected = saved.get("settings", {}).get(key, got)
        if expected != got:
            raise ValueError(f"config.yaml: expected {key}={expected!r}, got {got!r}")
    if saved.get("tokenizer", "") not in ("", tokenizer_digest(run)):
        raise ValueError("tokenizer.json: expected the one of this run, got another one")


@contextmanager
def save_on_exit(state: TrainState, keep: int) -> Iterator[None]:
    """Save on leaving the context, also after an error.

    After an error, a resumed run continues after the batch that failed. With several processes it
    continues from the last checkpoint, because a failed process cannot join in saving.
    """
    try:
        yield
    except Exception:
        if state.step > state.saved_step and state.peers.world_size == 1:
            # If the weights themselves are NaN, saving raises; raise the original error instead.
            with suppress(ValueError):
                state.save(keep)
        raise
    if state.step > state.saved_step:
        state.save(keep)


def start(
    program: Program[Any], run: RunFolder, peers: Peers
) -> tuple[TrainState, Tokenizer | None]:
    """Build the state of a run in this process; restore its newest good checkpoint on resume.

    Raises:
        ConfigError, ValueError, OSError: the run cannot start here; nothing was written.
    """
    config = program.config
    checkpoint = _checkpoint(run, peers) if config.train.resume else None
    if checkpoint is not None:
        # It has all weights: none that the configuration names are loaded.
        program.config = run.trained(config)
    seed_rng(config.train.seed)
    device = choose_device(config.train.device)
    if config.data.validation:
        program.check_data()
    loader = program.loader(peers)
    loader.timeout_s = config.distributed.timeout_s
    tokenizer = _tokenizer(program, run, peers)
    encoder = program.encoder(tokenizer).to(device)
    longest = tokenizer(["a text", "another"], pad_to_context=True) if tokenizer else None
    check_towers(encoder, image_size=program.image_size, tokens=longest)
    loss = program.loss().to(device)
    decay = config.train.ema_decay
    # Before the engine, which may cast or shard the weights.
    ema = moving_average(encoder, decay) if decay else None
    engine = build_engine(encoder, loss, config, peers)
    settings = fixed_settings(config)
    state = TrainState(run, peers, encoder, engine, loss, ema, loader, program.on_save, settings)
    if not peers.is_first:
        # Ranks draw different dropout masks. Weights, built above, are equal on all of them.
        seed_rng(config.train.seed + peers.rank)
    if checkpoint is not None:
        state.restore(checkpoint)
    # After restoring, because cached features depend on the weights.
    program.begin(encoder, peers.rank, engine.autocast)
    return state, tokenizer


def load_trained(program: Program[Any], run: RunFolder) -> tuple[Any, Tokenizer | None, int]:
    """Load encoder, tokenizer and step from a run's newest good checkpoint, for evaluation.

    Raises:
        ConfigError: the run has no checkpoint yet.
    """
    checkpoint = load_latest(run.checkpoints)
    if checkpoint is None:
        raise ConfigError(
            f"run: expected a checkpoint in {run.checkpoints}, got none; train the run first"
        )
    tokenizer = run.read_tokenizer(program.config) if program.reads_texts else None
    trained = type(program)(run.trained(program.config))
    encoder = trained.encoder(tokenizer)
    with _restoring(checkpoint):
        _check_run(checkpoint, run, fixed_settings(program.config))
        encoder.load_state_dict(checkpoint.modules.get("ema", checkpoint.modules["encoder"]))
    device = choose_device(program.config.train.device)
    return encoder.to(device), tokenizer, checkpoint.step


def _checkpoint(run: RunFolder, peers: Peers) -> Checkpoint | None:
    """Find the newest good checkpoint on rank 0 and load it on every rank."""
    found = load_latest(run.checkpoints) if peers.is_first else None
    path = peers.broadcast_from_rank0(None if found is None else found.path)
    if path is None or found is not None:
        return found
    if not path.is_dir():
        raise FileNotFoundError(
            f"{path}: expected the checkpoint that rank 0 found there, got none on this machine; "
            "put train.output on a file system that all machines share"
        )
    return load_checkpoint(path)


def _tokenizer(program: Program[Any], run: RunFolder, peers: Peers) -> Tokenizer | None:
    """Read or train the tokenizer on rank 0 and share it with all ranks."""
    if not program.reads_texts:
        return None
    tokenizer = None
    if peers.is_first:
        begun = run.has_begun()
        tokenizer = run.read_tokenizer(program.config) if begun else _new_tokenizer(program)
    shared = peers.broadcast_from_rank0(tokenizer)
    assert shared is not None
    return shared


def _new_tokenizer(program: Program[Any]) -> Tokenizer:
    data = program.config.data
    if data.tokenizer != "train":
        return load_tokenizer(data.tokenizer, data.context_length)
    texts = track(program.texts(), "reading texts")
    return train_tokenizer(texts, vocab_size=data.vocab_size, context_length=data.context_length)
