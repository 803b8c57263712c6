"""The late-interaction loss as a module.

B: pairs of the whole batch, b: of this rank, P and R: image and text tokens, D: width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from gradcache_clip.distributed.collectives import check_same_everywhere, gather_rows
from gradcache_clip.distributed.exchange import Exchange, Ranks
from gradcache_clip.losses.clip import ContrastiveOutput
from gradcache_clip.losses.scaled import ScaledLoss, check_has_negatives
from gradcache_clip.losses.spread_contrast import SpreadContrast, StatisticsOverRanks
from gradcache_clip.ops.implementations import Impl, refuse_transforms, resolve_impl
from gradcache_clip.ops.late_interaction import (
    LateInteractionResult,
    TokenReduction,
    check_mask,
    check_token_reduction,
    check_tokens,
    late_interaction_loss_with_accuracy,
    late_interaction_result,
)
from gradcache_clip.ops.late_interaction_op import TokenPasses, TokenRules
from gradcache_clip.ops.pairing import Statistics


class LateInteractionLoss(ScaledLoss):
    """Cross-entropy over B pairs whose similarity is that of their best matching tokens.

    An image finds a text as similar as its tokens, on average, find their best match among the
    text's tokens, and the reverse; see `gradcache_clip.ops.late_interaction_loss`. No matrix of
    B x B scores is stored, nor one of token similarities. Source: Yao et al. 2021 (FILIP),
    equations 3 to 6.

    The scale is learned as `log_logit_scale`, its logarithm, and held at `max_logit_scale` or
    below. Where torch.distributed is initialised the batch is that of all ranks: each computes its
    share of the scores, and every rank returns the loss of the global batch. Ranks may hold tokens
    of different lengths: shorter ones are padded to the longest, and masked.

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
        exchange: "gather" or "ring": how tokens of other ranks arrive; see `ClipLoss`.

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
        images, texts = self._checked(
            _Side(image_tokens, image_mask), _Side(text_tokens, text_mask)
        )
        image_mask, text_mask = (_of_all_ranks(side.mask, self.ranks) for side in (images, texts))
        result = tokens_over_ranks(
            self._unit(images.tokens),
            self._unit(texts.tokens),
            self._scale_for(logit_scale, images.tokens, texts.tokens),
            TokenRules(image_mask, text_mask, self.one_way, self.token_reduction),
            self.impl,
            self.ranks,
        )
        return ContrastiveOutput(*result)

    def _checked(self, images: _Side, texts: _Side) -> list[_Side]:
        """Both sides as long as on any rank, after checks."""
        check_tokens(images.tokens, texts.tokens)
        check_mask("image_mask", images.mask, images.tokens)
        check_mask("text_mask", texts.mask, texts.tokens)
        images, texts = _as_long_everywhere((images, texts), self.ranks)
        check_same_everywhere(self.group, image_tokens=images.tokens, text_tokens=texts.tokens)
        check_has_negatives(len(images.tokens) * self.ranks.size)
        return [images, texts]

    def extra_repr(self) -> str:
        own = f"one_way={self.one_way}, token_reduction={self.token_reduction!r}"
        return f"{own}, {super().extra_repr()}"


def tokens_over_ranks(
    images: Tensor,
    texts: Tensor,
    logit_scale: Tensor,
    rules: TokenRules,
    impl: Impl,
    ranks: Ranks,
) -> LateInteractionResult:
    """`late_interaction_loss_with_accuracy` of the samples of all ranks, the same on every rank.

    Over W ranks of b samples a rank does 6 b B P R D flops in "tiled" and 10 b B P R D in "triton",
    B = W b, where one process alone would do 4 B^2 P R D and 8 B^2 P R D.

    Args:
        images: (b, P, D) tokens of this rank, of one shape on every rank.
        texts: (b, R, D), the same.
        logit_scale: 0-dim, the same on every rank; its gradient is complete on every rank.
        rules: of all images and texts.
        impl: "reference" gathers all tokens on every rank; the others never do the same twice.
        ranks: who shares the batch, and how tokens travel.
    """
    dtype = torch.promote_types(images.dtype, texts.dtype)
    resolved = resolve_impl(impl, images.device, dtype)
    if ranks.size == 1 or resolved == "reference":
        return late_interaction_loss_with_accuracy(
            gather_rows(images, ranks.group),
            gather_rows(texts, ranks.group),
            logit_scale,
            image_mask=rules.image_mask,
            text_mask=rules.text_mask,
            one_way=rules.one_way,
            token_reduction=rules.token_reduction,
            impl=impl,
        )
    refuse_transforms("late_interaction_loss", images, texts, logit_scale)
    # These passes read rules of their own, which are cut and turned like a `Pairing`.
    passes: Any = TokenPasses(resolved)
    pairing: Any = rules
    contrast = SpreadContrast("late_interaction_loss", passes, pairing, ranks)
    inputs = images.to(dtype), texts.to(dtype), logit_scale
    statistics = Statistics(*StatisticsOverRanks.apply(*inputs, contrast))
    return late_interaction_result(statistics, one_way=rules.one_way)


class _Side(NamedTuple):
    """Tokens of this rank, and their mask."""

    tokens: Tensor
    mask: Tensor | None

    def padded(self, length: int, *, masked: bool) -> _Side:
        """To `length` tokens, with a mask where any rank needs one."""
        (tokens, mask), missing = self, length - self.tokens.shape[1]
        if masked and mask is None:
            mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        if missing == 0:
            return _Side(tokens, mask)
        return _Side(
            F.pad(tokens, (0, 0, 0, missing)), None if mask is None else F.pad(mask, (0, missing))
        )


def _as_long_everywhere(sides: Sequence[_Side], ranks: Ranks) -> list[_Side]:
    """Sides as long as those of the rank with the longest."""
    if ranks.size == 1:
        return list(sides)
    mine = [[side.tokens.shape[1], side.mask is not None] for side in sides]
    theirs = ranks.joined(torch.tensor(mine, device=sides[0].tokens.device)[..., None])
    padded = []
    for side, (lengths, masks) in zip(sides, theirs.tolist(), strict=True):
        masked = any(masks) or min(lengths) != max(lengths)
        padded.append(side.padded(max(lengths), masked=masked))
    return padded


def _of_all_ranks(mask: Tensor | None, ranks: Ranks) -> Tensor | None:
    return None if mask is None else ranks.joined(mask.T).T
