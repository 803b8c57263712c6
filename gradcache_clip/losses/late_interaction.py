"""The late-interaction loss as a module.

B: pairs of the whole batch, b: of this rank, P and R: image and text tokens, D: width.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from gradcache_clip.distributed.collectives import gather_rows, world_size
from gradcache_clip.losses.clip import ContrastiveOutput
from gradcache_clip.losses.scaled import ScaledLoss, check_has_negatives, unit
from gradcache_clip.ops.implementations import Impl
from gradcache_clip.ops.late_interaction import (
    TokenReduction,
    check_mask,
    check_token_reduction,
    check_tokens,
    late_interaction_loss_with_accuracy,
)


class LateInteractionLoss(ScaledLoss):
    """Cross-entropy over B pairs whose similarity is that of their best matching tokens.

    An image finds a text as similar as its tokens, on average, find their best match among the
    text's tokens, and the reverse; see `gradcache_clip.ops.late_interaction_loss`. No matrix of
    B x B scores is stored, nor one of token similarities. Source: Yao et al. 2021 (FILIP),
    equations 3 to 6.

    The scale is learned as `log_logit_scale`, its logarithm, and held at `max_logit_scale` or
    below. Where torch.distributed is initialised, tokens and masks of all ranks are gathered and
    every rank computes the loss of the global batch. Ranks may hold tokens of different lengths:
    shorter ones are padded to the longest, and masked.

    Args:
        one_way: texts look for images only, as queries do in MaxSim (ColBERT).
        token_reduction: "mean" over the tokens that look (FILIP), or "sum" (ColBERT), whose scores
            grow with the number of tokens: start with a smaller scale.
        init_logit_scale: first value of the multiplier of the similarity (1/temperature).
        max_logit_scale: its upper bound.
        normalize: L2-normalise each token first.
        impl: "auto", "reference", "tiled" or "triton".
        group: process group whose ranks share the batch; the default group when None. With
            `DDPStrategy` it must be the default one.

    Example:
        >>> import torch
        >>> from gradcache_clip.losses.late_interaction import LateInteractionLoss
        >>> tokens = torch.eye(12).view(4, 3, 12)
        >>> out = LateInteractionLoss()(tokens, tokens[:, :2])
        >>> f"{out.loss:.4f}", float(out.accuracy)
        ('0.0001', 1.0)
    """

    def __init__(
        self,
        *,
        one_way: bool = False,
        token_reduction: TokenReduction = "mean",
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
        check_token_reduction(token_reduction)
        self.one_way = one_way
        self.token_reduction: TokenReduction = token_reduction

    def forward(
        self,
        image_tokens: Tensor,
        text_tokens: Tensor,
        logit_scale: Tensor | None = None,
        *,
        image_mask: Tensor | None = None,
        text_mask: Tensor | None = None,
    ) -> ContrastiveOutput:
        """Loss of all pairs; sample i of both inputs belongs together.

        Args:
            image_tokens: (b, P, D) floating tensor.
            text_tokens: (b, R, D) floating tensor.
            logit_scale: a scale of the caller's own, already exponentiated, in place of the
                module's.
            image_mask: (b, P) bool, True for tokens that count; all when None.
            text_mask: (b, R) bool, the same for text tokens.

        Raises:
            TypeError: tokens that are no floating tensor, masks that are no bool tensor.
            ValueError: shapes that do not fit together, or the whole batch is a single pair.
        """
        check_tokens(image_tokens, text_tokens)
        check_mask("image_mask", image_mask, image_tokens)
        check_mask("text_mask", text_mask, text_tokens)
        if self.normalize:
            image_tokens, text_tokens = unit(image_tokens), unit(text_tokens)
        image_tokens, image_mask = _gather_tokens(image_tokens, image_mask, self.group)
        text_tokens, text_mask = _gather_tokens(text_tokens, text_mask, self.group)
        check_has_negatives(image_tokens)
        result = late_interaction_loss_with_accuracy(
            image_tokens,
            text_tokens,
            self._bounded_scale(logit_scale),
            image_mask=image_mask,
            text_mask=text_mask,
            one_way=self.one_way,
            token_reduction=self.token_reduction,
            impl=self.impl,
        )
        return ContrastiveOutput(*result)

    def extra_repr(self) -> str:
        own = f"one_way={self.one_way}, token_reduction={self.token_reduction!r}"
        return f"{own}, {super().extra_repr()}"


def _gather_tokens(
    tokens: Tensor, mask: Tensor | None, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor | None]:
    """Tokens and mask of all ranks, as long as the longest; no mask where no rank needs one."""
    if world_size(group) == 1:
        return tokens, mask
    longest, masked = _over_ranks(tokens, mask, group)
    missing = longest - tokens.shape[1]
    if masked:
        if mask is None:
            mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        mask = gather_rows(F.pad(mask, (0, missing)), group)
    return gather_rows(F.pad(tokens, (0, 0, 0, missing)), group), mask


def _over_ranks(
    tokens: Tensor, mask: Tensor | None, group: dist.ProcessGroup | None
) -> tuple[int, bool]:
    """Tokens of the longest rank, and whether any rank masks some or is shorter."""
    mine = torch.tensor([tokens.shape[1], mask is not None], device=tokens.device)
    theirs = mine.new_empty(world_size(group) * 2)
    dist.all_gather_into_tensor(theirs, mine, group=group)
    lengths, masks = theirs.view(-1, 2).T.tolist()
    return max(lengths), any(masks) or min(lengths) != max(lengths)
