"""open_clip's losses with exact gradients in little memory, and its models under `GradCache`.

b: pairs of this rank, D: width, W: world size. Nothing here imports open_clip.
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
    """A loss of ours behind the call of open_clip's: features as they are, the model's scale."""

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
        # In a list, so that its own scale, which is never used, is no parameter of this module.
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
        """Loss of the pairs of all ranks, the same on each; row i of both inputs is one pair.

        Args:
            image_features: (b, D), L2-normalised by the model, as many on every rank.
            text_features: (b, D), L2-normalised by the model.
            logit_scale: the model's multiplier of the cosines, already exponentiated.
            logit_bias: the model's bias, added to all logits; None for none.
            output_dict: return {"contrastive_loss": loss} instead of the loss.

        Raises:
            ValueError: shapes that do not fit together, another rank or number of processes than
                the loss was built for, or, on several processes, the features of a `GradCache`.
            TypeError: a scale or a bias that is no tensor.
        """
        self._check_ranks()
        _check_from_a_model(image_features=image_features, text_features=text_features)
        # DDP divides by W what must be a sum; open_clip's gather multiplies in the same way.
        images = _TimesGradient.apply(image_features, processes())
        texts = _TimesGradient.apply(text_features, processes())
        loss = self.of_all_ranks(images, texts, logit_scale, logit_bias).loss
        return {"contrastive_loss": loss} if output_dict else loss

    def of_all_ranks(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
    ) -> ContrastiveOutput:
        """Loss and in-batch accuracies, with the gradients that a strategy of `GradCache` wants.

        They differ from those of `forward` on several ranks alone, by the factor W for features.
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
                f"rank: expected {dist.get_rank()}, which this process is, got {self.rank}; pass "
                "rank=torch.distributed.get_rank()"
            )


class ClipLoss(_OpenClipLoss):
    """In place of `open_clip.loss.ClipLoss`: the same loss and gradients, no B x B matrix.

    On several processes it is the loss of all pairs, on every rank the same, and the gradients are
    those of open_clip with `gather_with_grad=True`, for a model in DistributedDataParallel: exact,
    that of the scale included. Memory beyond features and gradients is O(B) and one tile.

    Args:
        local_loss: changes nothing. open_clip computes a rank's own rows with it; here each rank
            always computes its own share, and the loss is that of all.
        gather_with_grad: changes nothing; gradients always reach the rank that they belong to.
        cache_labels: changes nothing; there are no labels to keep.
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
    """In place of `open_clip.loss.SigLipLoss`: the same loss and gradients, no B x B matrix.

    On several processes every rank returns the loss of all pairs, which is the mean over the ranks
    of what open_clip's returns, and the gradients after DistributedDataParallel are the same.

    Args:
        cache_labels: changes nothing; there are no labels to keep.
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
    """A model of open_clip as the one encoder of `GradCache`: images are input 0, texts input 1.

    Args:
        model: has `encode_image(images, normalize=True)`, `encode_text(tokens, normalize=True)`,
            `logit_scale` (a logarithm) and, or not, `logit_bias`.

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
        """(B, D) unit features of images (tower 0) or of tokens (tower 1)."""
        model: Any = self.model
        encode = (model.encode_image, model.encode_text)[tower]
        features: Tensor = encode(inputs, normalize=True)
        return features

    def loss_with(
        self, loss: ClipLoss | SigLipLoss
    ) -> Callable[[Tensor, Tensor], ContrastiveOutput]:
        """The loss for `GradCache`, with the scale and the bias that the model learns."""
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
            f"{type(model).__name__} without; pass the model itself, in no wrapper, and on several "
            "processes strategy=AllReduceStrategy()"
        )


def _check_tensors(**given: Any) -> None:
    for name, value in given.items():
        if not isinstance(value, Tensor) and not (name == "logit_bias" and value is None):
            raise TypeError(
                f"{name}: expected a tensor of one element, got {type(value).__name__}; pass "
                f"torch.tensor({name})"
            )


def _check_from_a_model(**features: Tensor) -> None:
    """Raise for features of `GradCache`, whose gradients would be multiplied by W twice."""
    for name, given in features.items():
        cached = given.is_leaf or type(given.grad_fn).__name__ == "_ReplayBackward"
        if processes() > 1 and given.requires_grad and cached:
            raise ValueError(
                f"{name}: expected the output of a model in DistributedDataParallel, got features "
                "that a GradCache has cut off from it; give GradCache "
                "OpenClipTowers(model).loss_with(loss), or call loss.of_all_ranks(...)"
            )


class _TimesGradient(torch.autograd.Function):
    """The features themselves, whose gradient is multiplied."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, factor: int) -> Tensor:
        ctx.factor = factor
        return features.view_as(features)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.factor, None
