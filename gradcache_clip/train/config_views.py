"""The section `augment` of a configuration, and what goes together with views and with queues."""

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
_WITH_LOSS: dict[str, dict[str, Any]] = {
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
    """Raise for settings that two views of an image, or a loss over them, have no use for."""
    name, views = config.loss.name, config.data.views
    _check_only(config, _WITH_LOSS.get(name, {}), f"loss.name={name}")
    if views == 2:
        _check_only(config, _WITH_VIEWS, "data.views=2")
        if name not in _WITH_LOSS:
            raise ConfigError(
                f"loss.name: expected one of {', '.join(_WITH_LOSS)} with data.views=2, got "
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


def _check_queue(config: Config) -> None:
    size, rows = config.loss.queue_size, config.train.batch_size
    if size < rows:
        raise ConfigError(
            f"loss.queue_size: expected at least train.batch_size, which is {rows}, got {size}; "
            f"use e.g. loss.queue_size={4 * rows}"
        )
