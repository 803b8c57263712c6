"""Is the loss that of the global batch? Its change along all ranks' features beside its gradients.

A loss may communicate, so no rank can evaluate it alone for all others. Instead every rank moves
its features a little, and the loss must change by the sum over ranks of gradient times movement,
however the strategy reduces.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from gradcache_clip.distributed.collectives import world_size
from gradcache_clip.verification.experiments import Reason
from gradcache_clip.verification.gap import RELATIVE_ROUNDING, wide
from gradcache_clip.verification.ranks import of_all_ranks, on_any_rank
from gradcache_clip.verification.steps import Outcome, Trial

WRONG_LOSS = "the loss is not that of the global batch"
UNREDUCED = "a parameter that only a function knows is not reduced over ranks"
_REMEDY = "let every rank compute the loss of all rows, with ClipLoss or gather_rows"

_LARGEST_MOVE = 0.1
_ROUNDINGS = 8


class _Probe(NamedTuple):
    """Relative changes of the loss to aim for, and relative errors to allow."""

    changes: tuple[float, float]
    slope_error: float
    gradient_error: float


_PROBES = {
    torch.float64: _Probe((1e-4, 1e-6), 1e-3, 1e-8),
    torch.float32: _Probe((1e-2, 1e-3), 0.05, 1e-3),
}
_COARSE_PROBE = _Probe((0.1, 0.05), 0.25, 0.1)


class LossFindings(NamedTuple):
    """Why the loss is not that of the global batch, or what a person should look at."""

    failure: str = ""
    note: str = ""

    @property
    def reasons(self) -> list[Reason]:
        return [Reason(WRONG_LOSS, self.failure)] if self.failure else []

    @property
    def notes(self) -> list[str]:
        return [self.note] if self.note else []


def loss_over_ranks(trial: Trial, plain: Outcome, precision: torch.dtype) -> LossFindings:
    """Check the loss over several ranks, all of which must call this.

    Args:
        trial: whose loss it is.
        plain: a plain step over the whole batch.
        precision: the coarsest that features are computed in.
    """
    if world_size() == 1:
        return LossFindings()
    losses = of_all_ranks(float(plain.loss))
    rounding = RELATIVE_ROUNDING.get(plain.loss.dtype, 0.0)
    if not max(losses) - min(losses) <= rounding * max(map(abs, losses)):
        return LossFindings(_of_local_rows(losses))
    probe = _PROBES.get(precision, _COARSE_PROBE)
    off = _wrong_slopes(trial, plain, probe)
    if off and all(abs(ratio / world_size() - 1) <= probe.slope_error for ratio in off):
        return LossFindings(_summed_over_ranks())
    for name, norm in _norms_of_own_gradients(trial, plain):
        norms = of_all_ranks(norm)
        if not max(norms) - min(norms) <= probe.gradient_error * max(norms):
            return LossFindings(
                f"{name}: expected the same gradient on every rank, got others, which nobody "
                f"reduces; {_REMEDY}"
            )
    # In 16 bits a jump is as large as a move.
    told = off and probe is not _COARSE_PROBE
    return LossFindings(note=_not_followed(off[-1]) if told else "")


def _wrong_slopes(trial: Trial, plain: Outcome, probe: _Probe) -> list[float]:
    """Predicted over observed change for every move, if no move has the right one."""
    moves = enumerate(probe.changes)
    ratios = (_gradient_over_slope(trial, plain, change, draw) for draw, change in moves)
    # A loss with a margin jumps where a move crosses it, which another move does not repeat.
    off = list(takewhile(lambda ratio: abs(ratio - 1) > probe.slope_error, ratios))
    return off if len(off) == len(probe.changes) else []


def _summed_over_ranks() -> str:
    return (
        f"loss: the gradient is {world_size()} times too large: its backward sums over ranks, as "
        f"that of torch.distributed.nn.all_gather does; {_REMEDY}"
    )


def _of_local_rows(losses: Sequence[float]) -> str:
    values = ", ".join(f"{loss:.6g}" for loss in losses[:4])
    return (
        f"loss: expected the same value on every rank, got {values} by rank, as of a loss over "
        "each rank's own rows, so the gradient is that of the sum of these losses, "
        f"{len(losses)} times too large for their mean; {_REMEDY}"
    )


def _not_followed(ratio: float) -> str:
    return (
        f"loss: its gradient predicts {ratio:.2g} times the change that moving the features of all "
        "ranks makes; right where it detaches features on purpose, wrong where it gathers them "
        "without a gradient for this rank's rows, as torch.distributed.all_gather does"
    )


def _norms_of_own_gradients(trial: Trial, plain: Outcome) -> Iterator[tuple[str, float]]:
    """Parameters of the loss, whose gradients are complete on every rank."""
    for name, parameter in trial.loss_parameters():
        gradient = plain.gradients.get(id(parameter))
        yield name, 0.0 if gradient is None else float(torch.linalg.vector_norm(gradient))


def _gradient_over_slope(trial: Trial, plain: Outcome, change: float, draw: int) -> float:
    """Predicted over observed change of the loss when the features of all ranks move; 1 if right.

    They move along their gradient plus noise, which shows mistakes across the gradient too.
    """
    gradients = _feature_gradients(trial, plain)
    moves = _moves(gradients, plain, change, draw)
    ends = [_moved(plain.features, moves, sign) for sign in (1, -1)]
    up, down = (_mean(of_all_ranks(float(trial.loss(end, plain).detach()))) for end in ends)
    # Features round, so what they really moved by counts.
    differences = (wide(one) - wide(other) for one, other in zip(*ends, strict=True))
    products = (g * d for g, d in zip(gradients, differences, strict=True))
    predicted = sum(of_all_ranks(sum(float(product.sum()) for product in products)))
    observed = up - down
    unseen = _ROUNDINGS * torch.finfo(plain.loss.dtype).eps * (1 + abs(up))
    if max(abs(predicted), abs(observed)) <= unseen:
        return 1.0
    return predicted / observed if observed else math.inf


def _feature_gradients(trial: Trial, plain: Outcome) -> list[Tensor]:
    """Zero for features that take none."""
    ends = [feature.clone() for feature in plain.features]
    trained = [end for end, has in zip(ends, plain.trained, strict=True) if has]
    for end in trained:
        end.requires_grad_()
    loss = trial.loss(ends, plain)
    found = torch.autograd.grad(loss, trained, allow_unused=True) if trained else ()
    gradients = {id(end): gradient for end, gradient in zip(trained, found, strict=True)}
    kept = (gradients.get(id(end)) for end in ends)
    return [wide(end.detach() * 0 if g is None else g) for end, g in zip(ends, kept, strict=True)]


def _moves(gradients: Sequence[Tensor], plain: Outcome, change: float, draw: int) -> list[Tensor]:
    steepness = _norm(gradients)
    noise = _noise(gradients, plain.trained, draw)
    length = _LARGEST_MOVE * _norm([wide(feature) for feature in plain.features])
    if steepness:
        length = min(length, change * abs(float(plain.loss)) / steepness)
    along, across = length / (steepness or 1), length / (_norm(noise) or 1)
    return [g * along + n * across for g, n in zip(gradients, noise, strict=True)]


def _noise(gradients: Sequence[Tensor], trained: Sequence[bool], draw: int) -> list[Tensor]:
    """The same in every verification, and other numbers on every rank."""
    generator = torch.Generator().manual_seed(draw * world_size() + dist.get_rank())
    drawn = [torch.randn(g.shape, generator=generator) for g in gradients]
    return [d.to(g) * has for d, g, has in zip(drawn, gradients, trained, strict=True)]


def _moved(features: Sequence[Tensor], moves: Sequence[Tensor], sign: int) -> list[Tensor]:
    return [
        (wide(feature) + sign * move).to(feature.dtype).requires_grad_(feature.is_floating_point())
        for feature, move in zip(features, moves, strict=True)
    ]


def _norm(tensors: Sequence[Tensor]) -> float:
    """Sum over all ranks."""
    return math.sqrt(sum(of_all_ranks(sum(float((t * t).sum()) for t in tensors))))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def unreduced(trial: Trial) -> list[Reason]:
    """Report parameters of functions, which no strategy reduces; every rank must call this."""
    names = trial.named_leaves()
    found = [names[id(leaf)][0] for leaf in trial.unreduced]
    if not on_any_rank(bool(found)):
        return []
    name = found[0] if found else "a tensor of a function on another rank"
    return [
        Reason(
            UNREDUCED,
            f"{name}: expected a parameter of a module, got one that only a function knows; pass "
            "the module itself as get_features, or put it into the encoder",
        )
    ]
