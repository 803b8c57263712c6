"""NT-Xent and SupCon as modules. b: samples of this rank, D: width."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gradcache_clip.distributed.collectives import check_same_everywhere
from gradcache_clip.losses.scaled import ScaledLoss, ScaleOptions, check_has_negatives
from gradcache_clip.ops.arguments import check_features, check_integers, check_pairs, check_share
from gradcache_clip.ops.results import SelfContrastOutput
from gradcache_clip.ops.self_contrast import (
    classes_pairing,
    nt_xent_result,
    sup_con_result,
    views_pairing,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack


class NTXentLoss(ScaledLoss):
    """Cross-entropy of each of 2B views over all others, with its partner as the target.

    See `gradcache_clip.ops.nt_xent_loss_with_accuracy`; the 2B x 2B matrix is never stored. Source:
    Chen et al. 2020 (SimCLR), equation 1, which fixes the scale at 2 to 10.

    Args:
        tau_plus: share of positives among the negatives that the debiased loss subtracts.
        **options: `init_logit_scale=1/0.07`, `max_logit_scale=100`, `normalize=True`,
            `impl="auto"`, `group=None`, `exchange="gather"`; see `ScaledLoss`.

    Example:
        >>> import torch
        >>> from gradcache_clip import NTXentLoss
        >>> out = NTXentLoss(init_logit_scale=2.0)(torch.eye(4), torch.eye(4))
        >>> print(f"{out.loss:.4f} {out.accuracy:.1f}")
        0.5944 1.0
    """

    feature_arguments = "features_a", "features_b"

    def __init__(self, *, tau_plus: float = 0.0, **options: Unpack[ScaleOptions]) -> None:
        super().__init__(**options)
        check_share("tau_plus", tau_plus)
        self.tau_plus = tau_plus

    def forward(
        self, features_a: Tensor, features_b: Tensor, logit_scale: Tensor | None = None
    ) -> SelfContrastOutput:
        """Compute the loss of all views; row i of both inputs are two views of one sample.

        Args:
            features_a: (b, D) floating tensor.
            features_b: (b, D) floating tensor.
            logit_scale: a scale of the caller's own in place of the module's.

        Raises:
            ValueError: shapes differ, or the whole batch is a single pair.
        """
        return self.prefixes(None, features_a, features_b, logit_scale)[0]

    def prefixes(
        self,
        widths: Sequence[int] | None,
        features_a: Tensor,
        features_b: Tensor,
        logit_scale: Tensor | None = None,
    ) -> list[SelfContrastOutput]:
        """Compute `forward`, or with widths that of each prefix; see `MatryoshkaLoss`."""
        check_pairs(("features_a", "features_b"), features_a, features_b)
        check_same_everywhere(self.group, features_a=features_a, features_b=features_b)
        check_has_negatives(len(features_a) * self.ranks.size)
        views = torch.cat(self._prepared(widths, features_a, features_b))
        scale, pairing = self._scale_for(logit_scale, views), views_pairing(len(features_a))
        each = self._statistics("nt_xent_loss", views, views, scale, pairing, widths)
        return [nt_xent_result(statistics, scale, self.tau_plus) for statistics in each]


class SupConLoss(ScaledLoss):
    """Cross-entropy of each row over all others, uniform over the rows of its label.

    See `gradcache_clip.ops.sup_con_loss_with_accuracy`; neither the matrix nor a mask of labels is
    ever stored. Source: Khosla et al. 2020, equation 2.

    Args:
        **options: `init_logit_scale=1/0.07`, `max_logit_scale=100`, `normalize=True`,
            `impl="auto"`, `group=None`, `exchange="gather"`; see `ScaledLoss`.

    Example:
        >>> import torch
        >>> from gradcache_clip import SupConLoss
        >>> labels = torch.tensor([0, 1, 0, 1])
        >>> out = SupConLoss(init_logit_scale=2.0)(torch.eye(2).repeat(2, 1), labels)
        >>> print(f"{out.loss:.4f} {out.accuracy:.1f}")
        0.2395 1.0
    """

    feature_arguments = ("features",)

    def forward(
        self, features: Tensor, labels: Tensor, logit_scale: Tensor | None = None
    ) -> SelfContrastOutput:
        """Compute the loss of all rows that share their label with another one.

        Args:
            features: (n, D) floating tensor; views of a sample are rows with one label.
            labels: (n,) integers.
            logit_scale: a scale of the caller's own in place of the module's.

        Raises:
            TypeError: labels that are not integers.
            ValueError: shapes that do not fit together, or the whole batch has less than 3 rows.
        """
        return self.prefixes(None, features, labels, logit_scale)[0]

    def prefixes(
        self,
        widths: Sequence[int] | None,
        features: Tensor,
        labels: Tensor,
        logit_scale: Tensor | None = None,
    ) -> list[SelfContrastOutput]:
        """Compute `forward`, or with widths that of each prefix; see `MatryoshkaLoss`."""
        check_features("features", features)
        check_integers("labels", labels, (len(features),), features.device)
        check_same_everywhere(self.group, features=features, labels=labels)
        # Two rows are one pair, or no pair at all.
        check_has_negatives((len(features) * self.ranks.size + 1) // 2)
        labels = self.ranks.joined(labels)
        (q,) = self._prepared(widths, features)
        scale, pairing = self._scale_for(logit_scale, q), classes_pairing(labels)
        each = self._statistics("sup_con_loss", q, q, scale, pairing, widths)
        return [sup_con_result(statistics, labels) for statistics in each]
