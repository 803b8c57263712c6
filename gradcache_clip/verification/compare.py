"""Compare the cached step with the plain step on one batch, and say why they differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gradcache_clip.cache.chunks import row_count
from gradcache_clip.cache.grad_cache import GradCache
from gradcache_clip.cache.trace import largest_change
from gradcache_clip.distributed.collectives import world_size
from gradcache_clip.verification.cut import Cut, reversed_chunks, reversed_rows
from gradcache_clip.verification.experiments import (
    BACKWARD,
    IN_PLACE,
    RANDOM,
    STATE,
    Experiments,
    Reason,
)
from gradcache_clip.verification.gap import RELATIVE_ROUNDING, Gap, all_allowed, gap
from gradcache_clip.verification.hooks import hooked_names, hooks_on_parts, hooks_run_once
from gradcache_clip.verification.loss import loss_over_ranks, unreduced
from gradcache_clip.verification.ranks import of_all_ranks, on_any_rank
from gradcache_clip.verification.report import (
    DIFFERS,
    EXACT,
    ROUNDING,
    SAME_CHUNKS,
    SAME_DRAWS,
    VerifyReport,
    VerifyRow,
)
from gradcache_clip.verification.steps import (
    Outcome,
    Trial,
    reduces_itself,
)


def verify(
    cache: GradCache, *inputs: Any, loss_kwargs: Mapping[str, Any] | None = None
) -> VerifyReport:
    """Take one batch as cached step and as plain step, and compare every gradient.

    The plain step is `loss(*[encoder(x) for encoder, x in zip(encoders, inputs)]).backward()`:
    every encoder once over all rows, one graph, one backward. A second plain step goes over the
    same chunks with the same random draws in one graph. It tells features that depend on how the
    batch is cut (batch norm) from replays that do not repeat their embed. Gradients may differ by
    the rounding of the precision computed in, or by ten times what the plain step's own change
    when its rows are summed in another order and its features are rounded as those of chunks.

    Where they differ, experiments name the likely reason for each encoder: random layers, batch
    norm in train mode, modules that do not repeat themselves, inputs that are changed in place,
    rows that look at other rows, padding that counts, gradient hooks that run once per chunk.

    Over several processes, all of which must call this, the plain step's gradients are summed over
    the ranks without help of the strategy. The loss must be that of the global batch: the same on
    every rank, and it must change as its gradients say when the features of all ranks move. With
    `LocalStrategy(reduce_myself=True)` the sums over the ranks are compared.

    Chunks are those of `cache`, or a quarter of the batch where that is smaller, and one graph at
    most is kept, so that replays are tested. Afterwards everything is as before: gradients,
    trained weights, optimizers that a hook stepped, random generators, buffers, training flags and
    other plain attributes of the modules, and inputs. Post-accumulate hooks do not run. The graph
    of the whole batch, up to four sets of gradients and a copy of the trained weights are in
    memory meanwhile.

    Args:
        cache: as used for training; nothing in it is changed.
        inputs: one batch for each encoder, of some dozen rows.
        loss_kwargs: further arguments of the loss.

    Raises:
        ValueError, TypeError: as `cache(*inputs)` would; or gradients of the plain step are not
            finite, so that they cannot be compared.

    Example:
        >>> import torch
        >>> from gradcache_clip import ClipLoss, GradCache, verify
        >>> encoders = torch.nn.Linear(8, 4), torch.nn.Linear(6, 4)
        >>> cache = GradCache(encoders, ClipLoss())
        >>> report = verify(cache, torch.randn(32, 8), torch.randn(32, 6))
        >>> report.exact, len(report.rows), report.reasons
        (True, 5, [])
    """
    if not torch.is_grad_enabled():
        raise RuntimeError(
            "verify: expected gradients to be enabled, got a call inside torch.no_grad(); call it "
            "outside"
        )
    trial = Trial(cache, inputs, loss_kwargs or {})
    with trial.start.undone():
        return _Verification(trial).report()


class _Verification:
    """Compare the three steps of a trial."""

    def __init__(self, trial: Trial) -> None:
        self._trial = trial
        # First: only its graph shows every leaf, whatever function holds it.
        self._plain = trial.plain(trial.whole())
        self._leaves = trial.named_leaves()
        self._refuse_infinite_gradients()
        self._cached, self._towers = trial.cached()
        self._precision = self._coarsest_dtype()
        self._rounding = RELATIVE_ROUNDING.get(self._precision, max(RELATIVE_ROUNDING.values()))

    def report(self) -> VerifyReport:
        trial, one_shot_loss = self._trial, float(self._plain.loss)
        over_ranks = loss_over_ranks(trial, self._plain, self._precision)
        failures = [
            *hooks_on_parts(trial, self._leaves),
            *over_ranks.reasons,
            *unreduced(trial),
        ]
        whole = self._gaps(self._plain, reversed_rows(trial.cut), self._rounding)
        del self._plain
        chunks = [tower.chunks for tower in self._towers]
        # The same kernels over the same numbers; accelerators and ranks may add in another order.
        same_order = trial.device.type == "cpu" and world_size() == 1
        rounding = 0.0 if same_order else self._rounding
        chunked = trial.plain(chunks, over_chunks=True)
        same = self._gaps(chunked, reversed_chunks(chunks), rounding, over_chunks=True)
        del chunked
        reasons = self._reasons(whole, same, explained=bool(failures))
        kinds = {reason.kind for reason in reasons}
        only_random = kinds == {RANDOM}
        otherwise = SAME_DRAWS if only_random else SAME_CHUNKS
        rows = [self._row(key, whole[key], same[key], otherwise) for key in self._leaves]
        return VerifyReport(
            rows=tuple(sorted(rows, key=_severity, reverse=True)),
            exact=not failures and all_allowed(same) and (all_allowed(whole) or only_random),
            reasons=[reason.text for reason in (*failures, *reasons)],
            loss=float(self._cached.loss),
            one_shot_loss=one_shot_loss,
            batch_size=row_count(trial.cut[0]),
            chunk_sizes=tuple(max(map(len, chunks)) for chunks in trial.cut),
            precision=str(self._precision).removeprefix("torch."),
            tolerance=self._rounding,
            failure=failures[0].kind if failures else "",
            notes=[*hooks_run_once(trial, self._leaves), *over_ranks.notes],
            summed_over=world_size() if reduces_itself(trial.strategy) else 1,
        )

    def _gaps(
        self, plain: Outcome, other_order: Cut, rounding: float, *, over_chunks: bool = False
    ) -> dict[int, Gap]:
        """Compare the cached step with a plain one: every gradient, and the loss under 0."""
        gaps = self._gaps_beside(plain, None, rounding)
        if not on_any_rank(not all_allowed(gaps)):
            return gaps
        ours = self._cached.features
        # Other kernels compute a chunk, and a loss may amplify how they round.
        rounded_as = ours if largest_change(plain.features, ours) <= self._rounding else ()
        other = self._trial.plain(
            other_order, over_chunks=over_chunks, like=plain, rounded_as=rounded_as
        )
        # Modules that draw or keep something else in another order say nothing about rounding.
        if not largest_change(plain.features, other.features) <= self._rounding:
            return gaps
        return self._gaps_beside(plain, other, rounding)

    def _gaps_beside(
        self, plain: Outcome, other: Outcome | None, rounding: float
    ) -> dict[int, Gap]:
        again = plain if other is None else other
        gaps = {0: gap(self._cached.loss, plain.loss, again.loss, rounding)}
        for key in self._leaves:
            ours, theirs, ordered = (step.gradients[key] for step in (self._cached, plain, again))
            gaps[key] = gap(ours, theirs, ordered, rounding)
        return gaps

    def _row(self, key: int, whole: Gap, same: Gap, otherwise: str) -> VerifyRow:
        """`otherwise` is the verdict where only a graph over the same chunks gives the same."""
        name, leaf = self._leaves[key]
        if not same.allowed:
            verdict = DIFFERS
        elif not whole.allowed:
            verdict = otherwise
        else:
            verdict = EXACT if whole.equal and same.equal else ROUNDING
        return VerifyRow(name, tuple(leaf.shape), whole.error, same.error, verdict)

    def _reasons(
        self, whole: Mapping[int, Gap], same: Mapping[int, Gap], *, explained: bool
    ) -> list[Reason]:
        if not on_any_rank(not (all_allowed(whole) and all_allowed(same))):
            return []
        start, make, found = self._trial.start, self._trial.towers, dict[Reason, None]()
        for index, tower in enumerate(self._towers):
            experiments = Experiments(start, index, make, self._rounding)
            replayed = bool(tower.trainable)
            reasons = experiments.reasons(replayed=replayed, repeats=replayed and all_allowed(same))
            found.update(dict.fromkeys(reasons))
        kinds = {reason.kind for reason in found}
        if not explained and not (kinds if all_allowed(same) else kinds & {STATE, IN_PLACE}):
            found[self._backward()] = None
        return list(found)

    def _backward(self) -> Reason:
        """Where to look when the forward shows nothing."""
        names = hooked_names(self._trial, self._leaves)
        suspects = (
            f"the hook on the gradient of {names[0]}, run with gradient_hooks="
            f"{self._trial.gradient_hooks!r}"
            if names
            else "hooks on gradients, and autograd functions that look at other rows"
        )
        return Reason(
            BACKWARD,
            "every encoder repeats itself and gives the same features over chunks, so the "
            f"difference arises in the backward or in the loss: something may look at the "
            f"gradient of all rows, and be given that of a chunk; look at {suspects}",
        )

    def _refuse_infinite_gradients(self) -> None:
        found = (self._leaves[k][0] for k, g in self._plain.gradients.items() if not _finite(g))
        # Ranks raise together: one that stopped alone would leave the others waiting.
        if names := list(filter(None, of_all_ranks(next(found, None)))):
            raise ValueError(
                f"{names[0]}: expected a finite gradient of the one-shot step, got NaN or "
                "infinity, which cannot be compared; look at the inputs and the weights, and "
                "lower the scale of a grad_scaler"
            )

    def _coarsest_dtype(self) -> torch.dtype:
        """The coarsest of features, trained tensors and autocast."""
        tensors = [*self._cached.features, *(leaf for _, leaf in self._leaves.values())]
        dtypes = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
        for device_type in {feature.device.type for feature in self._cached.features}:
            if torch.is_autocast_enabled(device_type):
                dtypes.add(torch.get_autocast_dtype(device_type))
        return max(dtypes, key=lambda dtype: RELATIVE_ROUNDING.get(dtype, 1.0))


def _severity(row: VerifyRow) -> tuple[int, float]:
    error = row.same_chunks_error if row.verdict in (DIFFERS, SAME_DRAWS) else row.error
    return (EXACT, SAME_DRAWS, ROUNDING, SAME_CHUNKS, DIFFERS).index(row.verdict), error


def _finite(gradient: Tensor | None) -> bool:
    return gradient is None or bool(gradient.isfinite().all())
