"""The section `loss` of each program, and the modules that it builds."""

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
    RetrievalLoss,
    SigLipLoss,
)
from gradcache_clip.train.config import Config
from gradcache_clip.train.config_errors import ConfigError
from gradcache_clip.train.config_section import Section, changeable, discriminated_by


class LossConfig(Section):
    """Options of every loss. A scale, learned or fixed, multiplies the cosine similarity."""

    init_logit_scale: float = Field(1 / 0.07, gt=0)
    """Initial multiplier of the cosine similarity; at most `max_logit_scale`."""

    max_logit_scale: float = Field(100.0, ge=0)
    """Upper bound of the multiplier, as in CLIP; 0 for no bound, as in SigLIP."""

    learn_logit_scale: bool = True
    """Train the multiplier; `false` fixes it at `init_logit_scale`, as SimCLR and MoCo do."""

    @model_validator(mode="after")
    def _check_scale(self) -> LossConfig:
        if self.init_logit_scale > (self.max_logit_scale or math.inf):
            raise ConfigError(
                f"loss.init_logit_scale: expected at most loss.max_logit_scale, which is "
                f"{self.max_logit_scale}, got {self.init_logit_scale}; change one of the two"
            )
        return self

    def options(self, impl: str, exchange: str) -> dict[str, Any]:
        """Return the arguments that all losses take."""
        return {
            "init_logit_scale": self.init_logit_scale,
            "max_logit_scale": self.max_logit_scale or math.inf,
            "impl": impl,
            "exchange": exchange,
        }

    def chance_loss(self, candidates: int) -> float | None:
        """Return the loss of chance among `candidates`; None if it is log(candidates)."""
        return None


class PrefixLossConfig(LossConfig):
    """A loss that can also be applied to prefixes of the features."""

    matryoshka: list[int] = Field([])
    """Widths of feature prefixes to train as well, such as [64, 128, 256]; the last is D."""

    def chance_loss(self, candidates: int) -> float | None:
        return len(self.matryoshka) * math.log(candidates) if self.matryoshka else None


class ClipConfig(PrefixLossConfig):
    """Softmax over all pairs, in both directions."""

    name: Literal["clip"] = "clip"
    """This loss."""

    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of the target that is spread evenly over all candidates."""

    positives: Literal["pair", "group", "ignore"] = "pair"
    """How to treat pairs of one match group, such as captions of one image: `pair`, as negatives
    like all others; `group`, as positives of each other; `ignore`, as neither."""

    def build(self, **options: Any) -> nn.Module:
        return ClipLoss(label_smoothing=self.label_smoothing, **options)


class SigLipConfig(PrefixLossConfig):
    """Sigmoid loss over each pair independently."""

    name: Literal["siglip"] = "siglip"
    """This loss."""

    init_logit_bias: float = -10.0
    """Initial value of the bias that is added to every logit."""

    positives: Literal["pair", "group"] = "pair"
    """How to treat pairs of one match group: `pair`, as negatives; `group`, as positives."""

    def build(self, **options: Any) -> nn.Module:
        return SigLipLoss(init_logit_bias=self.init_logit_bias, **options)

    def chance_loss(self, candidates: int) -> float:
        """Return the least loss of equal logits: that of the logit with sigmoid 1 / candidates."""
        alone = math.log(candidates) - (candidates - 1) * math.log1p(-1 / candidates)
        return max(1, len(self.matryoshka)) * alone


class LateInteractionConfig(LossConfig):
    """Softmax over late-interaction scores of unpooled patches and tokens (FILIP)."""

    name: Literal["late_interaction"] = "late_interaction"
    """This loss."""

    def build(self, **options: Any) -> nn.Module:
        return LateInteractionLoss(**options)


class MoCoConfig(LossConfig):
    """InfoNCE against keys of a momentum encoder and a queue of earlier keys (MoCo)."""

    name: Literal["moco"] = "moco"
    """This loss."""

    momentum: float = Field(0.999, ge=0, lt=1)
    """Momentum of the key encoder's moving average."""

    queue_size: int = Field(65536, ge=1)
    """Number of keys of earlier steps to keep as negatives, over all processes."""

    def build(self, **options: Any) -> nn.Module:
        return InfoNCELoss(**options)


class NTXentConfig(PrefixLossConfig):
    """Softmax over two views of each image (SimCLR)."""

    name: Literal["nt_xent"] = "nt_xent"
    """This loss."""

    def build(self, **options: Any) -> nn.Module:
        return NTXentLoss(**options)


