"""The loss for sentence-transformers' trainer on two processes, beside one process."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from losses_over_ranks import Place
from rank_processes import Check, failures
from torch.nn.parallel import DistributedDataParallel

pytest.importorskip("sentence_transformers")

from sentence_transformers.sentence_transformer import losses as theirs
from tiny_sentences import (
    BOTH_WAYS,
    gradients,
    share_of,
    tiny_model,
    tokenized,
    worst_error,
    wrapped,
)

from gradcache_clip.integrations.sentence_transformers import CachedMultipleNegativesRankingLoss


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny_sentences")


def over_ranks(folder: Path, options: dict[str, Any], unused: bool) -> None:
    """A wrapped model on every rank, as in one process over the whole batch."""
    place = Place.in_group(None)
    ours, their, alone = (tiny_model(folder).double() for _ in range(3))
    if not unused:
        # Of the pooler, which mean pooling does not use, DDP would wait for the gradient.
        for model in (ours, their):
            model[0].auto_model.pooler.requires_grad_(False)
    whole = tokenized(ours, 3, 6 * place.world)
    share = [share_of(place, features) for features in whole]
    settings = {"mini_batch_size": 4, "gather_across_devices": True, **options}
    losses = []
    for loss_class, model in (
        (CachedMultipleNegativesRankingLoss, ours),
        (theirs.CachedMultipleNegativesRankingLoss, their),
    ):
        ddp = DistributedDataParallel(model, find_unused_parameters=unused)
        losses.append(gradients(wrapped(loss_class(model, **settings), ddp), share, 2.0))
    value = gradients(theirs.MultipleNegativesRankingLoss(alone, **options), whole, 2.0)
    mean = losses[1].clone()
    dist.all_reduce(mean)
    torch.testing.assert_close(losses[0], value)
    torch.testing.assert_close(mean / place.world, value)
    for model in (ours, their):
        name, error = worst_error(model, alone)
        assert error < 1e-9, f"{name}: {error:.1e}"


def widths_over_ranks(folder: Path, options: dict[str, Any]) -> None:
    place, dims = Place.in_group(None), [32, 8]
    ours, alone = (tiny_model(folder).double() for _ in range(2))
    whole = tokenized(ours, 3, 6 * place.world)
    share = [share_of(place, features) for features in whole]
    settings = {"mini_batch_size": 4, "gather_across_devices": True, "matryoshka_dims": dims}
    loss = CachedMultipleNegativesRankingLoss(ours, **settings, **options)
    ddp = DistributedDataParallel(ours, find_unused_parameters=True)
    value = gradients(wrapped(loss, ddp), share, 2.0)
    plain = theirs.MultipleNegativesRankingLoss(alone, **options)
    torch.testing.assert_close(
        value, gradients(theirs.MatryoshkaLoss(alone, plain, dims), whole, 2)
    )
    name, error = worst_error(ours, alone)
    assert error < 1e-9, f"{name}: {error:.1e}"


def refusals(folder: Path) -> None:
    model = tiny_model(folder)
    features = tokenized(model)
    with pytest.raises(ValueError, match="gather_across_devices: expected True on 2 processes"):
        CachedMultipleNegativesRankingLoss(model)(features)
    with pytest.raises(ValueError, match="model: expected DistributedDataParallel on 2 processes"):
        CachedMultipleNegativesRankingLoss(model, gather_across_devices=True)(features)


def columns_tokenized_apart(folder: Path) -> None:
    """They are embedded one by one: a wrapper that looks for unused parameters is refused."""
    place = Place.in_group(None)
    ours, alone = (tiny_model(folder).double() for _ in range(2))
    whole = tokenized(ours, 2, 6 * place.world)
    whole[0]["prompt_length"] = 1
    share = [share_of(place, features) for features in whole]
    loss = CachedMultipleNegativesRankingLoss(ours, mini_batch_size=4, gather_across_devices=True)
    ddp = DistributedDataParallel(ours, find_unused_parameters=True)
    with pytest.raises(ValueError, match="; pass ddp_find_unused_parameters=False"):
        gradients(wrapped(loss, ddp), share)
    # The pooler is not used; that is found without asking the wrapper to look for it.
    gradients(wrapped(loss, DistributedDataParallel(ours)), share)
    gradients(theirs.MultipleNegativesRankingLoss(alone), whole)
    name, error = worst_error(ours, alone)
    assert error < 1e-9, f"{name}: {error:.1e}"


def evaluation(folder: Path) -> None:
    """Without gradients no wrapper is asked for."""
    place, model = Place.in_group(None), tiny_model(folder)
    whole = tokenized(model, 2, 6 * place.world)
    share = [share_of(place, features) for features in whole]
    loss = CachedMultipleNegativesRankingLoss(model, gather_across_devices=True)
    with torch.no_grad():
        expected = theirs.MultipleNegativesRankingLoss(model)(whole, torch.empty(0))
        torch.testing.assert_close(loss(share), expected)


def in_two(folder: Path) -> Iterator[tuple[str, Check]]:
    for name, options in (("one way", {}), ("both ways", BOTH_WAYS)):
        for unused in (True, False):
            check = partial(over_ranks, folder, options, unused)
            yield f"{name}, find_unused_parameters={unused}", check
        yield f"{name}, several widths", partial(widths_over_ranks, folder, options)
    yield "refusals", partial(refusals, folder)
    yield "columns tokenized apart", partial(columns_tokenized_apart, folder)
    yield "evaluation", partial(evaluation, folder)


class InTwo:
    """The checks over the saved model, which a process receives by pickle."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self) -> Iterator[tuple[str, Check]]:
        return in_two(self.folder)


@pytest.mark.slow
@pytest.mark.distributed
def test_in_two_processes(folder: Path, tmp_path: Path) -> None:
    tiny_model(folder)
    found = failures(InTwo(folder), 2, tmp_path)
    assert not found, "\n".join(found)
