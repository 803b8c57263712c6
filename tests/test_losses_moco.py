"""Queries against momentum keys and queues: equation 1 of the paper, and what a queue keeps."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradcache_clip import ClipLoss, FeatureQueue, GradCache, InfoNCELoss
from gradcache_clip.losses import MoCoLoss


def equation_1(q: Tensor, k_plus: Tensor, queue: Tensor, tau: float) -> Tensor:
    """A (K + 1)-way softmax classifier that tries to classify q as k_plus."""
    losses, queue = [], F.normalize(queue)
    for query, key in zip(F.normalize(q), F.normalize(k_plus), strict=True):
        positive = torch.exp(query @ key / tau)
        sum_over = positive + torch.exp(query @ queue.T / tau).sum()
        losses.append(-torch.log(positive / sum_over))
    return torch.stack(losses).mean()


def moco(queues: int = 1, size: int = 12, width: int = 5, tau: float = 0.07) -> MoCoLoss:
    contrast = InfoNCELoss(init_logit_scale=1 / tau)
    loss = MoCoLoss(contrast, [FeatureQueue(size, width) for _ in range(queues)]).double()
    # In fp32 the scale was rounded.
    loss.contrast.log_logit_scale.data.fill_(-math.log(tau))
    return loss


def rows(count: int = 7, width: int = 5) -> Tensor:
    return torch.randn(count, width, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("impl", ["reference", "tiled"])
def test_one_modality_is_the_equation(impl):
    loss, q, k = moco(), rows(), rows()
    loss.contrast.impl = impl
    out = loss(q, k)
    expected = equation_1(q, k, loss.queues[0].features, 0.07)
    torch.testing.assert_close(out.loss, expected, rtol=1e-12, atol=0)
    (ours,), (truth,) = (torch.autograd.grad(each, [q]) for each in (out.loss, expected))
    torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-14)
    out = loss(q, k)
    out.loss.backward()
    assert k.grad is None and loss.contrast.log_logit_scale.grad is not None


def test_two_modalities_look_for_each_others_keys():
    loss = moco(queues=2)
    a, b, key_a, key_b = rows(), rows(), rows(), rows()
    keys_of_b, keys_of_a = (queue.features for queue in loss.queues)
    expected = (equation_1(a, key_b, keys_of_b, 0.07) + equation_1(b, key_a, keys_of_a, 0.07)) / 2
    out = loss(a, b, key_a, key_b)
    torch.testing.assert_close(out.loss, expected, rtol=1e-12, atol=0)
    loss.push()
    unit_a, unit_b = F.normalize(key_a.detach()), F.normalize(key_b.detach())
    torch.testing.assert_close(loss.queues[0].features[:7], unit_b)
    torch.testing.assert_close(loss.queues[1].features[:7], unit_a)


def test_keys_of_the_batch_compete_only_from_the_next_step_on():
    loss, q = moco(), rows()
    key = rows()
    alone = torch.stack([loss(q[i : i + 1], key[i : i + 1]).loss for i in range(7)]).mean()
    torch.testing.assert_close(loss(q, key).loss, alone)
    loss.push()
    assert loss(q, key).loss > alone + 0.01


def test_accuracy_is_that_of_the_softmax_over_the_queue():
    loss = moco(size=2, width=3)
    loss.queues[0].features_of_all.copy_(torch.eye(3)[:2])
    q = torch.eye(3).double()
    # The first query has its own key in the queue as well, and a tie is wrong.
    assert float(loss(q, torch.eye(3).double()).accuracy) == pytest.approx(1 / 3)
    assert float(loss(q, -torch.eye(3).double()).accuracy) == 0


def test_keys_come_back_into_the_order_of_their_queries():
    loss, q, k = moco(), rows(), rows()
    order = torch.randperm(7)
    expected = loss(q, k).loss
    assert (loss(q, k[order]).loss - expected).abs() > 1e-3
    torch.testing.assert_close(loss(q, k[order], order=order.argsort()).loss, expected)
    loss.push()
    torch.testing.assert_close(loss.queues[0].features[:7], F.normalize(k.detach()))


def test_a_step_that_starts_again_pushes_once():
    loss, q, k = moco(size=20), rows(), rows()
    before = loss.queues[0].features.clone()
    for _ in range(3):
        loss(q, k)
    assert torch.equal(loss.queues[0].features, before)
    loss.push()
    changed = (loss.queues[0].features != before).any(1)
    assert changed[:7].all() and not changed[7:].any()
    with pytest.raises(ValueError):
        loss.push()


def test_queues_start_full_of_random_unit_rows():
    torch.manual_seed(3)
    first = moco(size=50).queues[0].features
    torch.manual_seed(3)
    assert torch.equal(moco(size=50).queues[0].features, first)
    torch.testing.assert_close(first.norm(dim=1), torch.ones(50).double())
    assert first.mean(0).abs().max() < 0.3 and len(first.unique(dim=0)) == 50
    # One that holds something is left alone.
    queue = FeatureQueue(4, 2)
    queue.push(torch.tensor([[0.0, 2.0]]))
    assert MoCoLoss(InfoNCELoss(), [queue]).queues[0].features.tolist() == [[0.0, 1.0]]


def test_a_queue_that_is_reset_is_as_new():
    queue, new = FeatureQueue(4, 2), FeatureQueue(4, 2)
    queue.push(torch.eye(2), ids=torch.tensor([5, 6]))
    queue.reset()
    assert queue.features.shape == (0, 2) and not len(queue.ids)
    for name, value in new.state_dict().items():
        assert torch.equal(queue.state_dict()[name], value), name
    for each in (queue, new):
        each.push(torch.tensor([[0.0, 3.0]]), ids=torch.tensor([7]))
    assert torch.equal(queue.features, new.features) and queue.ids.tolist() == [7]


def test_an_empty_queue_has_no_negatives():
    loss = moco()
    loss.queues[0].reset()
    with pytest.raises(ValueError, match=r"queues: .* got an empty one; call fill_at_random\(\)"):
        loss(rows(), rows())
    loss.queues[0].fill_at_random()
    assert loss(rows(), rows()).loss.isfinite()


def test_the_state_is_all_that_the_next_step_needs():
    one, other = moco(size=10), moco(size=10)
    for _ in range(3):
        one(rows(4), rows(4))
        one.push()
    other.load_state_dict(one.state_dict())
    q, k = rows(4), rows(4)
    assert torch.equal(one(q, k).loss, other(q, k).loss)
    for loss in (one, other):
        loss.push()
    assert torch.equal(one.queues[0].features, other.queues[0].features)


class Momentum(nn.Module):
    """Tower 0 is trained; tower 1 is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(6, 5), nn.Linear(6, 5).requires_grad_(False)
        self.passes = [0, 0]

    def forward(self, tower: int, inputs: Tensor) -> Tensor:
        self.passes[tower] += 1
        return (self.query, self.key)[tower](inputs)


