"""The base of the replacements for open_clip's losses.

b: pairs of this rank, B: of all ranks, D: width, W: world size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gradcache_clip import losses
from gradcache_clip.distributed import world_size as processes
from gradcache_clip.distributed.collectives import gather_rows, with_summed_gradient
from gradcache_clip.distributed.exchange import Exchange
from gradcache_clip.losses import ContrastiveOutput
from gradcache_clip.losses.options import check_flags, check_positive_int


class OpenClipLoss(nn.Module):
    """One of our losses with open_clip's signature: normalised features, and the model's scale."""

    def __init__(
        self,
        loss: losses.ClipLoss | losses.SigLipLoss,
        cache_labels: bool,
        rank: int,
        world_size: int,
    ) -> None:
        super().__init__()
        check_positive_int("world_size", world_size, "pass torch.distributed.get_world_size()")
        if not isinstance(rank, int) or not 0 <= rank < world_size:
            raise ValueError(
                f"rank: expected an integer from 0 to world_size - 1 = {world_size - 1}, got "
                f"{rank!r}; pass torch.distributed.get_rank()"
            )
        # In a list, so that its unused scale is not a parameter of this module.
        self._contrast = [loss]
        self.cache_labels, self.rank, self.world_size = cache_labels, rank, world_size

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
        check_scalars(logit_scale=logit_scale, logit_bias=logit_bias)
        bias = image_features.new_zeros(()) if logit_bias is None else logit_bias
        output: ContrastiveOutput = self._contrast[0](
            image_features, text_features, logit_scale, bias.reshape(())
        )
        return output

    def contrastive(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
    ) -> Tensor:
        """Compute the contrastive loss, with gradients for a model in DistributedDataParallel."""
        features = self.for_ddp(image_features, text_features)
        return self.of_all_ranks(*features, logit_scale, logit_bias).loss

    def for_ddp(self, image_features: Tensor, text_features: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features, whose gradients will be multiplied by W."""
        self._check_ranks()
        check_features(image_features=image_features, text_features=text_features)
        _check_from_a_model(image_features=image_features, text_features=text_features)
        # DDP averages over W ranks where the sum is needed; open_clip's gather also multiplies.
        images = _ScaleGradient.apply(image_features, processes())
        return images, _ScaleGradient.apply(text_features, processes())

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


class SoftmaxLoss(OpenClipLoss):
    """The options and the logits that `ClipLoss`, `CoCaLoss` and `DistillClipLoss` share."""

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
        check_flags(local_loss=local_loss)
        loss = losses.ClipLoss(normalize=False, exchange=exchange)
        super().__init__(loss, cache_labels, rank, world_size)
        self.local_loss, self.gather_with_grad = local_loss, gather_with_grad
        self.use_horovod = False

    def get_logits(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the logits of images and of texts over all pairs, for evaluation.

        The loss never calls this: both are (B, B) or, with `local_loss` on several processes, this
        rank's (b, B). Gradients are those of `gather_with_grad=True`.
        """
        self._check_ranks()
        check_features(image_features=image_features, text_features=text_features)
        check_scalars(logit_scale=logit_scale, logit_bias=logit_bias)
        all_images, all_texts = (
            with_summed_gradient(gather_rows(each)) for each in (image_features, text_features)
        )
        if self.local_loss:
            each = image_features @ all_texts.T, text_features @ all_images.T
        else:
            each = all_images @ all_texts.T, all_texts @ all_images.T
        per_image, per_text = (scaled(logits, logit_scale, logit_bias) for logits in each)
        return per_image, per_text


def scaled(products: Tensor, logit_scale: Tensor, logit_bias: Tensor | None) -> Tensor:
    """Return logits in the dtype of the features' products."""
    logits = logit_scale * products
    return logits if logit_bias is None else logits + logit_bias


def check_features(**given: Any) -> None:
    for name, value in given.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            got = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{name}: expected a floating tensor, got {got}; pass the model's own")


def check_scalars(**given: Any) -> None:
    for name, value in given.items():
        if not isinstance(value, Tensor) and not (name == "logit_bias" and value is None):
            raise TypeError(
                f"{name}: expected a tensor of one element, got {type(value).__name__}; pass "
                f"torch.tensor({name})"
            )
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(
                f"{name}: expected one element, got shape {tuple(value.shape)}; pass the model's "
                "own"
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
