"""The step that the trainer takes on a batch, beside a formula over all features in one graph."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from one_shot import gradient_errors
from torch import Tensor, nn

from gradcache_clip.train.config_file import load_config
from gradcache_clip.train.run_folder import RunFolder
from gradcache_clip.train.session import Session, start_session
from gradcache_clip.train.step import make_backward

LIMIT = 1e-10
# A gradient that is zero by construction is nothing but rounding, relative to itself.
NOTHING = 1e-14

Formula = Callable[..., Tensor]
"""Called with the features of each tower, the loss module and the groups of the batch."""


def session_of(config: str | Path | None, settings: Sequence[str], folder: Path) -> Session:
    """A run as it starts, in fp64."""
    loaded = load_config(config, settings)
    session = start_session(loaded, RunFolder(folder))
    session.encoder.double()
    session.loss.double()
    return session


def assert_step_equals(
    session: Session, formula: Formula, groups: Callable[[int], str] | None = None
) -> Any:
    """Loss, and gradient of every parameter, of the trainer's step on the next batch.

    With `groups`, a row's match group is what that gives for its number.
    """
    with closing(session.batches()) as batches:
        batch = next(batches)
    if groups is not None:
        batch.groups[:] = map(groups, range(len(batch.groups)))
    inputs, loss_kwargs = session.inputs_of(batch)
    encoder, loss = copy.deepcopy((session.encoder, session.loss))
    module, strategy = session.engine.module, session.engine.strategy
    backward = make_backward(module, session.loss, session.objective, strategy)
    output = backward(*inputs, loss_kwargs=loss_kwargs)
    features = [encoder(tower, given) for tower, given in enumerate(inputs)]
    expected = formula(*features, loss, batch.groups)
    expected.backward()
    truth = float(expected.detach())
    error = abs(float(output.loss) - truth)
    assert error < LIMIT * max(1.0, abs(truth)), (error, truth)
    assert_same_gradients([session.encoder, session.loss], [encoder, loss])
    return output


def assert_same_gradients(modules: Sequence[nn.Module], truth: Sequence[nn.Module]) -> None:
    theirs = dict(nn.ModuleList(truth).named_parameters())
    for name, error in gradient_errors(modules, truth).items():
        gradient = theirs[name].grad
        size = 0.0 if gradient is None else float(gradient.norm())
        assert error < LIMIT or error * size < NOTHING, (name, error, size)


def unit(features: Tensor, width: int | None = None) -> Tensor:
    """Rows of length one; of the first columns alone with a width."""
    prefix = features[:, :width]
    return prefix / prefix.norm(dim=1, keepdim=True)


def same_group(groups: Sequence[str]) -> Tensor:
    """bool (B, B)."""
    return torch.tensor([[a == b for b in groups] for a in groups])
