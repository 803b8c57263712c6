"""The step that the trainer takes on a batch, beside a formula over all features in one graph."""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from one_shot import gradient_errors
from torch import Tensor, nn

from gradcache_clip.train.config_file import load_config
from gradcache_clip.train.peers import Peers
from gradcache_clip.train.programs import program_of
from gradcache_clip.train.programs.program import Program, Step
from gradcache_clip.train.run import training_step
from gradcache_clip.train.run_folder import RunFolder
from gradcache_clip.train.state import TrainState, start
from gradcache_clip.train.step import Backward, StepResult, make_backward
from gradcache_clip.train.tokenizer import Tokenizer

LIMIT = 1e-10
# A gradient that is zero by construction is nothing but rounding, relative to itself.
NOTHING = 1e-14

Formula = Callable[..., Tensor]
"""Called with the features of each tower, the loss module and the groups of the batch."""


@dataclass
class Trainer:
    """A run that has not taken a step."""

    program: Program[Any]
    state: TrainState
    tokenizer: Tokenizer | None

    @property
    def config(self) -> Any:
        return self.program.config

    @property
    def encoder(self) -> Any:
        return self.state.encoder

    @property
    def loss(self) -> Any:
        return self.state.loss

    def batches(self) -> Generator[Any, None, None]:
        return self.state.batches()

    def inputs_of(self, batch: Any, device: str = "cpu") -> Step:
        return self.program.inputs(batch, self.tokenizer, torch.device(device))

    def take_steps(self, batches: Sequence[Any]) -> list[StepResult]:
        step = training_step(self.program, self.state, self.tokenizer, torch.device("cpu"))
        results = []
        for batch in batches:
            results.append(step(batch))
            self.state.step += 1
        return results

    def backward(self) -> Backward:
        engine, order = self.state.engine, self.program.sort_by_length
        return make_backward(engine.module, self.loss, self.config.train, engine.strategy, order)


def trainer_of(config: str | Path | None, settings: Sequence[str], folder: Path) -> Trainer:
    """A run as it starts, in fp64."""
    program = program_of(load_config(config, settings))
    state, tokenizer = start(program, RunFolder(folder), Peers())
    state.encoder.double()
    state.loss.double()
    return Trainer(program, state, tokenizer)


def assert_step_equals(
    trainer: Trainer, formula: Formula, groups: Callable[[int], str] | None = None
) -> Any:
    """Loss, and gradient of every parameter, of the trainer's step on the next batch.

    With `groups`, a row's match group is what that gives for its number.
    """
    with closing(trainer.batches()) as batches:
        batch = next(batches)
    if groups is not None:
        batch.groups[:] = map(groups, range(len(batch.groups)))
    inputs, loss_kwargs = trainer.inputs_of(batch)
    encoder, loss = copy.deepcopy((trainer.encoder, trainer.loss))
    output = trainer.backward()(*inputs, loss_kwargs=loss_kwargs)
    features = [encoder(tower, given) for tower, given in enumerate(inputs)]
    expected = formula(*features, loss, batch.groups)
    expected.backward()
    truth = float(expected.detach())
    error = abs(float(output.loss) - truth)
    assert error < LIMIT * max(1.0, abs(truth)), (error, truth)
    assert_same_gradients([trainer.encoder, trainer.loss], [encoder, loss])
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
