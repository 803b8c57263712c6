"""Replacements for open_clip's losses that need little memory, and its models in `GradCache`.

b: pairs of this rank, D: width. Does not import open_clip.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from gradcache_clip import losses
from gradcache_clip.distributed.exchange import Exchange
from gradcache_clip.integrations.open_clip_base import (
    OpenClipLoss,
    SoftmaxLoss,
    check_features,
    check_scalars,
    scaled,
)
from gradcache_clip.integrations.open_clip_two_losses import CoCaLoss, DistillClipLoss
from gradcache_clip.losses import ContrastiveOutput
from gradcache_clip.losses.options import check_positive_int

__all__ = ["ClipLoss", "CoCaLoss", "DistillClipLoss", "OpenClipTowers", "SigLipLoss"]

_EXCHANGES: dict[str, Exchange] = {
    "bidir": "ring",
    "shift": "ring",
    "reduce": "gather",
    "gather": "gather",
}


class ClipLoss(SoftmaxLoss):
    """Replaces `open_clip.loss.ClipLoss`: same loss and gradients, without a B x B matrix.

    On several processes the loss covers all pairs and is equal on every rank. Gradients are those
    of open_clip with `gather_with_grad=True` for a model in DistributedDataParallel: exact, also
    for the scale. Memory beyond features and gradients: O(B) and one tile.

    Args:
        local_loss: changes `get_logits` alone. With it, open_clip computes the loss of a rank's own
            rows; here each rank always computes its share, and the loss covers all.
        gather_with_grad: ignored; gradients always reach the rank that they belong to.
        cache_labels: ignored; there are no labels.
        rank: number of this process.
        world_size: processes that share the batch.
        use_horovod: must be False.
        exchange: how features of other ranks arrive, "gather" or "ring"; see
            `gradcache_clip.ClipLoss`.

    Raises:
        ValueError: `use_horovod`, or an unknown exchange.

    Source: Radford et al. 2021 (CLIP), figure 3.

    Example:
        >>> import torch
        >>> from gradcache_clip.integrations.open_clip import ClipLoss
        >>> loss = ClipLoss()(torch.eye(4), torch.eye(4), torch.tensor(2.0))
        >>> print(f"{loss:.4f}")
        0.3408
    """

    feature_arguments = "image_features", "text_features"

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """Compute the loss over the pairs of all ranks, the same on each; rows i form a pair.

        Args:
            image_features: (b, D), L2-normalised by the model, with equal b on every rank.
            text_features: (b, D), L2-normalised by the model.
            logit_scale: the model's multiplier of the cosines, already exponentiated.
            logit_bias: the model's bias, added to all logits, or None.
            output_dict: return {"contrastive_loss": loss} instead of the loss.

        Raises:
            ValueError: shapes that do not match, a rank or world size other than the loss was
                built for, a single pair, or, on several processes, features from a `GradCache`.
            TypeError: a scale or bias that is not a tensor.
        """
        loss = self.contrastive(image_features, text_features, logit_scale, logit_bias)
        return {"contrastive_loss": loss} if output_dict else loss


class SigLipLoss(OpenClipLoss):
    """Replaces `open_clip.loss.SigLipLoss`: same loss and gradients, without a B x B matrix.

    On several processes every rank returns the loss over all pairs, which is the mean over ranks of
    open_clip's, and gradients after DistributedDataParallel are equal.

    Args:
        cache_labels: ignored; there are no labels.
        rank: number of this process.
        world_size: processes that share the batch.
        dist_impl: how features of other ranks arrive: "bidir" (also None) and "shift" pass them
            round a ring, "gather" and "reduce" hold those of all ranks. The results are equal.
        chunk_size: ignored; forward and backward hold one tile of logits whatever it is.

    Raises:
        ValueError: an unknown `dist_impl`, or a negative `chunk_size`.

    Source: Zhai et al. 2023, "Sigmoid loss for language image pre-training", algorithm 1.

    Example:
        >>> import torch
        >>> from gradcache_clip.integrations.open_clip import SigLipLoss
        >>> scale, bias = torch.tensor(10.0), torch.tensor(-10.0)
        >>> loss = SigLipLoss()(torch.eye(4), torch.eye(4), scale, bias)
        >>> print(f"{loss:.4f}")
        0.6933
    """

    feature_arguments = "image_features", "text_features"

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        chunk_size: int = 0,
    ) -> None:
        dist_impl = dist_impl or "bidir"
        if dist_impl not in _EXCHANGES:
            raise ValueError(
                f"dist_impl: expected 'bidir', 'shift', 'reduce', 'gather' or None, got "
                f"{dist_impl!r}; leave it out to pass features round a ring"
            )
        if chunk_size:
            check_positive_int("chunk_size", chunk_size, "leave it out: it has no effect here")
        loss = losses.SigLipLoss(normalize=False, exchange=_EXCHANGES[dist_impl])
        super().__init__(loss, cache_labels, rank, world_size)
        self.dist_impl, self.chunk_size = dist_impl, chunk_size

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """Compute the loss over the pairs of all ranks; see `ClipLoss.forward`.

        A batch may be a single pair.
        """
        loss = self.contrastive(image_features, text_features, logit_scale, logit_bias)
        return {"contrastive_loss": loss} if output_dict else loss

    def get_logits(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
    ) -> Tensor:
        """Return the logits of these images and texts, for evaluation; the loss never does."""
        check_features(image_features=image_features, text_features=text_features)
        check_scalars(logit_scale=logit_scale, logit_bias=logit_bias)
        return scaled(image_features @ text_features.T, logit_scale, logit_bias)


class OpenClipTowers(nn.Module):
    """Wraps an open_clip model as encoder for `GradCache`: images are input 0, texts input 1.

    Args:
        model: has `encode_image(images, normalize=True)`, `encode_text(tokens, normalize=True)`,
            `logit_scale` (a logarithm) and optionally `logit_bias`.

    Example:
        import open_clip
        model = open_clip.create_model("ViT-B-32")
        towers = OpenClipTowers(model)
        cache = GradCache(towers, towers.loss_with(ClipLoss()), chunk_size=64)
        out = cache(images, tokens)     # fills .grad of all of the model; out.loss, out.accuracy
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        _check_model(model)
        self.model = model

    def forward(self, tower: int, inputs: Tensor) -> Tensor:
        """Return unit features (B, D) of images (tower 0) or tokens (tower 1)."""
        model: Any = self.model
        encode = (model.encode_image, model.encode_text)[tower]
        features: Tensor = encode(inputs, normalize=True)
        return features

    def loss_with(
        self, loss: ClipLoss | SigLipLoss
    ) -> Callable[[Tensor, Tensor], ContrastiveOutput]:
        """Return the loss for `GradCache`, with the model's learned scale and bias."""
        model: Any = self.model
        if not isinstance(loss, (ClipLoss, SigLipLoss)):
            raise TypeError(
                "loss: expected ClipLoss() or SigLipLoss() of "
                f"gradcache_clip.integrations.open_clip, got {type(loss).__name__} of "
                f"{type(loss).__module__}; import it from here, and let the loss of captions or of "
                "a teacher be a term of your own loss"
            )

        def with_scale(image_features: Tensor, text_features: Tensor) -> ContrastiveOutput:
            bias = getattr(model, "logit_bias", None)
            return loss.of_all_ranks(image_features, text_features, model.logit_scale.exp(), bias)

        return with_scale


def _check_model(model: Any) -> None:
    missing = [n for n in ("encode_image", "encode_text", "logit_scale") if not hasattr(model, n)]
    if missing:
        raise TypeError(
            f"model: expected a model of open_clip with {', '.join(missing)}, got "
            f"{type(model).__name__} without; pass the model itself without a wrapper, and on "
            "several processes strategy=AllReduceStrategy()"
        )
