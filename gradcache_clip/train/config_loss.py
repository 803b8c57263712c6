"""Losses of the training command: what can be set of each, and the module that it makes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field, Tag, model_validator
from torch import nn

from gradcache_clip.losses import (
    ClipLoss,
    InfoNCELoss,
    LateInteractionLoss,
    MatryoshkaLoss,
    NTXentLoss,
    SigLipLoss,
)
from gradcache_clip.train.config import Config
from gradcache_clip.train.config_errors import ConfigError
from gradcache_clip.train.config_section import Section, discriminated_by


class LossConfig(Section):
    """Every loss multiplies the cosine similarity by a scale, which it learns or keeps."""

    init_logit_scale: float = Field(1 / 0.07, gt=0)
    """First multiplier of the cosine similarity; at most `max_logit_scale`."""

    max_logit_scale: float = Field(100.0, ge=0)
    """Upper bound of the multiplier, as in CLIP; 0: none, as in SigLIP."""

    learn_logit_scale: bool = True
    """Train the multiplier; `false` keeps it at `init_logit_scale`, as SimCLR and MoCo do."""

    @model_validator(mode="after")
    def _check_scale(self) -> LossConfig:
        if self.init_logit_scale > (self.max_logit_scale or math.inf):
            raise ConfigError(
                f"loss.init_logit_scale: expected at most loss.max_logit_scale, which is "
                f"{self.max_logit_scale}, got {self.init_logit_scale}; change one of the two"
            )
        return self

    def options(self, impl: str, exchange: str) -> dict[str, Any]:
        """Arguments that all losses take."""
        return {
            "init_logit_scale": self.init_logit_scale,
            "max_logit_scale": self.max_logit_scale or math.inf,
            "impl": impl,
            "exchange": exchange,
        }

    def chance_loss(self, candidates: int) -> float | None:
        """Loss of a model that knows nothing, among so many candidates; None for their log."""
        return None


class PrefixLossConfig(LossConfig):
    """A loss that can be taken over prefixes of the features, too."""

    matryoshka: list[int] = Field([])
    """Widths whose prefixes of the features are trained too, such as [64, 128, 256]."""

    def chance_loss(self, candidates: int) -> float | None:
        return len(self.matryoshka) * math.log(candidates) if self.matryoshka else None


class ClipConfig(PrefixLossConfig):
    """A softmax over all pairs, both ways."""

    name: Literal["clip"] = "clip"
    """This loss."""

    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of the target that is spread over all that compete."""

    positives: Literal["pair", "group", "ignore"] = "pair"
    """What pairs of one match group, such as the captions of one image, are to each other: `pair`,
    negatives as all others; `group`, positives; `ignore`, neither."""

    def build(self, **options: Any) -> nn.Module:
        return ClipLoss(label_smoothing=self.label_smoothing, **options)


class SigLipConfig(PrefixLossConfig):
    """A sigmoid for each pair."""

    name: Literal["siglip"] = "siglip"
    """This loss."""

    init_logit_bias: float = -10.0
    """First value of what is added to every logit."""

    positives: Literal["pair", "group"] = "pair"
    """What pairs of one match group are to each other: `pair`, negatives; `group`, positives."""

    def build(self, **options: Any) -> nn.Module:
        return SigLipLoss(init_logit_bias=self.init_logit_bias, **options)

    def chance_loss(self, candidates: int) -> float:
        """With the best logit that all pairs could share, whose sigmoid is 1 / candidates."""
        alone = math.log(candidates) - (candidates - 1) * math.log1p(-1 / candidates)
        return max(1, len(self.matryoshka)) * alone


class LateInteractionConfig(LossConfig):
    """A softmax over scores of all patches and tokens, which are not pooled (FILIP)."""

    name: Literal["late_interaction"] = "late_interaction"
    """This loss."""

    def build(self, **options: Any) -> nn.Module:
        return LateInteractionLoss(**options)


class MoCoConfig(LossConfig):
    """Against keys of a moving average of the towers, and a queue of earlier ones (MoCo)."""

    name: Literal["moco"] = "moco"
    """This loss."""

    momentum: float = Field(0.999, ge=0, lt=1)
    """Of the moving average that embeds the keys."""

    queue_size: int = Field(65536, ge=1)
    """Keys of earlier steps that are held as negatives, of all processes together."""

    def build(self, **options: Any) -> nn.Module:
        return InfoNCELoss(**options)


class NTXentConfig(PrefixLossConfig):
    """A softmax over two views of each image (SimCLR)."""

    name: Literal["nt_xent"] = "nt_xent"
    """This loss."""

    def build(self, **options: Any) -> nn.Module:
        return NTXentLoss(**options)


class InfoNCEConfig(PrefixLossConfig):
    """Each query against all documents and hard negatives."""

    name: Literal["info_nce"] = "info_nce"
    """This loss."""

    positives: Literal["pair", "ignore"] = "pair"
    """What a document or hard negative is that says the same as a query's own document: `pair`, a
    negative; `ignore`, neither."""

    def build(self, **options: Any) -> nn.Module:
        return InfoNCELoss(**options)


PairLoss = Annotated[
    Annotated[ClipConfig, Tag("clip")]
    | Annotated[SigLipConfig, Tag("siglip")]
    | Annotated[LateInteractionConfig, Tag("late_interaction")]
    | Annotated[MoCoConfig, Tag("moco")],
    discriminated_by("name", "clip"),
]
ViewLoss = Annotated[
    Annotated[NTXentConfig, Tag("nt_xent")] | Annotated[MoCoConfig, Tag("moco")],
    discriminated_by("name", "nt_xent"),
]


def build_loss(
    config: Config, wrap: Callable[[nn.Module], nn.Module] = lambda loss: loss
) -> nn.Module:
    """The loss of a configuration, over prefixes of the features too where it names widths."""
    section: Any = config.loss
    train = config.train
    loss = wrap(section.build(**section.options(train.impl, train.exchange)))
    if not section.learn_logit_scale:
        for name, parameter in loss.named_parameters():
            if name.endswith("log_logit_scale"):
                parameter.requires_grad_(False)
    widths = getattr(section, "matryoshka", [])
    return MatryoshkaLoss(loss, widths) if widths else loss


def check_widths(widths: list[int], feature_dim: int) -> None:
    """Raise ConfigError unless Matryoshka widths rise to that of the features."""
    rising = all(a < b for a, b in zip([0, *widths], widths, strict=False))
    if widths and not (rising and widths[-1] == feature_dim):
        raise ConfigError(
            f"loss.matryoshka: expected rising widths that end with the width of the features, "
            f"which is {feature_dim}, got {widths}; use e.g. "
            f"[{feature_dim // 4}, {feature_dim // 2}, {feature_dim}]"
        )
