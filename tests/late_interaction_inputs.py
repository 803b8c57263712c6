"""Tokens, losses and gradients that the tests of late interaction and of its kernels share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from gradcache_clip.ops.late_interaction_op import TokenPasses, TokenRules
from gradcache_clip.ops.pairing import SideGradient

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]

# Settings that every implementation is tested in, beside the masks.
OPTIONS: list[dict[str, Any]] = [{}, {"one_way": True}, {"token_reduction": "sum"}]


class TokenInputs(NamedTuple):
    images: Tensor
    texts: Tensor
    logit_scale: Tensor

    def to(self, dtype: torch.dtype) -> TokenInputs:
        """Leaves in another dtype; the scale stays fp32 unless everything becomes fp64."""
        scale_dtype = torch.promote_types(dtype, torch.float32)
        dtypes = dtype, dtype, scale_dtype
        pairs = zip(self, dtypes, strict=True)
        return TokenInputs(*(x.detach().to(each).requires_grad_() for x, each in pairs))


def token_inputs(
    B: int,
    P: int,
    R: int,
    D: int,
    dtype: torch.dtype = torch.float64,
    *,
    scale: float = 10.0,
    device: str = "cpu",
) -> TokenInputs:
    """Unrelated unit tokens."""
    images, texts = (torch.randn(B, T, D, dtype=torch.float64) for T in (P, R))
    return _leaves(images, texts, scale, dtype, device)


def clustered_tokens(
    cosine: float, B: int, P: int, R: int, D: int, dtype: torch.dtype, *, device: str = "cpu"
) -> TokenInputs:
    """Every image token against every text token near one cosine, at scale 100."""
    centre = torch.zeros(2, D, dtype=torch.float64)
    centre[0, 0], centre[1, 0], centre[1, 1] = 1, cosine, (1 - cosine**2) ** 0.5
    images, texts = (0.05 * torch.randn(B, T, D, dtype=torch.float64) for T in (P, R))
    return _leaves(images + centre[0], texts + centre[1], 100.0, dtype, device)


def _leaves(
    images: Tensor, texts: Tensor, scale: float, dtype: torch.dtype, device: str
) -> TokenInputs:
    logit_scale = torch.tensor(scale, dtype=torch.float64)
    unit = (normalize(tokens, dim=2).to(device) for tokens in (images, texts))
    return TokenInputs(*unit, logit_scale.to(device)).to(dtype)


def random_mask(B: int, T: int, *, device: str = "cpu") -> Tensor:
    """About half of the tokens, the first one often not among them, and at least one a sample."""
    mask = torch.rand(B, T) < 0.5
    mask[torch.arange(B), torch.randint(T, (B,))] = True
    return mask.to(device)


def random_masks(inputs: TokenInputs) -> dict[str, Tensor]:
    """A random mask for each side, as arguments of the loss."""
    B, P, _ = inputs.images.shape
    device = inputs.images.device.type
    sizes = {"image_mask": P, "text_mask": inputs.texts.shape[1]}
    return {name: random_mask(B, T, device=device) for name, T in sizes.items()}


def plain_loss(
    images: Tensor, texts: Tensor, logit_scale: Tensor, *, one_way: bool = False
) -> Tensor:
    """What a person writes without this library, in the dtype of the tokens throughout."""
    similarity = torch.einsum("ipd,jrd->ijpr", images, texts)
    labels = torch.arange(len(images), device=images.device)
    scale = logit_scale.to(images.dtype)
    text_loss = cross_entropy(scale * similarity.max(2).values.mean(2).T, labels)
    if one_way:
        return text_loss
    return (cross_entropy(scale * similarity.max(3).values.mean(2), labels) + text_loss) / 2


def paper_loss(
    images: Tensor,
    texts: Tensor,
    logit_scale: float,
    image_mask: Tensor,
    text_mask: Tensor,
    *,
    one_way: bool = False,
    token_reduction: str = "mean",
) -> float:
    """Yao et al. 2021, equations 3 to 6, one token at a time in fp64."""
    B = len(images)
    x = [[token.double() for token in images.detach()[i][image_mask[i]]] for i in range(B)]
    y = [[token.double() for token in texts.detach()[j][text_mask[j]]] for j in range(B)]

    def score(from_tokens: list[Tensor], to_tokens: list[Tensor]) -> float:
        best = [max(float(a @ b) for b in to_tokens) for a in from_tokens]
        return sum(best) / (len(best) if token_reduction == "mean" else 1)

    image_to_text = [[logit_scale * score(x[i], y[j]) for j in range(B)] for i in range(B)]
    text_to_image = [[logit_scale * score(y[j], x[i]) for j in range(B)] for i in range(B)]
    loss_of_images = loss_of_texts = 0.0
    for k in range(B):
        row = sum(math.exp(image_to_text[k][j]) for j in range(B))
        column = sum(math.exp(text_to_image[i][k]) for i in range(B))
        loss_of_images -= math.log(math.exp(image_to_text[k][k]) / row) / B
        loss_of_texts -= math.log(math.exp(text_to_image[k][k]) / column) / B
    return loss_of_texts if one_way else (loss_of_images + loss_of_texts) / 2


def errors_without_positives(
    inputs: TokenInputs, impl: str, *, one_way: bool, texts_first: bool
) -> list[float]:
    """Relative errors of both passes over images and texts of which no two are a pair."""
    sides, true = _truth_without_positives(inputs.to(torch.float64), one_way)
    sizes = len(inputs.images), len(inputs.texts)
    rules = TokenRules(None, None, one_way, "mean").without_positives(*sizes)
    passes, (images, texts, scale) = TokenPasses(impl), (x.detach() for x in inputs)
    statistics = passes.statistics(images, texts, scale, rules)
    sides = [SideGradient(*(x.to(scale.dtype) for x in side)) for side in sides]
    asked = (True,) * 3, None, images.dtype
    if texts_first:
        turned = texts, images, scale, rules.transposed(), *sides[::-1]
        dtexts, dimages, dscale = passes.gradient(*turned, *asked)
    else:
        dimages, dtexts, dscale = passes.gradient(images, texts, scale, rules, *sides, *asked)
    pairs = zip((*statistics, dimages, dtexts, dscale), true, strict=True)
    return [float((a.double() - b).abs().max() / b.abs().max().clamp_min(1e-3)) for a, b in pairs]


def _truth_without_positives(
    inputs: TokenInputs, one_way: bool
) -> tuple[list[SideGradient], list[Tensor]]:
    """Both sides, statistics, and gradients of sum_ij w_i exp(s_ij - max_i) of both.

    s are the logits. Their maximum is a constant but for the scale.
    """
    similarity = torch.einsum("ipd,jrd->ijpr", *inputs[:2])
    back = inputs.logit_scale * similarity.amax(2).mean(2)
    rows = back if one_way else inputs.logit_scale * similarity.amax(3).mean(2)
    sides, total, of_scale, true = [], 0.0, 0.0, []
    for logits, weighs in ((rows, not one_way), (back.T, True)):
        peak = logits.detach().amax(1)
        weight = weighs * torch.linspace(0.5, 1, len(peak), device=peak.device).double()
        each = torch.exp(logits - peak[:, None]).sum(1)
        total = total + (weight * each).sum()
        of_scale = of_scale + (weight[:, None] * torch.exp(logits - logits.amax(1, True))).sum()
        sides.append(SideGradient(peak, weight, 0 * weight))
        true += [0 * peak, peak, each.detach(), peak]
    true += torch.autograd.grad(total, inputs[:2], retain_graph=True)
    return sides, [*true, *torch.autograd.grad(of_scale, inputs.logit_scale)]
