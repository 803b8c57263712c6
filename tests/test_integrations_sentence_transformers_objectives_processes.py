"""Directions, hardness, a guide and distillation on two processes, beside one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from losses_over_ranks import Place
from rank_processes import Check, failures
from torch.nn.parallel import DistributedDataParallel

pytest.importorskip("sentence_transformers")

from sentence_transformers.multi_vector_encoder import losses as their_multi_vector
from sentence_transformers.sentence_transformer import losses as theirs
from tiny_sentences import share_of, tiny_guide, tiny_model, tokenized, worst_error, wrapped
from tiny_tokens import exact_own_scores, exact_scores, tiny_tokens, token_columns

from gradcache_clip.integrations import sentence_transformers as ours
from gradcache_clip.integrations import sentence_transformers_multi_vector as ours_multi_vector

COLUMNS = 4


def check(
    folder: Path,
    mine: Callable[[Any], Any],
    plain: Callable[[Any], Any],
    labels: torch.Tensor | None = None,
    build: Callable[[Path], Any] = tiny_model,
    columns: Callable[..., list[dict[str, Any]]] = tokenized,
) -> None:
    """The loss of the whole batch on every rank, and its gradients in every replica."""
    place = Place.in_group(None)
    model, alone = (build(folder).double() for _ in range(2))
    # DDP would wait for the gradient of the pooler, which mean pooling does not use.
    model[0].auto_model.pooler.requires_grad_(False)
    whole = columns(model, COLUMNS, 6 * place.world)
    share = [share_of(place, features) for features in whole]
    loss = wrapped(mine(model), DistributedDataParallel(model))
    own = None if labels is None else labels.chunk(place.world)[place.rank]
    got = loss(share, own)
    expected = plain(alone)(whole, torch.empty(0) if labels is None else labels)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    (2 * got).backward()
    (2 * expected).backward()
    name, error = worst_error(model, alone)
    assert error < 1e-9, f"{name}: {error:.1e}"


def in_two(folder: Path) -> Iterator[tuple[str, Check]]:
    chunks, guide = {"mini_batch_size": 4}, tiny_guide(folder).double()
    gathers = {"gather_across_devices": True, **chunks}
    retrieval: dict[str, Any] = {
        "directions": ("query_to_doc", "doc_to_query", "query_to_query", "doc_to_doc"),
        "hardness_mode": "all_negatives",
        "hardness_strength": 5.0,
    }
    scores = torch.randn(12, COLUMNS - 1, generator=torch.Generator().manual_seed(4)).double()
    yield (
        "directions and hardness",
        partial(
            check,
            folder,
            partial(ours.CachedMultipleNegativesRankingLoss, **retrieval, **gathers),
            partial(theirs.MultipleNegativesRankingLoss, **retrieval),
        ),
    )
    yield (
        "guide",
        partial(
            check,
            folder,
            partial(ours.CachedGISTEmbedLoss, guide=guide, margin=0.05, **gathers),
            partial(theirs.CachedGISTEmbedLoss, guide=guide, margin=0.05),
        ),
    )
    yield (
        "margins",
        partial(
            check,
            folder,
            partial(ours.CachedMarginMSELoss, **chunks),
            theirs.MarginMSELoss,
            scores,
        ),
    )
    yield (
        "kl",
        partial(
            check,
            folder,
            partial(ours.CachedDistillKLDivLoss, temperature=2.0, **chunks),
            partial(theirs.DistillKLDivLoss, temperature=2.0),
            scores,
        ),
    )
    yield "margins beside in-batch negatives", partial(in_batch, folder, scores)
    tokens = {"build": tiny_tokens, "columns": token_columns}
    yield (
        "tokens",
        partial(
            check,
            folder,
            partial(ours_multi_vector.CachedMultiVectorMultipleNegativesRankingLoss, **gathers),
            partial(
                their_multi_vector.MultiVectorMultipleNegativesRankingLoss,
                similarity_fct=exact_scores,
            ),
            **tokens,
        ),
    )
    yield (
        "tokens, kl",
        partial(
            check,
            folder,
            partial(ours_multi_vector.CachedMultiVectorDistillKLDivLoss, **chunks),
            partial(
                their_multi_vector.MultiVectorDistillKLDivLoss, similarity_fct=exact_own_scores
            ),
            scores,
            **tokens,
        ),
    )


def in_batch(folder: Path, scores: torch.Tensor) -> None:
    """The in-batch negatives are those of all processes."""

    def plain(model: Any) -> Callable[..., torch.Tensor]:
        parts = theirs.MarginMSELoss(model), theirs.MultipleNegativesRankingLoss(model, 10.0)

        def loss(features: Any, labels: torch.Tensor) -> torch.Tensor:
            margins, contrast = (each([{**f} for f in features], labels) for each in parts)
            return margins + 0.3 * contrast

        return loss

    options = {"mini_batch_size": 4, "in_batch_weight": 0.3, "in_batch_scale": 10.0}
    check(folder, partial(ours.CachedMarginMSELoss, **options), plain, scores)


class InTwo:
    """The checks over the saved models, which a process receives by pickle."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self) -> Iterator[tuple[str, Check]]:
        return in_two(self.folder)


@pytest.mark.slow
@pytest.mark.distributed
def test_in_two_processes(tmp_path: Path) -> None:
    folder = tmp_path / "tiny_sentences"
    tiny_model(folder)
    tiny_guide(folder)
    found = failures(InTwo(folder), 2, tmp_path)
    assert not found, "\n".join(found)
