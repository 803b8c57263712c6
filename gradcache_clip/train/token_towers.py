"""Both towers with a vector for each patch and each token, for losses that compare tokens.

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
    """Vectors of the tokens of B texts, and which of them count."""

    vectors: Tensor
    """(B, R, D)."""
    mask: Tensor
    """bool (B, R), False for padding."""


class PatchTower(ImageTower):
    """An image tower without its pooling: the last layer's vector of each patch.

    Class and register tokens, which stand for no place in the image, are left out; patches have
    seen them all the same. Of a convolutional network each position of the last map is a patch.

    Args:
        tower: its backbone is taken over, and pools no longer.

    Raises:
        ConfigError: a backbone that cannot leave its pooling out.
    """

    def __init__(self, tower: ImageTower) -> None:
        backbone = _without_pooling(tower.backbone)
        super().__init__(backbone, width=backbone.head_hidden_size, mean=(), std=())
        self.mean, self.std = tower.mean, tower.std

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W), uint8 or normalised float, to (B, P, C)."""
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
    """A text tower without pooling, whose texts are all padded to one length.

    All tokens of a text count, the special ones at its ends included; padding does not.

    Args:
        tower: its backbone is taken over.
        length: R, as long as the longest text.
    """

    def __init__(self, tower: TextTower, length: int) -> None:
        super().__init__(tower.backbone, width=tower.width, pool="none")
        self.length = length

    def forward(self, inputs: Mapping[str, Tensor]) -> Tokens:  # type: ignore[override]
        """`input_ids` and `attention_mask`, both (B, R or fewer), to (B, R, C) and their mask."""
        mask = inputs["attention_mask"]
        output = self.backbone(input_ids=inputs["input_ids"], attention_mask=mask)
        hidden: Tensor = output.last_hidden_state
        missing = self.length - hidden.shape[1]
        return Tokens(F.pad(hidden, (0, 0, 0, missing)), F.pad(mask.bool(), (0, missing)))


class TokenEncoder(DualEncoder):
    """A `DualEncoder` whose features are one vector a token, each by the same projection.

    Called as `encoder(0, images)`, which gives a tensor (B, P, D), and as `encoder(1, tokens)`,
    which gives `Tokens`. All texts have one length, so every chunk gives features of one shape,
    and chunks may be trimmed to their longest text.

    Args:
        pair: image and text tower as `build_towers` leaves them; its projections are replaced, and
            what is frozen stays so.
        length: R, `data.context_length`.

    Raises:
        ConfigError: towers that cannot leave their pooling out.

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
        """Ids and mask, (B, R or fewer), to `Tokens` of R, which are not normalised."""
        hidden, mask = self.text_tower(inputs)
        return Tokens(self.text_projection(hidden), mask)


class TokenLoss(nn.Module):
    """`LateInteractionLoss` of what a `TokenEncoder` gives.

    Args:
        loss: of the vectors and the masks.

    Source: Yao et al. 2021 (FILIP), equations 1 to 6.
    """

    def __init__(self, loss: LateInteractionLoss) -> None:
        super().__init__()
        self.loss = loss

    @property
    def logit_scale(self) -> Tensor:
        """The multiplier of the similarity, with its graph."""
        return self.loss.logit_scale

    def forward(self, images: Tensor, texts: Tokens) -> ContrastiveOutput:
        """Vectors of patches (b, P, D) and `Tokens` of b texts; row i of both is one pair."""
        output: ContrastiveOutput = self.loss(images, texts.vectors, text_mask=texts.mask)
        return output


class _ProjectedTokens(nn.Module):
    """The head of a frozen text tower."""

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
            f"model.image: expected a model that can leave its pooling out, got {name!r} "
            f"({type(error).__name__}: {error}); use a vision transformer, such as "
            "model.image=vit_tiny_patch16_224"
        ) from error
    return backbone
