"""NT-Xent and SupCon as modules. b: samples of this rank, D: width."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor

from gradcache_clip.distributed.collectives import gather_rows
from gradcache_clip.losses.scaled import ScaledLoss, check_rows
from gradcache_clip.ops import Impl, nt_xent_loss_with_accuracy, sup_con_loss_with_accuracy
from gradcache_clip.ops.arguments import check_integers, check_share
from gradcache_clip.ops.matryoshka import nt_xent_prefix_losses, sup_con_prefix_losses


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
    ) -> None:
        super().__init__(
            init_logit_scale=init_logit_scale,
            max_logit_scale=max_logit_scale,
            normalize=normalize,
            impl=impl,
            group=group,
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
        check_rows(features_a=features_a, features_b=features_b)
        return SelfContrastOutput(
            *nt_xent_loss_with_accuracy(
                self._global_features(features_a),
                self._global_features(features_b),
                self._bounded_scale(logit_scale),
                tau_plus=self.tau_plus,
                impl=self.impl,
            )
        )

    def prefixes(
        self,
        widths: Sequence[int],
        features_a: Tensor,
        features_b: Tensor,
        logit_scale: Tensor | None = None,
    ) -> list[SelfContrastOutput]:
        """`forward` over prefixes of the features, each normalised anew; see `MatryoshkaLoss`."""
        check_rows(features_a=features_a, features_b=features_b)
        results = nt_xent_prefix_losses(
            gather_rows(features_a, self.group),
            gather_rows(features_b, self.group),
            self._bounded_scale(logit_scale),
            widths,
            tau_plus=self.tau_plus,
            impl=self.impl,
        )
        return [SelfContrastOutput(*result) for result in results]


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
        check_rows(features=features)
        check_integers("labels", labels, (len(features),), features.device)
        return SelfContrastOutput(
            *sup_con_loss_with_accuracy(
                self._global_features(features),
                self._global_integers(labels),
                self._bounded_scale(logit_scale),
                impl=self.impl,
            )
        )

    def prefixes(
        self,
        widths: Sequence[int],
        features: Tensor,
        labels: Tensor,
        logit_scale: Tensor | None = None,
    ) -> list[SelfContrastOutput]:
        """`forward` over prefixes of the features, each normalised anew; see `MatryoshkaLoss`."""
        check_rows(features=features)
        check_integers("labels", labels, (len(features),), features.device)
        results = sup_con_prefix_losses(
            gather_rows(features, self.group),
            self._global_integers(labels),
            self._bounded_scale(logit_scale),
            widths,
            impl=self.impl,
        )
        return [SelfContrastOutput(*result) for result in results]
