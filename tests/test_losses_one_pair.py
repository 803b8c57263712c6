"""A batch of one pair: an error where nothing competes, a loss where something does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from losses_over_ranks import Place, alone_group, relative_errors
from rank_processes import Check, failures
from torch import Tensor

from gradcache_clip import losses

WIDTH = 4
NO_NEGATIVES = r"batch: expected at least 2 pairs, got 1; .*drop the last batch"


class Case(NamedTuple):
    """A loss, and the shapes of a row of what it is given."""

    build: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...] = ((WIDTH,), (WIDTH,))
    more: Callable[[int], dict[str, Tensor]] = lambda rows: {}
    features: int = 3
    """The inputs that get gradients; those after them are constants."""

    def given(self, rows: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(5)
        return [torch.randn(rows, *each, generator=generator).double() for each in self.shapes]


ROW, OWN, TOKENS = (WIDTH,), (2, WIDTH), (3, WIDTH)
DIRECTIONS = "query_to_doc", "doc_to_query"


def scores(rows: int) -> dict[str, Tensor]:
    return {"scores": torch.linspace(0, 3, 3 * rows).view(rows, 3).double()}


def moco(**options: Any) -> losses.MoCoLoss:
    torch.manual_seed(0)
    contrast = losses.InfoNCELoss(**options)
    return losses.MoCoLoss(contrast, [losses.FeatureQueue(8, WIDTH, group=contrast.group)]).double()


def widths(loss: Callable[..., Any], **options: Any) -> losses.MatryoshkaLoss:
    return losses.MatryoshkaLoss(loss(**options), [2, WIDTH])


ALONE = {
    "clip": Case(losses.ClipLoss),
    "InfoNCE": Case(losses.InfoNCELoss),
    "InfoNCE both ways": Case(partial(losses.InfoNCELoss, symmetric=True)),
    "InfoNCE debiased": Case(partial(losses.InfoNCELoss, tau_plus=0.1)),
    "retrieval": Case(losses.RetrievalLoss),
    "retrieval both ways": Case(partial(losses.RetrievalLoss, directions=DIRECTIONS)),
    "NT-Xent": Case(losses.NTXentLoss),
    "late interaction": Case(losses.LateInteractionLoss, (TOKENS, TOKENS)),
    "MaxSim": Case(losses.MaxSimLoss, (TOKENS, TOKENS)),
    "in-batch distillation": Case(
        partial(losses.InBatchDistillationLoss, teacher_scale=5.0), (ROW,) * 4, features=2
    ),
    "clip of widths": Case(partial(widths, losses.ClipLoss)),
    "InfoNCE of widths": Case(partial(widths, losses.InfoNCELoss)),
    "retrieval of widths": Case(partial(widths, losses.RetrievalLoss)),
    "NT-Xent of widths": Case(partial(widths, losses.NTXentLoss)),
}
AGAINST = {
    "sigmoid": Case(losses.SigLipLoss),
    "InfoNCE, shared": Case(losses.InfoNCELoss, (ROW, ROW, ROW)),
    "InfoNCE, own": Case(losses.InfoNCELoss, (ROW, ROW, OWN)),
    "retrieval": Case(losses.RetrievalLoss, (ROW, ROW, OWN)),
    "retrieval, both ways": Case(
        partial(losses.RetrievalLoss, directions=DIRECTIONS), (ROW, ROW, OWN)
    ),
    "retrieval, own alone": Case(
        partial(losses.RetrievalLoss, in_batch_negatives=False), (ROW, ROW, OWN)
    ),
    "MoCo": Case(moco, features=1),
    "MaxSim": Case(losses.MaxSimLoss, (TOKENS, TOKENS, (2, *TOKENS))),
    "scores": Case(losses.ScoreDistillationLoss, (ROW, ROW, OWN), scores),
    "scores of tokens": Case(losses.MaxSimDistillationLoss, (TOKENS, TOKENS, (2, *TOKENS)), scores),
    "InfoNCE of widths": Case(partial(widths, losses.InfoNCELoss), (ROW, ROW, OWN)),
}


def evaluated(case: Case, place: Place, **options: Any) -> dict[str, Tensor]:
    """Loss and gradients of this rank's rows, one for each rank."""
    rows = options.pop("rows", place.world)
    given = [each.chunk(place.world)[place.rank].clone() for each in case.given(rows)]
    more = {key: each.chunk(place.world)[place.rank] for key, each in case.more(rows).items()}
    for each in given[: case.features]:
        each.requires_grad_()
    found = case.build(**options)(*given, **more).loss
    found.backward()
    gradients = {f"d{n}": x.grad for n, x in enumerate(given[: case.features])}
    return {"loss": found.detach()} | gradients


@pytest.mark.parametrize("impl", ["reference", "tiled"])
@pytest.mark.parametrize("name", ALONE)
def test_nothing_competes(name: str, impl: str) -> None:
    with pytest.raises(ValueError, match=NO_NEGATIVES):
        evaluated(ALONE[name], Place(0, 1), impl=impl)


@pytest.mark.parametrize("impl", ["reference", "tiled"])
@pytest.mark.parametrize("name", AGAINST)
def test_something_competes(name: str, impl: str) -> None:
    found = evaluated(AGAINST[name], Place(0, 1), impl=impl)
    assert all(each.isfinite().all() and each.any() for each in found.values())


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("together", [True, False])
def test_rows_of_classes_are_at_most_one_pair(rows: int, together: bool) -> None:
    features, labels = torch.eye(2)[:rows], torch.tensor([0, 1 - together])[:rows]
    with pytest.raises(ValueError, match=NO_NEGATIVES):
        losses.SupConLoss()(features, labels)
    # A pair and a stranger.
    assert losses.SupConLoss()(torch.eye(3), torch.tensor([0, 0, 1])).loss > 0


def one_on_each_rank(case: Case) -> None:
    """The pairs of all ranks are the batch."""
    place = Place.in_group(None)
    got = evaluated(case, place, exchange="ring")
    whole = evaluated(case, Place(0, 1), rows=place.world, group=alone_group())
    share = {
        key: each if key == "loss" else each.chunk(place.world)[place.rank]
        for key, each in whole.items()
    }
    assert max(relative_errors(got, share).values()) < 1e-10


def a_row_of_a_class_on_each_rank() -> None:
    place = Place.in_group(None)
    features, labels = torch.eye(2)[[place.rank]], torch.tensor([7])
    with pytest.raises(ValueError, match=NO_NEGATIVES):
        losses.SupConLoss()(features, labels)


def over_ranks() -> Iterator[tuple[str, Check]]:
    for name, case in [*ALONE.items(), *AGAINST.items()]:
        yield name, partial(one_on_each_rank, case)
    yield "classes", a_row_of_a_class_on_each_rank


@pytest.mark.slow
@pytest.mark.distributed
def test_in_processes(tmp_path: Path) -> None:
    found = failures(over_ranks, 2, tmp_path)
    assert not found, "\n".join(found)
