"""The section `augment`, and what goes together with views, with queues and with texts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gradcache_clip.train.config_checks import ConfigError, in_range

if TYPE_CHECKING:
    from gradcache_clip.train.config import Config

# The one value that other keys may have.
_WITH_VIEWS: dict[str, Any] = {
    "model.architecture": "dual",
    "model.freeze": "",
    "train.sort_by_length": False,
    "distributed.engine": "ddp",
}
_WITH_TEXTS: dict[str, Any] = {
    "data.views": 1,
    "data.random_crop": 1.0,
    "data.allow_url_schemes": [],
    "model.architecture": "dual",
    "model.freeze": "",
    "model.image_pretrained": False,
    "model.image_weights": "",
    "train.negatives": "batch",
    "loss.name": "info_nce",
    "evaluation.folds": 1,
}
_OF_VIEWS = ("nt_xent", "moco")
_WITH_LOSS: dict[str, dict[str, Any]] = {
    "info_nce": {"loss.label_smoothing": 0.0},
    "nt_xent": {
        "data.views": 2,
        "loss.positives": "pair",
        "loss.label_smoothing": 0.0,
    },
    "moco": {
        "loss.positives": "pair",
        "loss.label_smoothing": 0.0,
        "loss.matryoshka": [],
        "model.freeze": "",
        "train.negatives": "batch",
        "train.sort_by_length": False,
        "train.ema_decay": 0.0,
        "distributed.engine": "ddp",
    },
}


@dataclass
class AugmentConfig:
    """How the two views of `data.views: 2` differ beside their crops (`data.random_crop`).

    As in SimCLR's appendix A; MoCo v2 has `color_jitter: 0.5`.
    """

    flip: float = 0.5
    """Probability to be mirrored."""

    color_jitter: float = 1.0
    """Strength of the colour distortion, 0 to 1."""

    grey: float = 0.2
    """Probability to lose all colour."""

    blur: float = 0.5
    """Probability to be blurred."""

    def __post_init__(self) -> None:
        in_range("[0, 1]", "augment", self, "flip", "color_jitter", "grey", "blur")


def check_contrast(config: Config) -> None:
    """Raise for settings that views of an image, texts alone, or their losses have no use for."""
    name, views = config.loss.name, config.data.views
    _check_only(config, _WITH_LOSS.get(name, {}), f"loss.name={name}")
    if config.data.text_fields:
        _check_only(config, _WITH_TEXTS, "data.text_fields")
    if name == "info_nce":
        _check_texts(config)
    if views == 2:
        _check_only(config, _WITH_VIEWS, "data.views=2")
        if name not in _OF_VIEWS:
            raise ConfigError(
                f"loss.name: expected one of {', '.join(_OF_VIEWS)} with data.views=2, got "
                f"{name!r}; change it, or set data.views=1"
            )
    elif config.model.projection_hidden:
        raise ConfigError(
            f"model.projection_hidden: expected 0 with data.views=1, got "
            f"{config.model.projection_hidden}; image and text have linear projections"
        )
    if name == "moco":
        _check_queue(config)
    if not config.loss.learn_logit_scale and config.distributed.engine == "deepspeed":
        raise ConfigError(
            "loss.learn_logit_scale: expected true with distributed.engine=deepspeed, whose run "
            "steps the scale apart, got false; use distributed.engine=ddp"
        )


def _check_only(config: Config, only: dict[str, Any], beside: str) -> None:
    for key, expected in only.items():
        section, name = key.split(".")
        got = getattr(getattr(config, section), name)
        if got != expected:
            raise ConfigError(
                f"{key}: expected {expected!r} with {beside}, got {got!r}; change one of the two"
            )


def _check_texts(config: Config) -> None:
    if not config.data.text_fields:
        raise ConfigError(
            "data.text_fields: expected the fields of queries and documents with "
            "loss.name=info_nce, got none; use e.g. data.text_fields=[anchor,positive]"
        )
    if config.loss.positives == "group":
        raise ConfigError(
            "loss.positives: expected pair or ignore with loss.name=info_nce, which has one right "
            "document for a query, got 'group'; use loss.positives=ignore"
        )


def _check_queue(config: Config) -> None:
    size, rows = config.loss.queue_size, config.train.batch_size
    if size < rows:
        raise ConfigError(
            f"loss.queue_size: expected at least train.batch_size, which is {rows}, got {size}; "
            f"use e.g. loss.queue_size={4 * rows}"
        )
