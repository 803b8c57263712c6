"""The loss of momentum contrast. b: rows of this rank, K: rows of a queue, D: width."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradcache_clip.losses.queue import FeatureQueue
from gradcache_clip.ops.arguments import check_features, check_integers
from gradcache_clip.ops.results import SelfContrastOutput


class MoCoLoss(nn.Module):
    """Cross-entropy of each query over its own key and the keys of earlier steps.

    With a query q, its key k, a queue of K keys n_j (all of unit length) and s = logit_scale:

        loss = mean -log exp(s q.k) / (exp(s q.k) + sum_j exp(s q.n_j))

    As in the paper, the other keys of the batch do not compete; they do from the next step on, when
    `push` has put them into the queue. One queue is for two views of an image, features (q, k). Two
    are for two modalities a and b, features (q_a, q_b, k_a, k_b): a looks for keys of b and b for
    keys of a, and the loss is the mean of both. Source: He et al. 2020 (MoCo), equation 1 and
    algorithm 1.

    A call changes nothing but the keys that `push` will add, so a step may be repeated.

    Args:
        contrast: `InfoNCELoss`, or `MatryoshkaLoss` around one; holds the scale, the implementation
            and the process group. Not symmetric.
        queues: one per input of queries, of equal size; an empty one is filled at random.

    Raises:
        ValueError: another contrast, or queues that are not one or two of one size.

    Example:
        >>> import torch
        >>> from gradcache_clip.losses import FeatureQueue, InfoNCELoss, MoCoLoss
        >>> queue = FeatureQueue(size=8, width=4)
        >>> loss = MoCoLoss(InfoNCELoss(init_logit_scale=1.0), [queue])
        >>> _ = loss.queues[0].features_of_all.zero_()
        >>> out = loss(torch.eye(4), torch.eye(4))
        >>> print(f"{out.loss:.4f} = log(1 + 8 / e)")
        1.3720 = log(1 + 8 / e)
        >>> loss.push()
        >>> loss.queues[0].features.sum().item()
        4.0
    """

    contrast: Any
    queues: Any

    def __init__(self, contrast: nn.Module, queues: Sequence[FeatureQueue]) -> None:
        super().__init__()
        _check_queues(queues)
        _check_contrast(contrast)
        self.contrast = contrast
        self.queues = nn.ModuleList(queues)
        self._keys: list[Tensor] = []
        for queue in queues:
            if not len(queue.features):
                queue.fill_at_random()

    @property
    def logit_scale(self) -> Tensor:
        """The multiplier of the similarities, with its graph."""
        scale: Tensor = self.contrast.logit_scale
        return scale

    def forward(self, *features: Tensor, order: Tensor | None = None) -> SelfContrastOutput:
        """Compute the loss of the queries of all ranks.

        Args:
            features: (b, D) each, queries and then as many keys; keys get no gradient.
            order: (b,) integers: row order[i] of the given keys belongs to query i.

        Raises:
            ValueError: a wrong number of features, an empty queue, and what the contrast raises.
        """
        for each in features:
            check_features("features", each)
        queries, keys = self._halves(features)
        if order is not None:
            check_integers("order", order, (len(keys[0]),), keys[0].device)
        keys = [each.detach() if order is None else each.detach()[order] for each in keys]
        self._keys = keys[::-1]
        sides = zip(queries, self._keys, self.queues, strict=True)
        outputs = [self._against(q, k, queue) for q, k, queue in sides]
        return SelfContrastOutput(
            *(torch.stack(each).mean() for each in zip(*outputs, strict=True))
        )

    def push(self) -> None:
        """Append the keys of the last call, of all ranks, to the queues; once, after the step."""
        if not self._keys:
            raise ValueError(
                "push: expected a loss before it, got none since the last push; call it once, "
                "after the step"
            )
        for queue, keys in zip(self.queues, self._keys, strict=True):
            queue.push(keys)
        self._keys = []

    def _against(self, queries: Tensor, keys: Tensor, queue: FeatureQueue) -> SelfContrastOutput:
        negatives = queue.local_features
        if not len(negatives):
            raise ValueError(
                "queues: expected keys in every queue, got an empty one; call fill_at_random() "
                "after reset()"
            )
        # One id for all keys of the batch: only the queue competes with a query's own key.
        ids = torch.ones(len(keys) + len(negatives), dtype=torch.long, device=keys.device)
        ids[: len(keys)] = 0
        output = self.contrast(queries, keys, negatives, ids=ids)
        return SelfContrastOutput(output.loss, output.accuracy)

    def _halves(self, features: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        count = len(self.queues)
        if len(features) != 2 * count:
            raise ValueError(
                f"features: expected {count} of queries and {count} of keys, for {count} queues, "
                f"got {len(features)} in all; pass queries first, then keys"
            )
        return features[:count], features[count:]


def _check_queues(queues: Any) -> None:
    several = isinstance(queues, (list, tuple)) and all(isinstance(q, FeatureQueue) for q in queues)
    sizes = [queue.size for queue in queues] if several else type(queues).__name__
    different = several and len(set(sizes)) == 1 and len(set(queues)) == len(queues)
    if not different or len(queues) > 2:
        raise ValueError(
            f"queues: expected one, or two of one size for two modalities, each its own, got sizes "
            f"{sizes}; pass e.g. [FeatureQueue(size=65536, width=128)]"
        )


def _check_contrast(contrast: Any) -> None:
    inner = getattr(contrast, "loss", contrast)
    symmetric = getattr(inner, "symmetric", None)
    if symmetric is not False:
        raise ValueError(
            "contrast: expected InfoNCELoss(symmetric=False), or MatryoshkaLoss around one, got "
            f"{type(inner).__name__} with symmetric={symmetric}; a queue holds keys alone, for "
            "which no queries compete"
        )