def test_the_engine_embeds_keys_once_and_is_exact():
    encoder, loss = Momentum().double(), moco()
    x, y = torch.randn(22, 6).double(), torch.randn(22, 6).double()
    GradCache(encoder, loss, chunk_size=5, check_rows="off")(x, y)
    assert encoder.key.weight.grad is None
    # Five chunks; all of those with a graph of its own are replayed, keys never.
    assert encoder.passes[1] == 5 < encoder.passes[0] <= 10
    ours = encoder.query.weight.grad.clone()
    encoder.zero_grad()
    queue = loss.queues[0].features
    equation_1(encoder.query(x), encoder.key(y), queue, 0.07).backward()
    torch.testing.assert_close(ours, encoder.query.weight.grad, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [([], "queues: expected one, or two of one size"), ([4, 5], r"got sizes \[4, 5\]"),
     ([4, 4, 4], "queues: expected one, or two")],
)  # fmt: skip
def test_queues_that_no_loss_is_for(sizes, message):
    with pytest.raises(ValueError, match=message):
        MoCoLoss(InfoNCELoss(), [FeatureQueue(size, 3) for size in sizes])


@pytest.mark.parametrize("contrast", [InfoNCELoss(symmetric=True), ClipLoss()])
def test_contrasts_that_look_for_queries_too(contrast):
    with pytest.raises(ValueError, match=r"contrast: expected InfoNCELoss\(symmetric=False\), or"):
        MoCoLoss(contrast, [FeatureQueue(4, 3)])


def test_wrong_use():
    queue, loss = FeatureQueue(4, 3), moco()
    with pytest.raises(ValueError, match=r"queues: .* each its own, got sizes \[4, 4\]"):
        MoCoLoss(InfoNCELoss(), [queue, queue])
    with pytest.raises(ValueError, match="false_negative_margin: expected a finite .* nan"):
        InfoNCELoss(false_negative_margin=math.nan)
    with pytest.raises(ValueError, match="size: expected a positive integer, got 2.5"):
        FeatureQueue(2.5, 3)
    with pytest.raises(TypeError, match="order: expected a tensor of integers, got torch.float32"):
        loss(rows(), rows(), order=torch.ones(4))
    with pytest.raises(ValueError, match="push: expected a loss before it, got none since"):
        loss.push()


def test_another_number_of_features():
    with pytest.raises(ValueError, match="expected 2 of queries and 2 of keys, .* got 2 in all"):
        moco(queues=2)(rows(), rows())


def test_at_a_scale_of_nothing_all_are_equal():
    loss = moco(size=12, tau=1e6)
    assert loss(rows(), rows()).loss.item() == pytest.approx(math.log(13), abs=1e-5)
