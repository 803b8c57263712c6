"""What a run trains and what for: the sections `model` and `loss` of a configuration."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from gradcache_clip.train.config_checks import (
    ConfigError,
    above,
    at_least,
    check,
    in_range,
    not_empty,
    one_of,
)

_LOSSES = ("clip", "siglip", "late_interaction", "nt_xent", "moco", "info_nce")


@dataclass
class ModelConfig:
    """The two towers and their projections."""

    image: str = "vit_tiny_patch16_224"
    """Name of a timm model."""

    image_kwargs: dict[str, Any] = field(default_factory=dict)
    """Further arguments of `timm.create_model`, such as `depth: 4`.

    A value given as a whole replaces that of the file, and `model.image_kwargs.depth=4` changes one
    entry. An override that changes `model.image` drops what the file gave for another model.
    """

    image_pretrained: bool = False
    """Load timm's pretrained weights."""

    image_weights: str = ""
    """A safetensors file of weights for `image` by timm's names, instead of those of the hub."""

    image_pool: str = "default"
    """`cls`, `mean` over patches, or the model's own (`default`)."""

    text: str = "bert"
    """A transformers model type, built from `text_kwargs`; a hub name or folder when pretrained."""

    text_kwargs: dict[str, Any] = field(default_factory=dict)
    """Fields of the transformers configuration, such as `num_hidden_layers: 4`.

    Overridden like `image_kwargs`; an override that changes `model.text` drops those of the file.
    """

    text_pretrained: bool = False
    """Load pretrained weights of `text` (safetensors only)."""

    text_pool: str = "cls"
    """`cls` (first token) or `mean` over tokens."""

    feature_dim: int = 256
    """Width D of the features; with `data.text_fields` that of the text tower."""

    projection_hidden: int = 0
    """Width of a hidden layer of the projection, with ReLU, where `data.views` is 2; 0: none."""

    freeze: str = ""
    """`image` or `text`: that backbone keeps its weights, runs once a step and is never replayed;
    its projection is trained."""

    frozen_features: str = ""
    """Folder of what a frozen image tower says of each training image, computed once and read in
    later epochs and runs; empty: it is computed in every step."""

    architecture: str = "dual"
    """`dual`: a tower each. `multiway`: one Transformer for both, with shared attention and a
    feed-forward network for each (BEiT-3), in the place of `image` and `text`."""

    multiway_kwargs: dict[str, Any] = field(default_factory=dict)
    """Sizes of the `multiway` Transformer, such as `depth: 4`; see `train/multiway.py`."""

    def __post_init__(self) -> None:
        not_empty("model", self, "image", "text")
        at_least(1, "model", self, "feature_dim")
        at_least(0, "model", self, "projection_hidden")
        one_of(("cls", "mean", "default"), "model", self, "image_pool")
        one_of(("cls", "mean"), "model", self, "text_pool")
        one_of(("", "image", "text"), "model", self, "freeze")
        one_of(("dual", "multiway"), "model", self, "architecture")
        if self.frozen_features:
            expected = "image with model.frozen_features"
            check(self.freeze == "image", "model", self, "freeze", expected)
        if self.image_weights:
            self._check_weights()
        if self.architecture == "multiway":
            self._check_multiway()
        else:
            expected = "nothing with model.architecture=dual"
            check(not self.multiway_kwargs, "model", self, "multiway_kwargs", expected)

    def _check_weights(self) -> None:
        """Only one source, and no format that can run code."""
        expected = "false beside model.image_weights"
        check(not self.image_pretrained, "model", self, "image_pretrained", expected)
        safe = self.image_weights.endswith(".safetensors")
        check(safe, "model", self, "image_weights", "a .safetensors file, which holds no code")

    def _check_multiway(self) -> None:
        """One Transformer is trained as a whole, and [CLS] stands for an image or a text."""
        expected = "nothing with model.architecture=multiway, whose Transformer starts new"
        for name in ("image_weights", "image_pretrained", "text_pretrained", "freeze"):
            check(not getattr(self, name), "model", self, name, expected)
        for name in ("image_pool", "text_pool"):
            expected = "cls with model.architecture=multiway"
            check(getattr(self, name) != "mean", "model", self, name, expected)