class TextLossConfig(PrefixLossConfig):
    """A loss of queries and documents, which may also follow a frozen teacher."""

    teacher: str = changeable("")
    """File with a frozen model's features of the training texts; its softmax over the documents of
    the batch is a second target. Empty for none."""

    teacher_weight: float = Field(0.0, ge=0)
    """Weight of the teacher's cross-entropy beside the loss itself; 0 without a teacher."""

    teacher_scale: float = Field(20.0, gt=0)
    """Multiplier of the teacher's cosine similarity."""

    @model_validator(mode="after")
    def _check_teacher(self) -> TextLossConfig:
        # Fixed for a run, so that it also fixes whether there is a teacher.
        if bool(self.teacher) != bool(self.teacher_weight):
            expected = "more than 0 with" if self.teacher else "0 without"
            raise ConfigError(
                f"loss.teacher_weight: expected {expected} a file in loss.teacher, got "
                f"{self.teacher_weight}; set both, such as loss.teacher_weight=1, or neither"
            )
        return self


class InfoNCEConfig(TextLossConfig):
    """Softmax of each query over all documents and hard negatives."""

    name: Literal["info_nce"] = "info_nce"
    """This loss."""

    positives: Literal["pair", "ignore"] = "pair"
    """How to treat a document or hard negative with the same text as a query's own document:
    `pair`, as a negative; `ignore`, as neither."""

    def build(self, **options: Any) -> nn.Module:
        return InfoNCELoss(**options)


class RetrievalLossConfig(TextLossConfig):
    """Softmax of each query over chosen competitors: further directions, hardness weights."""

    name: Literal["retrieval"] = "retrieval"
    """This loss."""

    positives: Literal["pair", "ignore"] = "pair"
    """How to treat the queries of equal documents: `pair`, as negatives of each other, with all
    their candidates; `ignore`, as neither."""

    directions: list[Literal["query_to_doc", "doc_to_query", "query_to_query", "doc_to_doc"]] = (
        Field(["query_to_doc"])
    )
    """Similarities in the denominator."""

    partition_mode: Literal["joint", "per_direction"] = "joint"
    """One softmax over all directions, or the mean of one for each."""

    hardness_mode: Literal["none", "in_batch_negatives", "hard_negatives", "all_negatives"] = "none"
    """Whose logits grow by `hardness_strength` times their similarity."""

    hardness_strength: float = Field(0.0, ge=0)
    """How much harder negatives weigh; 9 in LLaVE."""

    def build(self, **options: Any) -> nn.Module:
        mode: Any = None if self.hardness_mode == "none" else self.hardness_mode
        return RetrievalLoss(
            directions=self.directions,
            partition_mode=self.partition_mode,
            hardness_mode=mode,
            hardness_strength=self.hardness_strength,
            **options,
        )

    @model_validator(mode="after")
    def _check_directions(self) -> RetrievalLossConfig:
        try:
            self.build()
        except ValueError as error:
            raise ConfigError(f"loss.{error}") from None
        return self


PairLoss = Annotated[
    Annotated[ClipConfig, Tag("clip")]
    | Annotated[SigLipConfig, Tag("siglip")]
    | Annotated[LateInteractionConfig, Tag("late_interaction")]
    | Annotated[MoCoConfig, Tag("moco")],
    discriminated_by("name", "clip"),
]
TextLoss = Annotated[
    Annotated[InfoNCEConfig, Tag("info_nce")] | Annotated[RetrievalLossConfig, Tag("retrieval")],
    discriminated_by("name", "info_nce"),
]
ViewLoss = Annotated[
    Annotated[NTXentConfig, Tag("nt_xent")] | Annotated[MoCoConfig, Tag("moco")],
    discriminated_by("name", "nt_xent"),
]


def build_loss(
    config: Config, wrap: Callable[[nn.Module], nn.Module] = lambda loss: loss
) -> nn.Module:
    """Build the loss of a configuration; with `matryoshka`, also over prefixes of the features.

    Args:
        wrap: applied to the loss, inside `MatryoshkaLoss`.
    """
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
    """Raise ConfigError unless Matryoshka widths increase up to the feature width."""
    rising = all(a < b for a, b in zip([0, *widths], widths, strict=False))
    if widths and not (rising and widths[-1] == feature_dim):
        raise ConfigError(
            f"loss.matryoshka: expected increasing widths that end with the feature width "
            f"{feature_dim}, got {widths}; use e.g. "
            f"[{feature_dim // 4}, {feature_dim // 2}, {feature_dim}]"
        )
