"""The CLIP loss as a module. B: pairs of the whole batch, b: pairs of this rank, D: width."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor

from gradcache_clip.distributed.collectives import check_same_everywhere, gather_rows
from gradcache_clip.distributed.exchange import Exchange
from gradcache_clip.losses.over_ranks import contrast_over_ranks, prefixes_over_ranks
from gradcache_clip.losses.scaled import ScaledLoss, check_has_negatives, check_rows
from gradcache_clip.ops import ClipLossResult, Impl
from gradcache_clip.ops.arguments import check_integers, check_pairs, check_share
from gradcache_clip.ops.clip import ClipTargets, clip_result
from gradcache_clip.ops.pairing import Pairing
from gradcache_clip.ops.prefixes import check_widths
from gradcache_clip.ops.prefixes_reference import unit_prefix


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
    below. Where torch.distributed is initialised the batch is that of all ranks: each computes its
    share of S, and every rank returns the loss of the global batch.

    Args:
        init_logit_scale: first value of the multiplier of the cosine similarity (1/temperature).
        max_logit_scale: its upper bound; CLIP uses 100.
        normalize: L2-normalise the features first (equation 2 of the CLIP objective).
        label_smoothing: share of the target that is spread evenly over all that compete.
        impl: "auto", "reference", "tiled" or "triton"; see `gradcache_clip.ops.clip_loss`.
        group: process group whose ranks share the batch; the default group when None. With
            `DDPStrategy` it must be the default one.
        exchange: how features of other ranks arrive: "gather" holds all of them on each rank,
            "ring" passes them on from rank to rank and never holds those of more than two others.
            Label smoothing gathers them.

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
        exchange: Exchange = "gather",
    ) -> None:
        super().__init__(
            init_logit_scale=init_logit_scale,
            max_logit_scale=max_logit_scale,
            normalize=normalize,
            impl=impl,
            group=group,
            exchange=exchange,
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
        q, k, labels, ids = self._checked(image_features, text_features, labels, ids)
        q, k = self._unit(q), self._unit(k)
        scale, pairing = self._scale_for(logit_scale, q, k), Pairing(labels, labels, ids, ids)
        statistics = contrast_over_ranks("clip_loss", q, k, scale, pairing, self.impl, self.ranks)
        targets = ClipTargets(labels, ids, self.label_smoothing)
        result = clip_result(statistics, targets, *self._smoothed_over(q, k), scale)
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
        q, k, labels, ids = self._checked(image_features, text_features, labels, ids)
        check_widths("widths", widths, q.shape[1])
        scale, pairing = self._scale_for(logit_scale, q, k), Pairing(labels, labels, ids, ids)
        each = prefixes_over_ranks("clip_loss", q, k, scale, pairing, widths, self.impl, self.ranks)
        targets = ClipTargets(labels, ids, self.label_smoothing)
        outputs = []
        for statistics, width in zip(each, widths, strict=True):
            smoothed = self._smoothed_over(q, k, width)
            outputs.append(_output(clip_result(statistics, targets, *smoothed, scale), logit_bias))
        return outputs

    def _checked(
        self,
        image_features: Tensor,
        text_features: Tensor,
        labels: Tensor | None,
        ids: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Features of this rank, labels and ids of all ranks, after checks."""
        check_rows(image_features=image_features, text_features=text_features)
        check_pairs(("image_features", "text_features"), image_features, text_features)
        given = {"labels": labels, "ids": ids}
        for name, integers in given.items():
            if integers is not None:
                check_integers(name, integers, (len(image_features),), image_features.device)
        check_same_everywhere(
            self.group, image_features=image_features, text_features=text_features, **given
        )
        check_has_negatives(len(image_features) * self.ranks.size)
        labels, ids = (None if each is None else self.ranks.joined(each) for each in given.values())
        return image_features, text_features, labels, ids

    def _smoothed_over(
        self, q: Tensor, k: Tensor, width: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Features of all ranks whose mean logits smoothing needs; any will do where it is off."""
        if self.label_smoothing == 0:
            return q, k
        if width is not None:
            q, k = unit_prefix(q, width), unit_prefix(k, width)
        return gather_rows(q, self.group), gather_rows(k, self.group)


def _output(result: ClipLossResult, logit_bias: Tensor | None) -> ContrastiveOutput:
    loss, *accuracies = result
    return ContrastiveOutput(loss if logit_bias is None else loss + 0 * logit_bias, *accuracies)
