"""The late-interaction loss as a module.

B: pairs of the whole batch, b: of this rank, P and R: image and text tokens, D: width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gradcache_clip.distributed.collectives import check_same_everywhere, gather_rows
from gradcache_clip.distributed.exchange import Ranks
from gradcache_clip.losses.distributed_contrast import DistributedContrast
from gradcache_clip.losses.options import check_flags
from gradcache_clip.losses.padded_tokens import PaddedTokens, as_long_everywhere, of_all_ranks
from gradcache_clip.losses.retrieval_arguments import RowArguments, check_vectors
from gradcache_clip.losses.scaled import ScaledLoss, ScaleOptions, check_has_negatives
from gradcache_clip.losses.token_inputs import token_pairing, vectors_of
from gradcache_clip.ops.implementations import Impl, refuse_transforms, resolve_impl
from gradcache_clip.ops.late_interaction import (
    TokenReduction,
    check_mask,
    check_token_reduction,
    check_tokens,
    late_interaction_result,
    late_interaction_statistics,
)
from gradcache_clip.ops.late_interaction_op import TokenPasses, TokenRules
from gradcache_clip.ops.results import ContrastiveOutput

if TYPE_CHECKING:
    from typing_extensions import Unpack


class LateInteractionLoss(ScaledLoss):
    """Cross-entropy over B pairs scored by their best matching tokens.

    The score of an image for a text is the mean, over its tokens, of the best match among the
    text's tokens, and the reverse; see `gradcache_clip.ops.late_interaction_loss_with_accuracy`.
    Neither the B x B scores nor the similarities of tokens are stored. Source: Yao et al. 2021
    (FILIP), equations 3 to 6.

    The scale is learned as its logarithm, `log_logit_scale`, and clamped to `max_logit_scale`.
    Where torch.distributed is initialised the batch is that of all ranks: each computes its
    share of the scores, and every rank returns the loss of the global batch. Ranks may hold tokens
    of different lengths: shorter ones are padded to the longest, and masked.

    Args:
        one_way: texts look for images only, as queries do in MaxSim (ColBERT).
        token_reduction: "mean" over the tokens that look (FILIP), or "sum" (ColBERT), whose scores
            grow with the number of tokens: start with a smaller scale.
        **options: `init_logit_scale=1/0.07`, `max_logit_scale=100`, `normalize=True` (each token),
            `impl="auto"`, `group=None`, `exchange="gather"`; see `ScaledLoss`.

    Example:
        >>> import torch
        >>> from gradcache_clip.losses.late_interaction import LateInteractionLoss
        >>> tokens = torch.eye(12).view(4, 3, 12)
        >>> out = LateInteractionLoss()(tokens, tokens[:, :2])
        >>> f"{out.loss:.4f}", float(out.accuracy)
        ('0.0001', 1.0)
    """

    feature_arguments = "image_tokens", "text_tokens"

    def __init__(
        self,
        *,
        one_way: bool = False,
        token_reduction: TokenReduction = "mean",
        **options: Unpack[ScaleOptions],
    ) -> None:
        super().__init__(**options)
        check_token_reduction(token_reduction)
        check_flags(one_way=one_way)
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
        ids: Tensor | None = None,
        groups: Tensor | None = None,
        column_bias: Tensor | None = None,
        row_weights: Tensor | None = None,
    ) -> ContrastiveOutput:
        """Compute the loss of all pairs; sample i of both inputs is a pair.

        Args:
            image_tokens: (b, P, D) floating tensor.
            text_tokens: (b, R, D) floating tensor.
            logit_scale: a scale of the caller's own, already exponentiated, in place of the
                module's.
            image_mask: (b, P) bool, True for tokens that count; all when None.
            text_mask: (b, R) bool, the same for text tokens.
            ids: (b,) integers; pairs of one id are no negatives of each other.
            groups: (b,) integers; only pairs of one group compete.
            column_bias: (b,) constants that are added to the logits of images.
            row_weights: (b,) weights of the pairs in the mean, 0 or more.

        Raises:
            TypeError: tokens that are not floating tensors, masks that are not bool tensors, ids
                or weights of a wrong type.
            ValueError: shapes that do not fit together, or the whole batch is a single pair.
        """
        further = RowArguments(None, ids, groups, column_bias, None, row_weights)
        sides = PaddedTokens(image_tokens, image_mask), PaddedTokens(text_tokens, text_mask)
        images, texts = self._checked(*sides, further)
        image_mask, text_mask = (of_all_ranks(side.mask, self.ranks) for side in (images, texts))
        scale = self._scale_for(logit_scale, images.tokens, texts.tokens)
        rules = TokenRules(image_mask, text_mask, self.one_way, self.token_reduction)
        return distributed_late_interaction(
            self._unit(images.tokens),
            self._unit(texts.tokens),
            scale,
            rules._replace(pairing=token_pairing(further, 0, scale.dtype, self.ranks)),
            self.impl,
            self.ranks,
            None if row_weights is None else self.ranks.joined(row_weights),
        )

    def _checked(
        self, images: PaddedTokens, texts: PaddedTokens, further: RowArguments
    ) -> list[PaddedTokens]:
        """Check everything; pad each side to its greatest length on any rank."""
        check_tokens(images.tokens, texts.tokens)
        check_mask("image_mask", images.mask, images.tokens)
        check_mask("text_mask", texts.mask, texts.tokens)
        check_vectors(texts.tokens, (len(texts.tokens), 0), further)
        images, texts = as_long_everywhere((images, texts), self.ranks)
        named = {"image_tokens": images.tokens, "text_tokens": texts.tokens}
        check_same_everywhere(self.group, **named, **vectors_of(further))
        check_has_negatives(len(images.tokens) * self.ranks.size)
        return [images, texts]

    def extra_repr(self) -> str:
        own = f"one_way={self.one_way}, token_reduction={self.token_reduction!r}"
        return f"{own}, {super().extra_repr()}"


def distributed_late_interaction(
    images: Tensor,
    texts: Tensor,
    logit_scale: Tensor,
    rules: TokenRules,
    impl: Impl,
    ranks: Ranks,
    weights: Tensor | None = None,
) -> ContrastiveOutput:
    """Compute `late_interaction_loss_with_accuracy` of all ranks' samples, on every rank.

    Over W ranks of b samples a rank does 6 b B P R D flops in "tiled" and 10 b B P R D in "triton",
    B = W b, where one process alone would do 4 B^2 P R D and 8 B^2 P R D.

    Args:
        images: (b, P, D) tokens of this rank, of one shape on every rank.
        texts: (b, R, D), the same.
        logit_scale: 0-dim, the same on every rank; its gradient is complete on every rank.
        rules: of all images and texts.
        impl: "reference" gathers all tokens on every rank; the others share the work.
        ranks: who shares the batch, and how tokens travel.
        weights: of all pairs in the mean.
    """
    dtype = torch.promote_types(images.dtype, texts.dtype)
    resolved = resolve_impl(impl, images.device, dtype)
    given = images.to(dtype), texts.to(dtype)
    if ranks.size == 1 or resolved == "reference":
        images, texts = (gather_rows(tokens, ranks.group) for tokens in given)
        statistics = late_interaction_statistics(images, texts, logit_scale, rules, resolved)
    else:
        refuse_transforms("late_interaction_loss", *given, logit_scale)
        contrast = DistributedContrast("late_interaction_loss", TokenPasses(resolved), rules, ranks)
        statistics = contrast.differentiable(*given, logit_scale)
    return late_interaction_result(statistics, one_way=rules.one_way, weights=weights)
