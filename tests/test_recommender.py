"""examples/recommender.py: the log q correction helps, and its step is the one-shot step."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from torch import nn

from gradcache_clip import GradCache, RetrievalLoss

EXAMPLE = str(Path(__file__).parent.parent / "examples" / "recommender.py")


@pytest.mark.slow
def test_the_correction_finds_more() -> None:
    recall = runpy.run_path(EXAMPLE)["recall"]
    assert recall(True) > 1.5 * recall(False)


def test_a_step_equals_the_whole_matrix() -> None:
    made = runpy.run_path(EXAMPLE)
    past, share = made["past"][:24], made["share"].double()
    bias = nn.Parameter(-share.log())
    users, items = made["Users"]().double(), nn.Embedding(made["ITEMS"], 32).double()
    loss = RetrievalLoss(normalize=False, init_logit_scale=1.0).double()
    chosen, rest = past[:, 0], past[:, 1:]
    given = {"ids": chosen, "column_bias": bias[chosen]}
    GradCache([users, items], loss, chunk_size=7)(rest, chosen, loss_kwargs=given)
    logits = users(rest) @ items(chosen).T + bias[chosen]
    same = (chosen[:, None] == chosen) & ~torch.eye(24, dtype=torch.bool)
    logits = logits.masked_fill(same, -torch.inf)
    parameters = [*users.parameters(), *items.parameters(), bias]
    whole = nn.functional.cross_entropy(logits, torch.arange(24))
    for parameter, want in zip(parameters, torch.autograd.grad(whole, parameters), strict=True):
        torch.testing.assert_close(parameter.grad, want, rtol=1e-10, atol=1e-12)
