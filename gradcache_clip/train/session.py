"""Everything that a run holds while it trains, built from a configuration and saved as one."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gradcache_clip.train.checkpoint import (
    Checkpoint,
    capture_rng,
    load_checkpoint,
    load_latest,
    restore_rng,
    save_checkpoint,
)
from gradcache_clip.train.config import Config, ConfigError
from gradcache_clip.train.data import Batch, join_states
from gradcache_clip.train.data.resumable import ResumableLoader
from gradcache_clip.train.data.text_loader import TextBatch
from gradcache_clip.train.device import choose_device
from gradcache_clip.train.ema import moving_average
from gradcache_clip.train.engine import Engine, build_engine
from gradcache_clip.train.frozen_features import FrozenFeatures, frozen_features
from gradcache_clip.train.objective import Objective, build_loss, build_objective
from gradcache_clip.train.peers import Peers
from gradcache_clip.train.probe import check_towers
from gradcache_clip.train.run_folder import RunFolder
from gradcache_clip.train.sources.splits import track
from gradcache_clip.train.task import Task, task_of
from gradcache_clip.train.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

if TYPE_CHECKING:
    from timm.utils import ModelEmaV3

AnyBatch = Batch | TextBatch


@dataclass
class Session:
    """The state of a run after `step` optimizer steps, in each of its processes."""

    config: Config
    run: RunFolder
    peers: Peers
    device: torch.device
    task: Task
    tokenizer: Tokenizer | None
    """None where no captions are read."""
    encoder: nn.Module
    engine: Engine
    loss: nn.Module
    objective: Objective
    ema: ModelEmaV3 | None
    loader: ResumableLoader
    features: FrozenFeatures | None = None
    """Of a frozen image tower, in the place of images."""
    step: int = 0
    saved_step: int = 0

    def batches(self) -> Generator[AnyBatch, None, None]:
        """Training batches from here on; closing it ends the worker processes."""
        yield from self.loader

    def inputs_of(self, batch: AnyBatch) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What each tower takes, where `train.inputs` says, and what the loss is told beside the
        features, on the device."""
        images = batch.images
        if self.features is not None and images is not None:
            images = self.features.of(images)
        place = torch.device("cpu") if self.config.train.inputs == "host" else self.device
        if images is not None:
            images = images.to(place, non_blocking=True)
        inputs = self.objective.inputs(images, self._tokens_of(batch, place))
        return inputs, self.objective.loss_kwargs(batch.groups, self.device)

    def _tokens_of(self, batch: AnyBatch, place: torch.device) -> list[dict[str, Tensor]]:
        if self.tokenizer is None:
            return []
        pad = self.config.train.compile
        texts = (self.tokenizer(column, pad_to_context=pad) for column in batch.texts)
        return [
            {name: tensor.to(place, non_blocking=True) for name, tensor in tokens.items()}
            for tokens in texts
        ]

    def save(self) -> None:
        """Write a checkpoint of everything that the next step depends on; all processes together.

        Raises:
            ValueError: a weight is NaN or infinite; earlier checkpoints are untouched.
            OSError: the disk is full; earlier checkpoints are untouched.
        """
        self.peers.set_phase(f"saving after step {self.step}")
        weights, state = self.engine.weights(), self.engine.state()
        loaders = self.peers.gather_to_rank0(self.loader.state_dict())
        generators = self.peers.gather_to_rank0(capture_rng())
        if self.features is not None:
            self.features.save()
        if self.peers.is_first:
            data = {"loader": join_states(loaders), "rng": generators}
            self._write(weights, {**state, **data})
        self.saved_step = self.step

    def _write(self, weights: dict[str, Tensor], state: dict[str, Any]) -> None:
        modules: dict[str, Any] = {"encoder": weights, "loss": self.loss.state_dict()}
        self._check_finite({**weights, **modules["loss"]})
        if self.ema is not None:
            modules["ema"] = self.ema.module.state_dict()
        keep = self.config.train.keep_checkpoints
        save_checkpoint(self.run.checkpoints, self.step, modules=modules, state=state, keep=keep)

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

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on exactly where the checkpoint was written, by however many processes."""
        self.step = self.saved_step = checkpoint.step
        self.engine.load_weights(checkpoint.modules["encoder"])
        self.loss.load_state_dict(checkpoint.modules["loss"])
        self.engine.load_state(checkpoint.state)
        self.loader.load_state_dict(checkpoint.state["loader"])
        if self.ema is not None:
            self.ema.module.load_state_dict(checkpoint.modules["ema"])
        generators = checkpoint.state["rng"]
        # A process that was not there before draws as one that begins.
        if self.peers.rank < len(generators):
            restore_rng(generators[self.peers.rank])

    @property
    def evaluated(self) -> nn.Module:
        """The encoder to evaluate: with averaged weights where there are such."""
        return self.ema.module if self.ema else self.engine.evaluated


@contextmanager
def saved_at_the_end(session: Session) -> Iterator[None]:
    """Save what was trained in this context, also when an error ends it.

    After an error the run goes on behind the batch that failed; it is not tried again. With several
    processes it goes on from the last checkpoint, since one that failed can save nothing.
    """
    try:
        yield
    except Exception:
        if session.step > session.saved_step and session.peers.world_size == 1:
            # Weights that are the error must neither be saved nor hide it.
            with suppress(ValueError):
                session.save()
        raise
    if session.step > session.saved_step:
        session.save()


def start_session(config: Config, run: RunFolder, peers: Peers | None = None) -> Session:
    """Build the run, in each of its processes; with `train.resume`, at its newest good checkpoint.

    Raises:
        ConfigError, ValueError, OSError: it cannot be run here; nothing was written.
    """
    peers = peers or Peers()
    torch.manual_seed(config.train.seed)
    device = choose_device(config.train.device)
    task = task_of(config)
    if config.data.validation:
        task.check_validation()
    loader = task.loader(peers)
    tokenizer = _tokenizer(task, run, peers)
    objective = build_objective(config)
    encoder = build_encoder(config, tokenizer, objective).to(device)
    longest = tokenizer(["a text", "another"], pad_to_context=True) if tokenizer else None
    image_size = config.data.image_size if task.has_images else None
    check_towers(encoder, image_size=image_size, tokens=longest)
    loss = build_loss(objective).to(device)
    decay = config.train.ema_decay
    session = Session(
        config=config,
        run=run,
        peers=peers,
        device=device,
        task=task,
        tokenizer=tokenizer,
        encoder=encoder,
        ema=moving_average(encoder, decay) if decay else None,
        engine=build_engine(encoder, loss, config, peers),
        loss=loss,
        objective=objective,
        loader=loader,
    )
    if not peers.is_first:
        # Each process drops other units; the weights above are the same everywhere.
        torch.manual_seed(config.train.seed + peers.rank)
    checkpoint = _checkpoint(run, peers) if config.train.resume else None
    if checkpoint is not None:
        session.restore(checkpoint)
    if config.model.frozen_features:
        tower = session.encoder.image_tower
        session.features = frozen_features(config, tower, peers.rank, session.engine.autocast)
    return session


def _checkpoint(run: RunFolder, peers: Peers) -> Checkpoint | None:
    """The newest good one, as the first process finds it, read by all."""
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


def build_encoder(
    config: Config, tokenizer: Tokenizer | None, objective: Objective | None = None
) -> Any:
    """The towers of a configuration, with fresh (or pretrained) weights, as its loss wants them."""
    objective = objective or build_objective(config)
    return objective.encoder(task_of(config).towers(tokenizer))


def load_trained(config: Config, run: RunFolder) -> tuple[Any, Tokenizer | None, int]:
    """Encoder, tokenizer and step of a run's newest good checkpoint, for evaluation.

    Raises:
        ConfigError: the run has no checkpoint yet.
    """
    checkpoint = load_latest(run.checkpoints)
    if checkpoint is None:
        raise ConfigError(
            f"run: expected a checkpoint in {run.checkpoints}, got none; train the run first"
        )
    has_texts = task_of(config).has_texts
    tokenizer = _run_tokenizer(config, run) if has_texts else None
    config = dataclasses.replace(config, model=run.trained_model(config.model))
    encoder = build_encoder(config, tokenizer)
    encoder.load_state_dict(checkpoint.modules.get("ema", checkpoint.modules["encoder"]))
    return encoder.to(choose_device(config.train.device)), tokenizer, checkpoint.step


def _tokenizer(task: Task, run: RunFolder, peers: Peers) -> Tokenizer | None:
    """The first process reads or trains it for all; views of images need none."""
    if not task.has_texts:
        return None
    tokenizer = None
    if peers.is_first:
        begun = run.has_begun()
        tokenizer = _run_tokenizer(task.config, run) if begun else _new_tokenizer(task)
    shared = peers.broadcast_from_rank0(tokenizer)
    assert shared is not None
    return shared


def _run_tokenizer(config: Config, run: RunFolder) -> Tokenizer:
    """The one that was saved when the run began, so that a resumed run reads the same tokens."""
    return load_tokenizer(run.tokenizer, config.data.context_length)


def _new_tokenizer(task: Task) -> Tokenizer:
    data = task.config.data
    if data.tokenizer != "train":
        return load_tokenizer(data.tokenizer, data.context_length)
    texts = track(task.texts(), "reading texts")
    return train_tokenizer(texts, vocab_size=data.vocab_size, context_length=data.context_length)
