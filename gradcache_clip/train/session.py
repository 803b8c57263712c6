"""Everything that a run holds while it trains, built from a configuration and saved as one."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch

from gradcache_clip.losses import ClipLoss
from gradcache_clip.train.checkpoint import (
    Checkpoint,
    capture_rng,
    load_latest,
    restore_rng,
    save_checkpoint,
)
from gradcache_clip.train.config import Config, ConfigError
from gradcache_clip.train.data import Batch, ImageCaptionLoader, LoaderOptions, read_captions
from gradcache_clip.train.data.shard_urls import find_shards
from gradcache_clip.train.ema import Ema
from gradcache_clip.train.optimizer import build_optimizer
from gradcache_clip.train.probe import check_towers
from gradcache_clip.train.run_folder import RunFolder
from gradcache_clip.train.sources.splits import track
from gradcache_clip.train.step import make_scaler
from gradcache_clip.train.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from gradcache_clip.train.towers import DualEncoder, build_towers


@dataclass
class Session:
    """The state of a run after `step` optimizer steps."""

    config: Config
    run: RunFolder
    device: torch.device
    tokenizer: Tokenizer
    encoder: DualEncoder
    loss: ClipLoss
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: Ema | None
    loader: ImageCaptionLoader
    step: int = 0
    saved_step: int = 0

    def batches(self) -> Generator[Batch, None, None]:
        """Training batches from here on; closing it ends the worker processes."""
        yield from self.loader

    def save(self) -> None:
        """Write a checkpoint of everything that the next step depends on.

        Raises:
            ValueError: a weight is NaN or infinite; earlier checkpoints are untouched.
            OSError: the disk is full; earlier checkpoints are untouched.
        """
        self._check_weights()
        state = {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "loader": self.loader.state_dict(),
            "rng": capture_rng(),
            "ema_updates": self.ema.state_dict()["updates"] if self.ema else 0,
        }
        modules: dict[str, Any] = {
            "encoder": self.encoder.state_dict(),
            "loss": self.loss.state_dict(),
        }
        if self.ema is not None:
            modules["ema"] = self.ema.state_dict()["averages"]
        keep = self.config.train.keep_checkpoints
        save_checkpoint(self.run.checkpoints, self.step, modules=modules, state=state, keep=keep)
        self.saved_step = self.step

    def _check_weights(self) -> None:
        named = [*self.encoder.named_parameters(), *self.loss.named_parameters()]
        finite = torch.stack([parameter.isfinite().all() for _, parameter in named])
        if finite.all():
            return
        name = named[int((~finite).nonzero()[0])][0]
        raise ValueError(
            f"weights: expected finite numbers after step {self.step}, got NaN or infinity in "
            f"{name}; nothing was saved, and earlier checkpoints are untouched. Lower "
            "optimizer.learning_rate or set optimizer.max_grad_norm"
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on exactly where the checkpoint was written."""
        self.step = self.saved_step = checkpoint.step
        self.encoder.load_state_dict(checkpoint.modules["encoder"])
        self.loss.load_state_dict(checkpoint.modules["loss"])
        self.optimizer.load_state_dict(checkpoint.state["optimizer"])
        self.scaler.load_state_dict(checkpoint.state["scaler"])
        self.loader.load_state_dict(checkpoint.state["loader"])
        if self.ema is not None:
            updates = checkpoint.state["ema_updates"]
            self.ema.load_state_dict({"updates": updates, "averages": checkpoint.modules["ema"]})
        restore_rng(checkpoint.state["rng"])

    def averaged_weights(self) -> AbstractContextManager[None]:
        """The weights to evaluate with: the moving average where there is one."""
        return self.ema.swapped_into(self.encoder) if self.ema else nullcontext()


@contextmanager
def saved_at_the_end(session: Session) -> Iterator[None]:
    """Save what was trained in this context, also when an error ends it.

    After an error the run goes on behind the batch that failed; it is not tried again.
    """
    try:
        yield
    except Exception:
        if session.step > session.saved_step:
            # Weights that are the error must neither be saved nor hide it.
            with suppress(ValueError):
                session.save()
        raise
    if session.step > session.saved_step:
        session.save()


