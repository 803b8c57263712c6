"""A queue of negatives that every rank holds, and of which each passes its part."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from losses_over_ranks import ROWS, WIDTH, Place, alone_group

from gradcache_clip import FeatureQueue, InfoNCELoss


def negatives_of_a_queue() -> None:
    """Every rank holds the whole queue and passes its part, with ids of all columns."""
    world, generator = dist.get_world_size(), torch.Generator().manual_seed(3)
    rows, earlier = world * ROWS, world * 4
    queries, documents, keys = (
        torch.randn(n, WIDTH, generator=generator, dtype=torch.float64)
        for n in (rows, rows, earlier)
    )
    ids, key_ids = (torch.randint(9, (n,), generator=generator) for n in (rows, earlier))
    place, queue = Place.in_group(None), FeatureQueue(earlier, WIDTH).double()
    own = place.share({"q": queries, "d": documents, "ids": ids, "keys": keys, "k": key_ids})
    queue.push(own["keys"], own["k"])
    q, whole = own["q"].requires_grad_(), queries.clone().requires_grad_()
    spread = InfoNCELoss(symmetric=True).double()(
        q, own["d"], queue.local_features, ids=torch.cat((own["ids"], queue.local_ids))
    )
    alone = InfoNCELoss(symmetric=True, group=alone_group()).double()(
        whole, documents, queue.features, ids=torch.cat((ids, queue.ids))
    )
    for found in (spread, alone):
        found.loss.backward()
    torch.testing.assert_close(spread.loss, alone.loss, rtol=1e-12, atol=0)
    true = place.share({"q": whole.grad})["q"]
    torch.testing.assert_close(q.grad, true, rtol=1e-10, atol=1e-14)


def a_queue_that_does_not_divide() -> None:
    queue = FeatureQueue(2 * dist.get_world_size() - 1, 4)
    for _ in range(2):
        queue.push(torch.ones(1, 4))
    with pytest.raises(ValueError, match="size: expected rows that divide by 2 ranks, got 3"):
        _ = queue.local_features
