"""The section `model` of each program."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, Tag, model_validator

from gradcache_clip.train.config_errors import ConfigError
from gradcache_clip.train.config_section import Section, changeable, discriminated_by, expect

# Arguments by which a file could name weights or code of its own: a pickle, a hub, a kernel.
_IMAGE_SOURCES = frozenset(
    {"cache_dir", "checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay"}
)
_TEXT_SOURCES = frozenset(
    {"auto_map", "cache_dir", "code_revision", "kernel_config", "name_or_path", "token"}
)
_ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")


class ImageTowerConfig(Section):
    """A timm model."""

    image: str = Field("vit_tiny_patch16_224", min_length=1)
    """Name of a timm model."""

    image_kwargs: dict[str, Any] = Field({})
    """Further arguments of `timm.create_model`, such as `depth: 4`.

    An override of the whole mapping replaces that of the file; `model.image_kwargs.depth=4` changes
    one entry. An override of `model.image` drops the arguments that the file gives for another
    model.
    """

    image_pretrained: bool = False
    """Load timm's pretrained weights."""

    image_weights: str = ""
    """A local safetensors file with weights for `image` under timm's names."""

    image_pool: Literal["cls", "mean", "default"] = "default"
    """`cls`, `mean` over patches, or the model's own pooling (`default`)."""

    feature_dim: int = Field(256, ge=1, le=2**20)
    """Width D of the features."""

    @model_validator(mode="after")
    def _check_weights(self) -> ImageTowerConfig:
        """Allow one source of weights, and no format that can run code."""
        if ":" in self.image:
            raise ConfigError(
                f"model.image: expected the name of a timm model, got {self.image!r}, which names "
                "a place to load it from; convert its weights to safetensors and pass "
                "model.image_weights"
            )
        _refuse("model.image_kwargs", self.image_kwargs, _IMAGE_SOURCES, "model.image_weights")
        if self.image_weights:
            expect(self, "model.image_pretrained", False, "model.image_weights")
        if self.image_weights and not self.image_weights.endswith(".safetensors"):
            raise ConfigError(
                f"model.image_weights: expected a .safetensors file, which cannot run code, got "
                f"{self.image_weights!r}; convert it"
            )
        return self


class TextTowerConfig(Section):
    """A transformers model."""

    text: str = Field("bert", min_length=1)
    """A transformers model type, built from `text_kwargs`; a hub name or folder when pretrained."""

    text_kwargs: dict[str, Any] = Field({})
    """Fields of the transformers configuration, such as `num_hidden_layers: 4`.

    Overridden like `image_kwargs`; an override of `model.text` drops those of the file.
    """

    text_pretrained: bool = False
    """Load pretrained weights of `text` (safetensors only)."""

    text_pool: Literal["cls", "mean"] = "cls"
    """`cls` (first token) or `mean` over tokens."""

    @model_validator(mode="after")
    def _check_arguments(self) -> TextTowerConfig:
        _refuse("model.text_kwargs", self.text_kwargs, _TEXT_SOURCES, "model.text")
        for key, value in self.text_kwargs.items():
            # Other names are those of kernels, which transformers would fetch and run.
            if "attn_implementation" in key and value not in _ATTENTION:
                raise ConfigError(
                    f"model.text_kwargs.{key}: expected one of {', '.join(_ATTENTION)}, got "
                    f"{value!r}; leave it out"
                )
        return self


def _refuse(name: str, given: dict[str, Any], sources: frozenset[str], instead: str) -> None:
    for key in given:
        if key in sources or key.startswith("trust_"):
            raise ConfigError(
                f"{name}.{key}: expected sizes and other settings of the model, got a source of "
                f"weights or code; leave it out and use {instead}"
            )


class DualConfig(ImageTowerConfig, TextTowerConfig):
    """An image tower and a text tower, each with a linear projection."""

    architecture: Literal["dual"] = "dual"
    """`dual`: one tower per modality."""

    freeze: Literal["", "image", "text"] = ""
    """Backbone to freeze, `image` or `text`: it runs once per step and is never replayed; its
    projection is still trained."""

    frozen_features: str = changeable("")
    """Folder that caches a frozen image tower's features of training images across epochs and
    runs; empty computes them in every step."""

    @model_validator(mode="after")
    def _check_frozen(self) -> DualConfig:
        if self.frozen_features:
            expect(self, "model.freeze", "image", "model.frozen_features")
        return self


class MultiwaySizes(Section):
    """Sizes of the Multiway Transformer; the defaults are those of BEiT-3 base."""

    width: int = Field(768, ge=1)
    """Width C."""

    depth: int = Field(12, ge=1)
    """Blocks."""

    heads: int = Field(12, ge=1)
    """Attention heads per block; must divide the width."""

    hidden: int = Field(3072, ge=1)
    """Inner width of each feed-forward network."""

    patch_size: int = Field(16, ge=1)
    """Height and width of a patch in pixels; must divide `data.image_size`."""

    drop_path: float = Field(0.0, ge=0, lt=1)
    """Stochastic depth of the last block; it rises linearly from 0 in the first."""

    @model_validator(mode="after")
    def _check_width(self) -> MultiwaySizes:
        if self.width % self.heads:
            raise ConfigError(
                f"model.multiway_kwargs.width: expected a multiple of {self.heads}, the number of "
                f"heads, got {self.width}; change either"
            )
        return self

    @property
    def gain(self) -> float:
        """Gain over Xavier initialisation for values, outputs and experts."""
        return math.sqrt(math.log(2 * self.depth))


class MultiwayConfig(Section):
    """One Transformer for images and texts (BEiT-3), trained from scratch."""

    architecture: Literal["multiway"] = "multiway"
    """`multiway`: shared attention, and a feed-forward network for each modality."""

    multiway_kwargs: MultiwaySizes = MultiwaySizes()
    """Sizes of the Transformer, such as `depth: 4`."""

    feature_dim: int = Field(256, ge=1, le=2**20)
    """Width D of the features."""


class ViewConfig(ImageTowerConfig):
    """An image tower, and a projection that is discarded after training."""

    projection_hidden: int = Field(0, ge=0)
    """Width of the projection's hidden layer, with ReLU; 0 makes the projection linear."""


PairModel = Annotated[
    Annotated[DualConfig, Tag("dual")] | Annotated[MultiwayConfig, Tag("multiway")],
    discriminated_by("architecture", "dual"),
]
