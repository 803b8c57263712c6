"""Report hooks on parameters: once a step, on the finished gradient, or on parts of it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from gradcache_clip.verification.experiments import Reason, listed
from gradcache_clip.verification.steps import Trial, reduces_itself

ON_PARTS = "hooks on parameters run on parts of the gradient"

Leaves = Mapping[int, tuple[str, Tensor]]


def hooked_names(trial: Trial, leaves: Leaves) -> list[str]:
    return [leaves[id(leaf)][0] for leaf in trial.hooked if id(leaf) in leaves]


def hooks_on_parts(trial: Trial, leaves: Leaves) -> list[Reason]:
    """Report post-accumulate hooks, held back by a verification, that a step runs too early."""
    held = {id(leaf) for leaf in trial.start.held}
    known = {id(leaf) for leaf in trial.hooked}
    late = trial.gradient_hooks == "once" and not reduces_itself(trial.strategy)
    early = held & known if not late else set[int]()
    by_function = held & trial.known_to_functions()
    reasons = []
    if names := [leaves[key][0] for key in leaves if key in early]:
        reasons.append(Reason(ON_PARTS, f"{listed(names)}: {_why(trial)}"))
    if names := [leaves[key][0] for key in leaves if key in by_function]:
        reasons.append(
            Reason(
                ON_PARTS,
                f"{listed(names)}: a post-accumulate hook runs once per chunk, for only a function "
                "knows the parameter; pass the module itself as get_features",
            )
        )
    return reasons


def hooks_run_once(trial: Trial, leaves: Leaves) -> list[str]:
    """Note hooks that run as in a plain step."""
    names = hooked_names(trial, leaves)
    if trial.gradient_hooks != "once" or not names:
        return []
    return [f"{listed(names)}: hooks run once a step, on the finished gradient"]


def _why(trial: Trial) -> str:
    if trial.gradient_hooks == "once":
        return (
            "a post-accumulate hook runs before your sum over the processes; pass "
            "strategy=AllReduceStrategy(), which sums first"
        )
    return (
        "a post-accumulate hook runs once per chunk, on a part of the gradient; pass "
        'gradient_hooks="once" to run it once, on the finished gradient'
    )
