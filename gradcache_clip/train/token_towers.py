"""Towers that return one vector per patch or token, for losses that compare tokens.

B rows of a chunk, H and W pixels, P patches, R text tokens, C width of a tower, D feature width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from gradcache_clip.cache import FrozenTrunk
from gradcache_clip.losses import ContrastiveOutput, LateInteractionLoss
from gradcache_clip.train.config_errors import ConfigError
from gradcache_clip.train.modalities import IMAGE, TEXT
from gradcache_clip.train.towers import DualEncoder, ImageTower, TextTower


class Tokens(NamedTuple):
    """Token vectors of B texts, and a mask of padding."""

    vectors: Tensor
    """(B, R, D)."""
    mask: Tensor
    """bool (B, R), False for padding."""


class PatchTower(ImageTower):
    """An image tower without pooling: returns the last layer's vector of each patch.

    Class and register tokens take part in attention, but are not returned. In a convolutional
    network each position of the last feature map is a patch.

    Args:
        tower: its backbone is reused, and modified to no longer pool.

    Raises:
        ConfigError: the backbone's pooling cannot be removed.
    """

    def __init__(self, tower: ImageTower) -> None:
        backbone = _without_pooling(tower.backbone)
        super().__init__(backbone, width=backbone.head_hidden_size, mean=(), std=())
        self.mean, self.std = tower.mean, tower.std

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, 3, H, W), uint8 or normalised float, to (B, P, C)."""
        features = super().forward(images)
        if features.ndim == 4:
            is_last = getattr(self.backbone, "output_fmt", "NCHW") == "NHWC"
            return (features if is_last else features.permute(0, 2, 3, 1)).flatten(1, 2)
        if features.ndim != 3:
            raise ValueError(
                f"model.image: expected a vector for each patch, got shape {tuple(features.shape)};"
                " use a vision transformer or a convolutional network"
            )
        return features[:, getattr(self.backbone, "num_prefix_tokens", 0) :]


class TokenTower(TextTower):
    """A text tower without pooling; pads the vectors of all texts to one length.

    The mask covers all tokens of a text, special tokens included, but not padding.

    Args:
        tower: its backbone is reused.
        length: R, at least the length of the longest text.
    """

    def __init__(self, tower: TextTower, length: int) -> None:
        super().__init__(tower.backbone, width=tower.width, pool="none")
        self.length = length

    def forward(self, inputs: Mapping[str, Tensor]) -> Tokens:  # type: ignore[override]
        """Map `input_ids` and `attention_mask` (B, at most R) to vectors (B, R, C) and a mask."""
        mask = inputs["attention_mask"]
        output = self.backbone(input_ids=inputs["input_ids"], attention_mask=mask)
        hidden: Tensor = output.last_hidden_state
        missing = self.length - hidden.shape[1]
        return Tokens(F.pad(hidden, (0, 0, 0, missing)), F.pad(mask.bool(), (0, missing)))


class TokenEncoder(DualEncoder):
    """A `DualEncoder` that returns one feature vector per token.

    `encoder(0, images)` returns a tensor (B, P, D), `encoder(1, tokens)` returns `Tokens`. Text
    features are padded to one length, so every chunk has features of the same shape, also if
    chunks are trimmed to their longest text.

    Args:
        pair: result of `build_towers`; projections are replaced, frozen towers stay frozen.
        length: R, `data.context_length`.

    Raises:
        ConfigError: a tower whose pooling cannot be removed.

    Source:
        Yao et al. 2021 (FILIP), section 3.1: textual and visual tokens are linearly projected to
        the common space.
    """

    def __init__(self, pair: DualEncoder, length: int) -> None:
        super().__init__(
            PatchTower(pair.image_tower),
            TokenTower(pair.text_tower, length),
            feature_dim=pair.image_projection.out_features,
        )
        for tower in (IMAGE, TEXT):
            if pair.frozen_trunk(tower) is not None:
                self.freeze(tower)

    def freeze(self, tower: int) -> None:
        super().freeze(tower)
        if tower == TEXT:
            head = _ProjectedTokens(self.text_projection)
            self._trunks[TEXT] = FrozenTrunk(self.text_tower, head)

    def encode_text(self, inputs: Mapping[str, Tensor]) -> Tokens:  # type: ignore[override]
        """Map ids and mask (B, at most R) to unnormalised `Tokens` of length R."""
        hidden, mask = self.text_tower(inputs)
        return Tokens(self.text_projection(hidden), mask)


class TokenLoss(nn.Module):
    """`LateInteractionLoss` on the outputs of a `TokenEncoder`.

    Args:
        loss: takes vectors and masks.

    Source: Yao et al. 2021 (FILIP), equations 1 to 6.
    """

    def __init__(self, loss: LateInteractionLoss) -> None:
        super().__init__()
        self.loss = loss

    @property
    def logit_scale(self) -> Tensor:
        """The multiplier of the similarity, differentiable."""
        return self.loss.logit_scale

    def forward(self, images: Tensor, texts: Tokens) -> ContrastiveOutput:
        """Compute the loss of patches (b, P, D) and `Tokens` of b texts; rows i are a pair."""
        output: ContrastiveOutput = self.loss(images, texts.vectors, text_mask=texts.mask)
        return output


class _ProjectedTokens(nn.Module):
    """Projection of a frozen text tower's `Tokens`."""

    def __init__(self, projection: nn.Linear) -> None:
        super().__init__()
        self.projection = projection

    def forward(self, tokens: Tokens) -> Tokens:
        return Tokens(self.projection(tokens.vectors), tokens.mask)


def _without_pooling(backbone: Any) -> Any:
    try:
        backbone.reset_classifier(0, global_pool="")
    except (AssertionError, AttributeError, NotImplementedError, TypeError, ValueError) as error:
        name = (getattr(backbone, "pretrained_cfg", None) or {}).get("architecture", "a model")
        raise ConfigError(
            f"model.image: expected a model whose pooling can be removed, got {name!r} "
            f"({type(error).__name__}: {error}); use a vision transformer, such as "
            "model.image=vit_tiny_patch16_224"
        ) from error
    return backbone
