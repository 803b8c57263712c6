"""The CLIP loss as a module. B: pairs of the whole batch, b: pairs of this rank, D: width."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from gradcache_clip.distributed.collectives import check_same_everywhere, gather_rows
from gradcache_clip.losses.scaled import ScaledLoss, ScaleOptions, check_has_negatives
from gradcache_clip.ops.arguments import check_integers, check_pairs, check_share
from gradcache_clip.ops.clip import ClipTargets, clip_result
from gradcache_clip.ops.pairing import Pairing
from gradcache_clip.ops.results import ContrastiveOutput
from gradcache_clip.ops.unit import wide_unit

if TYPE_CHECKING:
    from typing_extensions import Unpack


class ClipLoss(ScaledLoss):
    """Symmetric cross-entropy over the cosine similarities of B pairs.

    With I and T the L2-normalised features and S = logit_scale * I T^T, the loss is
    (mean_i -log softmax(S)_ii over rows + the same over columns) / 2. S is never stored: memory
    beyond features and gradients is O(B) and one tile. Source: Radford et al. 2021 (CLIP),
    figure 3.

    The scale is learned as its logarithm, `log_logit_scale`, and clamped to `max_logit_scale`.
    Where torch.distributed is initialised the batch is that of all ranks: each computes its share
    of S, and every rank returns the loss of the global batch.

    Args:
        label_smoothing: share of the target that is spread evenly over all competitors. It needs
            the features of all ranks on each, whatever the exchange.
        **options: `init_logit_scale=1/0.07`, `max_logit_scale=100`, `normalize=True`,
            `impl="auto"`, `group=None`, `exchange="gather"`; see `ScaledLoss`.

    Example:
        >>> import torch
        >>> from gradcache_clip import ClipLoss
        >>> out = ClipLoss()(torch.eye(4), torch.eye(4))
        >>> bool(out.loss < 1e-5), float(out.accuracy)
        (True, 1.0)
    """

    feature_arguments = "image_features", "text_features"

    def __init__(self, *, label_smoothing: float = 0.0, **options: Unpack[ScaleOptions]) -> None:
        super().__init__(**options)
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
        """Compute the loss of all pairs; row i of both inputs is a pair.

        Args:
            image_features: (b, D) floating tensor.
            text_features: (b, D) floating tensor.
            logit_scale: a scale of the caller's own, already exponentiated, in place of the
                module's.
            logit_bias: accepted for callers of open_clip's losses; added to all logits alike it
                changes no softmax, and its gradient is zero.
            labels: (b,) integers; pairs with equal labels are positives of each other.
            ids: (b,) integers; pairs with equal ids are not negatives of each other.

        Raises:
            TypeError: labels or ids that are not integers.
            ValueError: shapes differ, or the whole batch is a single pair.
        """
        given = image_features, text_features, logit_scale, logit_bias
        return self.prefixes(None, *given, labels=labels, ids=ids)[0]

    def prefixes(
        self,
        widths: Sequence[int] | None,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | None = None,
        logit_bias: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        ids: Tensor | None = None,
    ) -> list[ContrastiveOutput]:
        """Compute `forward`, or with widths that of each prefix; see `MatryoshkaLoss`."""
        labels, ids = self._checked(image_features, text_features, labels, ids)
        q, k = self._prepared(widths, image_features, text_features)
        scale, pairing = self._scale_for(logit_scale, q, k), Pairing(labels, labels, ids, ids)
        targets = ClipTargets(labels, ids, self.label_smoothing)
        each = self._statistics("clip_loss", q, k, scale, pairing, widths)
        outputs, prefixes = [], [None] if widths is None else widths
        for statistics, width in zip(each, prefixes, strict=True):
            output = clip_result(statistics, targets, *self._smoothed_over(q, k, width), scale)
            if logit_bias is not None:
                output = output._replace(loss=output.loss + 0 * logit_bias)
            outputs.append(output)
        return outputs

    def _checked(
        self,
        image_features: Tensor,
        text_features: Tensor,
        labels: Tensor | None,
        ids: Tensor | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Check everything; return labels and ids of all ranks."""
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
        return labels, ids

    def _smoothed_over(self, q: Tensor, k: Tensor, width: int | None) -> tuple[Tensor, Tensor]:
        """Return the features of all ranks for the mean logits that smoothing needs."""
        if self.label_smoothing == 0:
            # Not read; any will do.
            return q, k
        if width is not None:
            q, k = wide_unit(q, width), wide_unit(k, width)
        return gather_rows(q, self.group), gather_rows(k, self.group)
