"""NT-Xent and SupCon as modules. b: samples of this rank, D: width."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from gradcache_clip.distributed.collectives import check_same_everywhere
from gradcache_clip.distributed.exchange import Exchange
from gradcache_clip.losses.over_ranks import contrast_over_ranks, prefixes_over_ranks
from gradcache_clip.losses.scaled import ScaledLoss, check_rows
from gradcache_clip.ops import Impl
from gradcache_clip.ops.arguments import check_features, check_integers, check_pairs, check_share
from gradcache_clip.ops.groups import occurrences
from gradcache_clip.ops.prefixes import check_widths
from gradcache_clip.ops.self_contrast import (
    classes_pairing,
    nt_xent_result,
    sup_con_result,
    views_pairing,
)


class SelfContrastOutput(NamedTuple):
    """A loss and how often a positive wins within the batch, 0-dim tensors."""

    loss: Tensor
    accuracy: Tensor


class NTXentLoss(ScaledLoss):
    """Cross-entropy of each of 2B views over all others, its partner being the right answer.

    See `gradcache_clip.ops.nt_xent_loss`; the 2B x 2B matrix is never stored. Source: Chen et al.
    2020 (SimCLR), equation 1.

    Args:
        tau_plus: share of positives among the negatives that the debiased loss takes out.
        init_logit_scale: first value of the learned multiplier (1/temperature); SimCLR uses 2 to
            10, fixed.
        max_logit_scale: its upper bound.
        normalize: L2-normalise the features first.
        impl: "auto", "reference", "tiled" or "triton".
        group: process group whose ranks share the batch; the default group when None.
        exchange: "gather" or "ring": how features of other ranks arrive; see `ClipLoss`.

    Example:
        >>> import torch
        >>> from gradcache_clip import NTXentLoss
        >>> out = NTXentLoss(init_logit_scale=2.0)(torch.eye(4), torch.eye(4))
        >>> print(f"{out.loss:.4f} {out.accuracy:.1f}")
        0.5944 1.0
    """

    def __init__(
        self,
        *,
        tau_plus: float = 0.0,
        init_logit_scale: float = 1 / 0.07,
        max_logit_scale: float = 100.0,
        normalize: bool = True,
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
        check_share("tau_plus", tau_plus)
        self.tau_plus = tau_plus

    def forward(
        self, features_a: Tensor, features_b: Tensor, logit_scale: Tensor | None = None
    ) -> SelfContrastOutput:
        """Loss of all views; row i of both inputs are two views of one sample.

        Args:
            features_a: (b, D) floating tensor.
            features_b: (b, D) floating tensor.
            logit_scale: a scale of the caller's own in place of the module's.

        Raises:
            ValueError: shapes differ.
        """
        views = self._views(self._unit(features_a), self._unit(features_b))
        scale, pairing = self._scale_for(logit_scale, views), views_pairing(len(views) // 2)
        statistics = contrast_over_ranks(
            "nt_xent_loss", views, views, scale, pairing, self.impl, self.ranks
        )
        return SelfContrastOutput(*nt_xent_result(statistics, scale, self.tau_plus))

    def prefixes(
        self,
        widths: Sequence[int],
        features_a: Tensor,
        features_b: Tensor,
        logit_scale: Tensor | None = None,
    ) -> list[SelfContrastOutput]:
        """`forward` over prefixes of the features, each normalised anew; see `MatryoshkaLoss`."""
        views = self._views(features_a, features_b)
        check_widths("widths", widths, views.shape[1])
        scale, pairing = self._scale_for(logit_scale, views), views_pairing(len(views) // 2)
        each = prefixes_over_ranks(
            "nt_xent_loss", views, views, scale, pairing, widths, self.impl, self.ranks
        )
        results = (nt_xent_result(statistics, scale, self.tau_plus) for statistics in each)
        return [SelfContrastOutput(*result) for result in results]

    def _views(self, features_a: Tensor, features_b: Tensor) -> Tensor:
        """Both views of this rank's samples, after checks."""
        check_rows(features_a=features_a, features_b=features_b)
        check_pairs(("features_a", "features_b"), features_a, features_b)
        check_same_everywhere(self.group, features_a=features_a, features_b=features_b)
        return torch.cat((features_a, features_b))


class SupConLoss(ScaledLoss):
    """Cross-entropy of each row over all others, rows of its label sharing the target evenly.

    See `gradcache_clip.ops.sup_con_loss`; neither the matrix nor a mask of labels is ever stored.
    Source: Khosla et al. 2020, equation 2.

    Args:
        init_logit_scale: first value of the learned multiplier (1/temperature).
        max_logit_scale: its upper bound.
        normalize: L2-normalise the features first.
        impl: "auto", "reference", "tiled" or "triton".
        group: process group whose ranks share the batch; the default group when None.
        exchange: "gather" or "ring": how features of other ranks arrive; see `ClipLoss`.

    Example:
        >>> import torch
        >>> from gradcache_clip import SupConLoss
        >>> labels = torch.tensor([0, 1, 0, 1])
        >>> out = SupConLoss(init_logit_scale=2.0)(torch.eye(2).repeat(2, 1), labels)
        >>> print(f"{out.loss:.4f} {out.accuracy:.1f}")
        0.2395 1.0
    """

    def forward(
        self, features: Tensor, labels: Tensor, logit_scale: Tensor | None = None
    ) -> SelfContrastOutput:
        """Loss of all rows that share their label with another one.

        Args:
            features: (n, D) floating tensor; views of a sample are rows of one label.
            labels: (n,) integers.
            logit_scale: a scale of the caller's own in place of the module's.

        Raises:
            TypeError: labels that are no integers.
            ValueError: shapes that do not fit together.
        """
        labels = self._checked(features, labels)
        features = self._unit(features)
        scale, pairing = self._scale_for(logit_scale, features), classes_pairing(labels)
        statistics = contrast_over_ranks(
            "sup_con_loss", features, features, scale, pairing, self.impl, self.ranks
        )
        return SelfContrastOutput(*sup_con_result(statistics, occurrences(labels, labels) - 1))

    def prefixes(
        self,
        widths: Sequence[int],
        features: Tensor,
        labels: Tensor,
        logit_scale: Tensor | None = None,
    ) -> list[SelfContrastOutput]:
        """`forward` over prefixes of the features, each normalised anew; see `MatryoshkaLoss`."""
        labels = self._checked(features, labels)
        check_widths("widths", widths, features.shape[1])
        scale, pairing = self._scale_for(logit_scale, features), classes_pairing(labels)
        each = prefixes_over_ranks(
            "sup_con_loss",
            features,
            features,
            scale,
            pairing,
            widths,
            self.impl,
            self.ranks,
        )
        positives = occurrences(labels, labels) - 1
        return [SelfContrastOutput(*sup_con_result(statistics, positives)) for statistics in each]

    def _checked(self, features: Tensor, labels: Tensor) -> Tensor:
        """Labels of all ranks, after checks."""
        check_rows(features=features)
        check_features("features", features)
        check_integers("labels", labels, (len(features),), features.device)
        check_same_everywhere(self.group, features=features, labels=labels)
        return self.ranks.joined(labels)
