"""Replacements for open_clip's losses that need little memory, and its models in `GradCache`.

b: pairs of this rank, D: width, W: world size. Does not import open_clip.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gradcache_clip import losses
from gradcache_clip.distributed import world_size as processes
from gradcache_clip.distributed.exchange import Exchange
from gradcache_clip.integrations.arguments import check_positive_int
from gradcache_clip.losses import ContrastiveOutput

_EXCHANGES: dict[str | None, Exchange] = {
    None: "ring",
    "bidir": "ring",
    "shift": "ring",
    "reduce": "gather",
    "gather": "gather",
}


class _OpenClipLoss(nn.Module):
    """One of our losses with open_clip's signature: normalised features, and the model's scale."""

    def __init__(
        self, loss: losses.ClipLoss | losses.SigLipLoss, rank: int, world_size: int
    ) -> None:
        super().__init__()
        check_positive_int("world_size", world_size, "pass torch.distributed.get_world_size()")
        if not isinstance(rank, int) or not 0 <= rank < world_size:
            raise ValueError(
                f"rank: expected an integer from 0 to world_size - 1 = {world_size - 1}, got "
                f"{rank!r}; pass torch.distributed.get_rank()"
            )
        # In a list, so that its unused scale is not a parameter of this module.
        self._loss = [loss]
        self.rank, self.world_size = rank, world_size

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
                built for, or, on several processes, features from a `GradCache`.
            TypeError: a scale or bias that is not a tensor.
        """
        self._check_ranks()
        _check_from_a_model(image_features=image_features, text_features=text_features)
        # DDP averages over W ranks where the sum is needed; open_clip's gather also multiplies.
        images = _ScaleGradient.apply(image_features, processes())
        texts = _ScaleGradient.apply(text_features, processes())
        loss = self.of_all_ranks(images, texts, logit_scale, logit_bias).loss
        return {"contrastive_loss": loss} if output_dict else loss

    def of_all_ranks(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
    ) -> ContrastiveOutput:
        """Compute loss and in-batch accuracies, with gradients for a strategy of `GradCache`.

        On several ranks, feature gradients are smaller than those of `forward` by the factor W.
        """
        self._check_ranks()
        _check_tensors(logit_scale=logit_scale, logit_bias=logit_bias)
        bias = image_features.new_zeros(()) if logit_bias is None else logit_bias
        output: ContrastiveOutput = self._loss[0](
            image_features, text_features, logit_scale, bias.reshape(())
        )
        return output

    def _check_ranks(self) -> None:
        if self.world_size != processes():
            raise ValueError(
                f"world_size: expected {processes()}, the processes that share the batch, got "
                f"{self.world_size}; pass world_size=torch.distributed.get_world_size()"
            )
        if processes() > 1 and self.rank != dist.get_rank():
            raise ValueError(
                f"rank: expected {dist.get_rank()}, the rank of this process, got {self.rank}; "
                "pass rank=torch.distributed.get_rank()"
            )


class ClipLoss(_OpenClipLoss):
    """Replaces `open_clip.loss.ClipLoss`: same loss and gradients, without a B x B matrix.

    On several processes the loss covers all pairs and is equal on every rank. Gradients are those
    of open_clip with `gather_with_grad=True` for a model in DistributedDataParallel: exact, also
    for the scale. Memory beyond features and gradients: O(B) and one tile.

    Args:
        local_loss: ignored. With it, open_clip computes the loss of a rank's own rows; here each
            rank always computes its share, and the loss covers all.
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

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        *,
        exchange: Exchange = "gather",
    ) -> None:
        if use_horovod:
            raise ValueError(
                "use_horovod: expected False, got True; processes exchange features through "
                "torch.distributed: start them with torchrun"
            )
        super().__init__(losses.ClipLoss(normalize=False, exchange=exchange), rank, world_size)


class SigLipLoss(_OpenClipLoss):
    """Replaces `open_clip.loss.SigLipLoss`: same loss and gradients, without a B x B matrix.

    On several processes every rank returns the loss over all pairs, which is the mean over ranks of
    open_clip's, and gradients after DistributedDataParallel are equal.

    Args:
        cache_labels: ignored; there are no labels.
        rank: number of this process.
        world_size: processes that share the batch.
        dist_impl: how features of other ranks arrive: "bidir" (also None) and "shift" pass them
            round a ring, "gather" and "reduce" hold those of all ranks. The results are equal.

    Raises:
        ValueError: an unknown `dist_impl`.

    Source: Zhai et al. 2023, "Sigmoid loss for language image pre-training", algorithm 1.

    Example:
        >>> import torch
        >>> from gradcache_clip.integrations.open_clip import SigLipLoss
        >>> scale, bias = torch.tensor(10.0), torch.tensor(-10.0)
        >>> loss = SigLipLoss()(torch.eye(4), torch.eye(4), scale, bias)
        >>> print(f"{loss:.4f}")
        0.6933
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
    ) -> None:
        if dist_impl not in _EXCHANGES:
            raise ValueError(
                f"dist_impl: expected 'bidir', 'shift', 'reduce', 'gather' or None, got "
                f"{dist_impl!r}; leave it out to pass features round a ring"
            )
        exchange = _EXCHANGES[dist_impl]
        super().__init__(losses.SigLipLoss(normalize=False, exchange=exchange), rank, world_size)


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
        if not isinstance(loss, _OpenClipLoss):
            raise TypeError(
                "loss: expected ClipLoss() or SigLipLoss() of "
                f"gradcache_clip.integrations.open_clip, got {type(loss).__name__} of "
                f"{type(loss).__module__}; import it from here"
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


def _check_tensors(**given: Any) -> None:
    for name, value in given.items():
        if not isinstance(value, Tensor) and not (name == "logit_bias" and value is None):
            raise TypeError(
                f"{name}: expected a tensor of one element, got {type(value).__name__}; pass "
                f"torch.tensor({name})"
            )


def _check_from_a_model(**features: Tensor) -> None:
    """Raise ValueError for features from `GradCache`: their gradients would be scaled twice."""
    for name, given in features.items():
        cached = given.is_leaf or type(given.grad_fn).__name__ == "_ReplayBackward"
        if processes() > 1 and given.requires_grad and cached:
            raise ValueError(
                f"{name}: expected the output of a model in DistributedDataParallel, got features "
                "that a GradCache has detached from it; give GradCache "
                "OpenClipTowers(model).loss_with(loss), or call loss.of_all_ranks(...)"
            )


class _ScaleGradient(torch.autograd.Function):
    """Identity whose backward multiplies the gradient by a factor."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, factor: int) -> Tensor:
        ctx.factor = factor
        return features.view_as(features)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.factor, None