@dataclass
class LossConfig:
    """What is minimised over the features of the whole batch."""

    name: str = "clip"
    """`clip`: a softmax over all pairs, both ways. `siglip`: a sigmoid for each pair.
    `late_interaction`: a softmax over scores of all patches and tokens, which are not pooled.
    `nt_xent`: a softmax over two views of each image (SimCLR). `moco`: pairs, or two views, against
    keys of a moving average of the towers and a queue of earlier ones (MoCo). `info_nce`: each
    query of `data.text_fields` against all documents and hard negatives."""

    init_logit_scale: float = 1 / 0.07
    """First multiplier of the cosine similarity; above 0 and at most `max_logit_scale`."""

    max_logit_scale: float = 100.0
    """Upper bound of the multiplier, as in CLIP; 0: none, as in SigLIP."""

    learn_logit_scale: bool = True
    """Train the multiplier; `false` keeps it at `init_logit_scale`, as SimCLR and MoCo do."""

    init_logit_bias: float = -10.0
    """First value of what `siglip` adds to every logit."""

    momentum: float = 0.999
    """Of the moving average that embeds the keys of `moco`."""

    queue_size: int = 65536
    """Keys of earlier steps that `moco` holds as negatives, of all processes together."""

    label_smoothing: float = 0.0
    """Share of the target that `clip` spreads over all that compete."""

    positives: str = "pair"
    """What pairs of one match group, such as the captions of one image, are to each other: `pair`,
    negatives as all others; `group`, positives; `ignore`, neither (`clip`, `info_nce`). With
    `info_nce`, a document or hard negative that says the same as a query's own document."""

    matryoshka: list[int] = field(default_factory=list)
    """Widths whose prefixes of the features are trained too, such as [64, 128, 256]."""

    def __post_init__(self) -> None:
        one_of(_LOSSES, "loss", self, "name")
        in_range("[0, 1)", "loss", self, "momentum")
        at_least(1, "loss", self, "queue_size")
        one_of(("pair", "group", "ignore"), "loss", self, "positives")
        above(0, "loss", self, "init_logit_scale")
        at_least(0, "loss", self, "max_logit_scale")
        in_range("[0, 1)", "loss", self, "label_smoothing")
        expected = f"at most loss.max_logit_scale, which is {self.max_logit_scale}"
        below = self.init_logit_scale <= (self.max_logit_scale or math.inf)
        check(below, "loss", self, "init_logit_scale", expected)
        if self.name == "late_interaction":
            self._check_late_interaction()
        if self.name == "siglip":
            self._check_siglip()

    def _check_late_interaction(self) -> None:
        """Its score of a pair is no product of two vectors, and each pair has one positive."""
        with_it = "with loss.name=late_interaction"
        check(self.positives == "pair", "loss", self, "positives", f"pair {with_it}")
        check(not self.matryoshka, "loss", self, "matryoshka", f"no widths {with_it}")
        check(self.label_smoothing == 0, "loss", self, "label_smoothing", f"0 {with_it}")

    def _check_siglip(self) -> None:
        """It has no softmax to leave a candidate out of, or to smooth."""
        check(self.label_smoothing == 0, "loss", self, "label_smoothing", "0 with loss.name=siglip")
        check(self.positives != "ignore", "loss", self, "positives", "pair or group with siglip")


def check_widths(model: ModelConfig, loss: LossConfig) -> None:
    """Raise unless the widths of a Matryoshka loss rise to that of the features."""
    widths = loss.matryoshka
    rising = all(a < b for a, b in zip([0, *widths], widths, strict=False))
    if widths and not (rising and widths[-1] == model.feature_dim):
        raise ConfigError(
            f"loss.matryoshka: expected rising widths that end with model.feature_dim, which is "
            f"{model.feature_dim}, got {widths}; use e.g. "
            f"[{model.feature_dim // 4}, {model.feature_dim // 2}, {model.feature_dim}]"
        )


def check_frozen_features(config: Any) -> None:
    """Raise unless every epoch shows the same images to one frozen tower that pools them."""
    if not config.model.frozen_features:
        return
    with_it = "with model.frozen_features"
    for section, name, allowed in (
        ("loss", "name", ("clip", "siglip")),
        ("data", "random_crop", (1.0,)),
        ("distributed", "engine", ("ddp",)),
    ):
        part = getattr(config, section)
        expected = f"{' or '.join(map(str, allowed))} {with_it}"
        check(getattr(part, name) in allowed, section, part, name, expected)


def check_tokens(model: ModelConfig, loss: LossConfig) -> None:
    """Raise if a loss of tokens meets towers that give one vector for all of them."""
    if loss.name == "late_interaction":
        expected = "dual with loss.name=late_interaction"
        check(model.architecture == "dual", "model", model, "architecture", expected)
