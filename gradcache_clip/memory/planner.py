"""Plans the step of given towers, or of a training configuration."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch

from gradcache_clip.memory.cards import Card, find_card
from gradcache_clip.memory.plan_answer import (
    largest_chunk,
    memory_of,
    methods_of,
    parameters_of,
    speed_of,
)
from gradcache_clip.memory.plan_models import (
    Sizes,
    build_on_meta,
    configured_pair,
    train_last,
)
from gradcache_clip.memory.plan_options import Plan, PlanOptions
from gradcache_clip.memory.plan_work import trace_all
from gradcache_clip.train.config import Config
from gradcache_clip.train.config_errors import ConfigError
from gradcache_clip.train.deepspeed_config import DEFAULT_STAGE
from gradcache_clip.train.token_towers import TokenEncoder
from gradcache_clip.train.towers import DualEncoder

if TYPE_CHECKING:
    from gradcache_clip.train.programs.pairs import PairsConfig


def plan_config(config: PairsConfig, gpu: str, options: PlanOptions | None = None) -> Plan:
    """Plan the step of a training configuration; see `options_of` for the default options.

    Raises:
        ConfigError: also for programs and losses that cannot be planned: views, texts, queues.
    """
    started = time.perf_counter()
    _check_counted(config)
    model, sizes = configured_pair(config)
    encoder = build_on_meta(model, sizes)
    if config.loss.name == "late_interaction":
        with torch.device("meta"):
            encoder = TokenEncoder(encoder, sizes.context_length)
    found: Any = config.model
    dual = found.architecture == "dual"
    names = (found.image, found.text) if dual else (found.architecture,) * 2
    return planned(names, encoder, sizes, gpu, options or options_of(config), started)


def options_of(config: PairsConfig) -> PlanOptions:
    """Return the options that a training configuration implies, on one process.

    Raises:
        ConfigError: as for `plan_config`.
    """
    _check_counted(config)
    train, distributed = config.train, config.distributed
    zero = {"deepspeed": distributed.zero, "fsdp": 3}.get(distributed.strategy, 0)
    frozen = getattr(config.model, "freeze", "")
    return PlanOptions(
        batch_size=train.batch_size,
        chunk_size=train.chunk_size,
        precision=train.precision,
        ema=train.ema_decay > 0,
        batch_device=train.batch_device,
        zero=DEFAULT_STAGE if zero < 0 else zero,
        image_size=config.data.image_size,
        context_length=config.data.context_length,
        feature_dim=config.model.feature_dim,
        image_trainable=float(frozen != "image"),
        text_trainable=float(frozen != "text"),
    )


def _check_counted(config: Config) -> None:
    if config.program == "texts":
        raise ConfigError(
            "program: expected pairs, since plan needs an image and a text tower, got texts; "
            "if a step does not fit, lower train.chunk_tokens or train.chunk_size"
        )
    name = config.loss.name
    if name not in ("clip", "siglip", "late_interaction"):
        raise ConfigError(
            f"loss.name: expected clip, siglip or late_interaction, which compare images with "
            f"texts, got {name}, whose views or queue plan does not count; plan the same towers "
            "with program=pairs, loss.name=clip and a learned scale"
        )


def planned(
    names: tuple[str, str],
    encoder: DualEncoder,
    sizes: Sizes,
    gpu: str,
    options: PlanOptions,
    started: float,
) -> Plan:
    card = find_card(gpu)
    capacity = _capacity(card, options)
    train_last(encoder.image_tower.backbone, options.image_trainable)
    train_last(encoder.text_tower.backbone, options.text_trainable)
    traced = trace_all(encoder, sizes, options, card)
    return Plan(
        image=names[0],
        text=names[1],
        card=card,
        options=options,
        **parameters_of(encoder),
        **memory_of(traced.step, options, capacity),
        largest_chunk=largest_chunk(traced.step, options, capacity),
        methods=methods_of(traced, options, capacity),
        **speed_of(traced.step, options, card, capacity),
        seconds=time.perf_counter() - started,
    )


def _capacity(card: Card, options: PlanOptions) -> int:
    """Return the bytes of the card that are left for the allocator."""
    budget = options.budget_bytes or 0
    for name, taken in (("context_bytes", options.context_bytes), ("memory_budget", budget)):
        if taken >= card.memory_bytes:
            raise ValueError(
                f"{name}: expected less than the {card.memory_bytes / 2**30:.1f} GiB of "
                f"{card.name}, got {taken / 2**30:.1f} GiB; lower it or take a larger card"
            )
    return card.memory_bytes - options.context_bytes
