"""LateInteractionLoss: its arguments, the engine around it, and two processes over gloo."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from gloo_processes import start
from late_interaction_inputs import OPTIONS, paper_loss, random_mask, token_inputs
from torch import Tensor, nn

from gradcache_clip import GradCache
from gradcache_clip.losses.late_interaction import LateInteractionLoss

WORLD, LOCAL = 2, 3


def tokens() -> tuple[Tensor, Tensor]:
    """Not of unit length."""
    images, texts, _ = token_inputs(7, 5, 3, 6)
    return (3 * images).detach().requires_grad_(), (0.2 * texts).detach().requires_grad_()


def masks() -> dict[str, Tensor]:
    return {"image_mask": random_mask(7, 5), "text_mask": random_mask(7, 3)}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("impl", ["reference", "tiled"])
def test_equals_the_equations(impl: Any, options: dict[str, Any]) -> None:
    (images, texts), kept = tokens(), masks()
    loss = LateInteractionLoss(impl=impl, init_logit_scale=5.0, **options).double()
    out = loss(images, texts, **kept)
    unit = F.normalize(images, dim=2), F.normalize(texts, dim=2)
    expected = paper_loss(*unit, 5.0, *kept.values(), **options)
    # The scale is kept as an fp32 logarithm.
    assert out.loss.item() == pytest.approx(expected, rel=1e-6)
    assert out.accuracy == (out.image_to_text_accuracy + out.text_to_image_accuracy) / 2
    gradients = torch.autograd.grad(out.loss, [images, texts, loss.log_logit_scale])
    assert all(gradient.abs().max() > 0 for gradient in gradients)


def test_the_scale_is_held_at_its_bound_and_can_come_back() -> None:
    loss, (images, texts) = LateInteractionLoss(max_logit_scale=20.0).double(), tokens()
    with torch.no_grad():
        loss.log_logit_scale.fill_(math.log(400.0))
    out = loss(images, texts)
    assert loss.logit_scale.item() == pytest.approx(20.0)
    out.loss.backward()
    assert loss.log_logit_scale.grad.abs() > 0
    assert loss(images, texts, torch.tensor(1.0).double()).loss != out.loss


def test_tokens_may_come_normalised() -> None:
    images, texts = (F.normalize(each, dim=2) for each in tokens())
    with_it, without = LateInteractionLoss(), LateInteractionLoss(normalize=False)
    torch.testing.assert_close(with_it(images, texts).loss, without(images, texts).loss)


def test_fp16_padding_whose_norm_overflows() -> None:
    images, texts = (each.detach().half() for each in tokens())
    kept = {"image_mask": torch.ones(7, 5, dtype=torch.bool)}
    kept["image_mask"][:, 4] = False
    expected = LateInteractionLoss()(images[:, :4], texts).loss
    images[:, 4] = 60_000
    assert torch.equal(LateInteractionLoss()(images, texts, **kept).loss, expected)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((torch.ones(4, 3), torch.ones(4, 3)), {}, r"image_tokens: expected .*\(B, tokens, D\)"),
        ((torch.ones(1, 2, 3), torch.ones(1, 2, 3)), {}, "batch: expected at least 2 pairs, got 1"),
        (
            (torch.ones(2, 2, 3), torch.ones(2, 2, 3)),
            {"text_mask": torch.zeros(2, 2, dtype=torch.bool)},
            "text_mask: .*got none in sample 0",
        ),
    ],
)
def test_bad_input_is_named(arguments: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LateInteractionLoss()(*arguments, **options)


def test_bad_settings_are_named() -> None:
    with pytest.raises(ValueError, match="token_reduction: expected"):
        LateInteractionLoss(token_reduction="max")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="one_way: expected True or False, got 1"):
        LateInteractionLoss(one_way=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="init_logit_scale: expected 0 <"):
        LateInteractionLoss(init_logit_scale=101.0)
    assert "one_way=False, token_reduction='mean', normalize=True" in repr(LateInteractionLoss())


def test_cached_step_equals_the_plain_step() -> None:
    torch.manual_seed(1)
    encoders = nn.Linear(4, 6).double(), nn.Sequential(nn.Linear(3, 6), nn.Tanh()).double()
    loss = LateInteractionLoss().double()
    images, texts = torch.randn(7, 5, 4).double(), torch.randn(7, 3, 3).double()
    kept, modules = masks(), nn.ModuleList([*encoders, loss])
    expected = loss(encoders[0](images), encoders[1](texts), **kept)
    truth = torch.autograd.grad(expected.loss, list(modules.parameters()))
    out = GradCache(encoders, loss, chunk_size=2)(images, texts, loss_kwargs=kept)
    torch.testing.assert_close(out.loss, expected.loss.detach())
    got = [parameter.grad for parameter in modules.parameters()]
    torch.testing.assert_close(got, list(truth), rtol=1e-10, atol=1e-14)


def global_batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Texts of 4 tokens; those of rank 1 use two."""
    torch.manual_seed(3)
    images, texts, _ = (each.detach() for each in token_inputs(WORLD * LOCAL, 5, 4, 6))
    image_mask, text_mask = random_mask(WORLD * LOCAL, 5), random_mask(WORLD * LOCAL, 4)
    text_mask[LOCAL:] = torch.tensor([True, True, False, False])
    return images, texts, image_mask, text_mask


def step(
    loss: LateInteractionLoss, images: Tensor, texts: Tensor, **kept: Tensor | None
) -> list[Tensor]:
    leaves = [images.clone().requires_grad_(), texts.clone().requires_grad_()]
    value = loss(*leaves, **kept).loss
    return [value.detach(), *torch.autograd.grad(value, [*leaves, loss.log_logit_scale])]


def compare(rank: int, length: int, **kept: Tensor | None) -> None:
    """This rank's part of the gradients, and the same loss and scale gradient as one process."""
    images, texts, image_mask, text_mask = global_batch()
    mine, loss = slice(rank * LOCAL, (rank + 1) * LOCAL), LateInteractionLoss().double()
    alone = dist.new_group([rank], use_local_synchronization=True)
    whole = LateInteractionLoss(group=alone).double()
    all_images = image_mask if "image_mask" in kept else None
    all_texts = text_mask if length < 4 or "text_mask" in kept else None
    expected = step(whole, images, texts, image_mask=all_images, text_mask=all_texts)
    got = step(loss, images[mine], texts[mine, :length], **kept)
    expected[1:3] = expected[1][mine], expected[2][mine, :length]
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-14)


def without_and_with_masks() -> None:
    rank = dist.get_rank()
    compare(rank, 4)
    _, _, image_mask, text_mask = global_batch()
    mine = slice(rank * LOCAL, (rank + 1) * LOCAL)
    # Rank 1 passes texts of 2 tokens, all of which count, and no mask for them.
    own = text_mask[mine] if rank == 0 else None
    compare(rank, 4 if rank == 0 else 2, image_mask=image_mask[mine], text_mask=own)


@pytest.mark.distributed
def test_two_processes() -> None:
    start(without_and_with_masks, WORLD)
