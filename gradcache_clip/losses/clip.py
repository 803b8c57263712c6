"""The CLIP loss as a module. B: pairs of the whole batch, b: pairs of this rank, D: width."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

from gradcache_clip.distributed.collectives import gather_rows
from gradcache_clip.losses.scaled import ScaledLoss, check_has_negatives, check_rows
from gradcache_clip.ops import ClipLossResult, Impl, clip_loss_with_accuracy
from gradcache_clip.ops.arguments import check_integers, check_share
from gradcache_clip.ops.matryoshka import clip_prefix_losses


class ContrastiveOutput(NamedTuple):
    """A loss and how often the right partner wins within the batch, all 0-dim tensors."""

    loss: Tensor
    image_to_text_accuracy: Tensor
    text_to_image_accuracy: Tensor

    @property
    def accuracy(self) -> Tensor:
        """Mean of both directions, between 0 and 1; chance is 1/B."""
        return (self.image_to_text_accuracy + self.text_to_image_accuracy) / 2


class ClipLoss(ScaledLoss):
    """Symmetric cross-entropy over the cosine similarities of B pairs.

    With I and T the L2-normalised features and S = logit_scale * I T^T, the loss is
    (mean_i -log softmax(S)_ii over rows + the same over columns) / 2. S is never stored: memory
    beyond features and gradients is O(B) and one tile. Source: Radford et al. 2021 (CLIP),
    figure 3.

    The scale is learned as `log_logit_scale`, its logarithm, and held at `max_logit_scale` or
    below. Where torch.distributed is initialised, features of all ranks are gathered and every
    rank returns the loss of the global batch.

    Args:
        init_logit_scale: first value of the multiplier of the cosine similarity (1/temperature).
        max_logit_scale: its upper bound; CLIP uses 100.
        normalize: L2-normalise the features first (equation 2 of the CLIP objective).
        label_smoothing: share of the target that is spread evenly over all that compete.
        impl: "auto", "reference", "tiled" or "triton"; see `gradcache_clip.ops.clip_loss`.
        group: process group whose ranks share the batch; the default group when None. With
            `DDPStrategy` it must be the default one.

    Example:
        >>> import torch
        >>> from gradcache_clip import ClipLoss
        >>> out = ClipLoss()(torch.eye(4), torch.eye(4))
        >>> bool(out.loss < 1e-5), float(out.accuracy)
        (True, 1.0)
    """

    def __init__(
        self,
        *,
        init_logit_scale: float = 1 / 0.07,
        max_logit_scale: float = 100.0,
        normalize: bool = True,
        label_smoothing: float = 0.0,
        impl: Impl = "auto",
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(
            init_logit_scale=init_logit_scale,
            max_logit_scale=max_logit_scale,
            normalize=normalize,
            impl=impl,
            group=group,
        )
        check_share("label_smoothing", label_smoothing)
        self.label_smoothing = label_smoothing

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | None = None,
        logit_bias: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        ids: Tensor | None = None,
    ) -> ContrastiveOutput:
        """Loss of all pairs; row i of both inputs belongs together.

        Args:
            image_features: (b, D) floating tensor.
            text_features: (b, D) floating tensor.
            logit_scale: a scale of the caller's own, already exponentiated, in place of the
                module's.
            logit_bias: accepted for callers of open_clip's losses; added to all logits alike it
                changes no softmax, and its gradient is zero.
            labels: (b,) integers; pairs of an equal label are positives of each other.
            ids: (b,) integers; pairs of an equal id are no negatives of each other.

        Raises:
            TypeError: labels or ids that are no integers.
            ValueError: shapes differ, or the whole batch is a single pair.
        """
        images, texts, options = self._global(
            self._global_features, image_features, text_features, labels, ids
        )
        scale = self._bounded_scale(logit_scale)
        result = clip_loss_with_accuracy(images, texts, scale, **options)
        return _output(result, logit_bias)

    def prefixes(
        self,
        widths: Sequence[int],
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | None = None,
        logit_bias: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        ids: Tensor | None = None,
    ) -> list[ContrastiveOutput]:
        """`forward` over prefixes of the features, each normalised anew; see `MatryoshkaLoss`."""
        images, texts, options = self._global(
            partial(gather_rows, group=self.group), image_features, text_features, labels, ids
        )
        scale = self._bounded_scale(logit_scale)
        results = clip_prefix_losses(images, texts, scale, widths, **options)
        return [_output(result, logit_bias) for result in results]

    def _global(
        self,
        gather: Callable[[Tensor], Tensor],
        image_features: Tensor,
        text_features: Tensor,
        labels: Tensor | None,
        ids: Tensor | None,
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Features and options of all ranks, after checks."""
        check_rows(image_features=image_features, text_features=text_features)
        options: dict[str, Any] = {"label_smoothing": self.label_smoothing, "impl": self.impl}
        for name, integers in (("labels", labels), ("ids", ids)):
            if integers is not None:
                check_integers(name, integers, (len(image_features),), image_features.device)
                options[name] = self._global_integers(integers)
        images, texts = gather(image_features), gather(text_features)
        check_has_negatives(images)
        return images, texts, options


def _output(result: ClipLossResult, logit_bias: Tensor | None) -> ContrastiveOutput:
    loss, *accuracies = result
    return ContrastiveOutput(loss if logit_bias is None else loss + 0 * logit_bias, *accuracies)