def start_session(config: Config, run: RunFolder) -> Session:
    """Build the run; with `train.resume`, at its newest good checkpoint."""
    torch.manual_seed(config.train.seed)
    device = choose_device(config.train.device)
    if config.data.validation:
        find_shards(config.data.validation, allow_url_schemes=config.data.allow_url_schemes)
    loader = ImageCaptionLoader(
        config.data.train, config.train.batch_size, options=_loader_options(config)
    )
    tokenizer = _run_tokenizer(config, run) if run.has_begun() else _new_tokenizer(config)
    encoder = build_encoder(config, tokenizer).to(device)
    longest = tokenizer(["a text", "another"], pad_to_context=True)
    check_towers(encoder, image_size=config.data.image_size, tokens=longest)
    loss = ClipLoss(
        init_logit_scale=config.model.init_logit_scale,
        max_logit_scale=config.model.max_logit_scale,
        impl=config.train.impl,  # type: ignore[arg-type]
    ).to(device)
    named = [*encoder.named_parameters(), *loss.named_parameters()]
    session = Session(
        config=config,
        run=run,
        device=device,
        tokenizer=tokenizer,
        encoder=encoder,
        loss=loss,
        optimizer=build_optimizer(named, config.optimizer),
        scaler=make_scaler(config.train.precision, device),
        ema=Ema(encoder, decay=config.train.ema_decay) if config.train.ema_decay else None,
        loader=loader,
    )
    checkpoint = load_latest(run.checkpoints) if config.train.resume else None
    if checkpoint is not None:
        session.restore(checkpoint)
    return session


def build_encoder(config: Config, tokenizer: Tokenizer) -> DualEncoder:
    """Both towers of a configuration, with fresh (or pretrained) weights."""
    return build_towers(
        config.model,
        image_size=config.data.image_size,
        context_length=config.data.context_length,
        vocab_size=tokenizer.vocab_size,
        pad_token_id=tokenizer.pad_token_id,
    )


def load_trained(config: Config, run: RunFolder) -> tuple[DualEncoder, Tokenizer, int]:
    """Encoder, tokenizer and step of a run's newest good checkpoint, for evaluation.

    Raises:
        ConfigError: the run has no checkpoint yet.
    """
    checkpoint = load_latest(run.checkpoints)
    if checkpoint is None:
        raise ConfigError(
            f"run: expected a checkpoint in {run.checkpoints}, got none; train the run first"
        )
    tokenizer = _run_tokenizer(config, run)
    encoder = build_encoder(config, tokenizer)
    encoder.load_state_dict(checkpoint.modules.get("ema", checkpoint.modules["encoder"]))
    return encoder.to(choose_device(config.train.device)), tokenizer, checkpoint.step


def choose_device(name: str) -> torch.device:
    """`auto` is the accelerator of this machine, or its CPU.

    Raises:
        ConfigError: the device is not here.
    """
    if name == "auto":
        here = torch.accelerator.is_available() and torch.accelerator.current_accelerator()
        return here or torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"train.device: expected a device of this machine, got {name!r} ({error}); "
            "use auto or cpu"
        ) from error


def _loader_options(config: Config) -> LoaderOptions:
    data = config.data
    return LoaderOptions(
        image_size=data.image_size,
        crop_scale=(data.random_crop, 1.0) if data.random_crop < 1 else None,
        seed=config.train.seed,
        workers=data.workers,
        shuffle_buffer=data.shuffle_buffer,
        max_broken_share=data.max_broken_share,
        allow_url_schemes=tuple(data.allow_url_schemes),
    )


def _run_tokenizer(config: Config, run: RunFolder) -> Tokenizer:
    """The one that was saved when the run began, so that a resumed run reads the same tokens."""
    return load_tokenizer(run.tokenizer, config.data.context_length)


def _new_tokenizer(config: Config) -> Tokenizer:
    data = config.data
    if data.tokenizer != "train":
        return load_tokenizer(data.tokenizer, data.context_length)
    captions = track(
        read_captions(data.train, allow_url_schemes=data.allow_url_schemes), "reading captions"
    )
    return train_tokenizer(captions, vocab_size=data.vocab_size, context_length=data.context_length)
