"""`GradCache`: check, cut, prepare, run, recover. B rows, D feature width."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from torch import nn

from gradcache_clip.cache.arguments import (
    checked_auxiliary_losses,
    checked_chunk_size,
    checked_division,
    checked_embed_chunk_size,
    checked_encoders,
    checked_get_features,
    checked_loss,
    checked_loss_key,
    checked_sorting,
    checked_strategy,
    names_checked,
    refuse_keywords,
)
from gradcache_clip.cache.auto_chunk import ChunkRecord, measured
from gradcache_clip.cache.checks import check_no_partial_gradients, one_of
from gradcache_clip.cache.gradient_hooks import MODES as HOOK_MODES
from gradcache_clip.cache.graph_budget import MemoryBudget, checked_budget
from gradcache_clip.cache.lengths import ByLength
from gradcache_clip.cache.packed import Division
from gradcache_clip.cache.prepare import prepare
from gradcache_clip.cache.recovery import StepSnapshot, is_out_of_memory
from gradcache_clip.cache.settings import CHECK_MODES, ChunkSize, GetFeatures, History, Settings
from gradcache_clip.cache.step import CachedStep
from gradcache_clip.cache.torch_state import warn_of_batch_norm
from gradcache_clip.distributed.strategies import LocalStrategy


class GradCache:
    """Forward and backward over a large batch with the memory of one chunk, exactly.

    `cache(*inputs)` (1) embeds every input chunk by chunk without graphs, (2) evaluates `loss` on
    the features of the whole batch and takes their gradients, (3) replays each chunk with its
    graph and sends the cached gradients into the parameters. `.grad` then equals that of
    `loss(*[encoder(x) for encoder, x in zip(encoders, inputs)]).backward()` up to rounding, with
    dropout and autocast as well. Source: Gao et al. 2021, "Scaling Deep Contrastive Learning
    Batch Size under Memory Limited Setup" (arXiv 2101.06983), section 3.

    Args:
        encoders: one module for each input (the same module may stand several times), or one
            module with `forward(tower, inputs)`, called with the index of the input. A mapping
            is passed to an encoder as keyword arguments, a tuple as positional ones, anything
            else as one argument. What every chunk needs whole is passed as `Shared(x)`.
        loss: called with the features of each input, (B, D) tensors or what `get_features`
            returns for all rows; returns a scalar tensor, an object whose `.loss` is one, or a
            dict of parts, which comes back detached.
        loss_key: which part, or attribute, is minimised.
        chunk_size: rows that go through an encoder at once, for all inputs or one for each; "auto"
            measures the first batch and doubles the size while that is faster and fits.
        chunk_record: JSON file in which "auto" remembers what it found, such as one in the run
            folder.
        get_features: extracts features from an encoder's output, for all or one for each.
            Without it a tensor or tuple of tensors is taken as it is, and of a mapping
            `image_embeds`, `text_embeds`, `audio_embeds`, `sentence_embedding`, `pooler_output` or
            `logits` of one row a sample; a dict with none of these reaches the loss as a dict,
            without its 0-dim tensors.
        auxiliary_losses: weights of losses that encoders return beside features, as 0-dim tensors
            in a dict, by name: `{"router": 0.01}`. A chunk's loss is weighted by its share of the
            rows of all ranks, so a mean over rows is exact. Any other (router balance, a mean over
            unpadded tokens) becomes the mean of the chunks' own losses, of which the first step
            warns; return its sums per row as features and let the loss add these up.
        memory_budget: memory for graphs that are kept from the embed, so that their chunks need no
            replay: bytes, a share of the device's memory as a float, or "auto" for most of what is
            free. With None the graph of one chunk is kept. With room for the whole batch a step
            costs what a plain one costs.
        rows: how inputs that are not cut along dimension 0 divide into rows, for all inputs or one
            for each: `PackedPatches()`, `PackedTokens()`, or a function that returns the input as
            `Ragged`. Jagged NestedTensors and batches of PyTorch Geometric need none.
        sort_by_length: `ByLength()` for inputs of unequal length, for all inputs or one for each.
        embed_chunk_size: rows that are embedded at once where no random numbers are drawn; a
            multiple of the chunk size in effect. The embed keeps no graph, so it has room for more.
        strategy: how the backward is taken; `LocalStrategy()` by default.
        check_replay: "error" raises `ReplayMismatchError` at the end of a step whose replay
            computed other features than its embed, "warn" warns, "off" does not look.
        on_out_of_memory: "halve" undoes the step, halves the chunk size and starts again, on one
            process; gradients of earlier steps are set aside meanwhile. "raise" does not.
        gradient_hooks: hooks on the gradients of parameters (`register_hook`,
            `register_post_accumulate_grad_hook`): "error" refuses them; "once" runs them on the
            finished gradient, on one process after the last replay that adds to it, so that an
            optimizer may step in a hook; "every_chunk" lets autograd run them on parts.
        check_rows: "error" raises in the first step where features of a row depend on the other
            rows of its chunk or on its padding, "warn" warns, "off" does not look. Every encoder
            embeds its first chunk twice more for this, once in other company.

    Raises:
        ValueError, TypeError: before any gradient is touched, for inputs that disagree, features
            that are not finite, encoders whose output is not understood.

    Example:
        >>> import torch
        >>> from gradcache_clip import ClipLoss, GradCache
        >>> image_encoder, text_encoder = torch.nn.Linear(8, 4), torch.nn.Linear(6, 4)
        >>> cache = GradCache((image_encoder, text_encoder), ClipLoss(), chunk_size=16)
        >>> out = cache(torch.randn(64, 8), torch.randn(64, 6))
        >>> image_encoder.weight.grad.shape
        torch.Size([4, 8])
    """

    @names_checked
    def __init__(
        self,
        encoders: nn.Module | Sequence[nn.Module],
        loss: Callable[..., Any],
        *,
        chunk_size: int | Sequence[int] | Literal["auto"] = 64,
        chunk_record: str | Path | None = None,
        memory_budget: MemoryBudget = None,
        rows: Division | Sequence[Division | None] | None = None,
        sort_by_length: ByLength | Sequence[ByLength | None] | None = None,
        embed_chunk_size: int | Sequence[int] | None = None,
        get_features: GetFeatures | Sequence[GetFeatures | None] | None = None,
        auxiliary_losses: Mapping[str, float] | None = None,
        loss_key: str = "loss",
        strategy: LocalStrategy | None = None,
        check_replay: Literal["error", "warn", "off"] = "error",
        on_out_of_memory: Literal["halve", "raise"] = "halve",
        gradient_hooks: Literal["error", "once", "every_chunk"] = "error",
        check_rows: Literal["error", "warn", "off"] = "error",
    ) -> None:
        chunks = chunk_size if chunk_size == "auto" else checked_chunk_size(chunk_size)
        self._settings = Settings(
            encoders=checked_encoders(encoders),
            loss=checked_loss(loss),
            chunk_size=chunks,
            chunk_record=None if chunk_record is None else Path(chunk_record),
            memory_budget=checked_budget(memory_budget),
            rows=checked_division(rows),
            sort_by_length=checked_sorting(sort_by_length, chunks),
            embed_chunk_size=checked_embed_chunk_size(embed_chunk_size, chunks, sort_by_length),
            get_features=checked_get_features(get_features),
            auxiliary_losses=checked_auxiliary_losses(auxiliary_losses),
            loss_key=checked_loss_key(loss_key),
            strategy=checked_strategy(strategy),
            check_replay=one_of("check_replay", check_replay, CHECK_MODES),
            on_out_of_memory=one_of("on_out_of_memory", on_out_of_memory, ("halve", "raise")),
            gradient_hooks=one_of("gradient_hooks", gradient_hooks, HOOK_MODES),
            check_rows=one_of("check_rows", check_rows, CHECK_MODES),
        )
        self._plan, self._history = self._settings, History()
        self._record = ChunkRecord(self._settings.chunk_record)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in Settings.__dataclass_fields__:
            raise AttributeError(
                f"{name}: expected settings of a GradCache to stay as they were given, got "
                f"{value!r}; make another one with {name}="
            )
        super().__setattr__(name, value)

    @property
    def settings(self) -> Settings:
        """The arguments, as they were given."""
        return self._settings

    @property
    def plan(self) -> Settings:
        """The settings in use, after "auto" has measured or memory has run out."""
        return self._plan

    @property
    def encoders(self) -> nn.Module | tuple[nn.Module, ...]:
        return self._settings.encoders

    @property
    def loss(self) -> Callable[..., Any]:
        return self._settings.loss

    @property
    def strategy(self) -> LocalStrategy:
        """The strategy in use, `plan.strategy`."""
        return self._plan.strategy

    @property
    def chunk_size(self) -> ChunkSize:
        """The size in use: as it was given, found by "auto", or halved; `plan.chunk_size`."""
        return self._plan.chunk_size

    def __call__(
        self, *inputs: Any, loss_kwargs: Mapping[str, Any] | None = None, **unknown: NoReturn
    ) -> Any:
        """Take forward and backward of one step; add to `.grad` of encoders and loss.

        Args:
            inputs: one batch for each encoder, nested as the encoder wants it.
            loss_kwargs: further arguments of the loss, such as labels for the whole batch.

        Returns:
            What the loss returned, detached; a bare tensor comes back as an object with `.loss`.
            With `auxiliary_losses` an `AuxiliaryOutput(loss, output, auxiliary)`, whose `.loss` is
            their sum.
        """
        refuse_keywords(unknown)
        if not torch.is_grad_enabled():
            raise RuntimeError(
                "GradCache: expected gradients to be enabled, got a call inside torch.no_grad(); "
                "call it outside, or run the encoders alone to evaluate"
            )
        output, mismatches = self._run(inputs, loss_kwargs or {})
        if mismatches:
            warnings.warn(mismatches, stacklevel=2)
        return output

    def prepare(self, inputs: Sequence[Any]) -> CachedStep:
        """Check a batch and cut it into chunks; for `deferred_step` as well."""
        if self._plan.chunk_size == "auto":
            self._plan = measured(self._plan, inputs, self._record)
        step, history = prepare(self._plan, inputs, self._history), self._history
        if history.broken_off:
            check_no_partial_gradients(step.modules, step.strategy)
            history.broken_off = False
        if not history.warned_of_batch_norm:
            modules = chain.from_iterable(tower.modules for tower in step.towers)
            history.warned_of_batch_norm = warn_of_batch_norm(modules)
        return step

    def use_strategy(self, strategy: LocalStrategy) -> None:
        """Take further steps under another strategy; `settings` keeps the one that was given."""
        self._plan = replace(self._plan, strategy=checked_strategy(strategy))

    def with_get_features(self, get_features: GetFeatures | Sequence[GetFeatures]) -> GradCache:
        """Return a cache for steps with another `get_features`; what was checked stays so.

        Chunk sizes that one of them measures or halves from then on are its own.
        """
        other = copy(self)
        other._plan = replace(self._plan, get_features=checked_get_features(get_features))
        return other

    def _run(self, inputs: Sequence[Any], loss_kwargs: Mapping[str, Any]) -> tuple[Any, str]:
        """Run a step, and run it again with smaller chunks for as long as memory runs out."""
        step = self.prepare(inputs)
        if self._settings.on_out_of_memory == "raise" or not step.strategy.recovers:
            return step.run(loss_kwargs)
        snapshot, tried = StepSnapshot(step.modules, step.towers), list[int]()
        with snapshot.finished():
            while True:
                try:
                    return step.run(loss_kwargs, snapshot)
                except Exception as error:
                    if not is_out_of_memory(error):
                        raise
                    phase, reason = step.phase, str(error)
                # Outside of the handler, whose traceback holds on to tensors of the step.
                tried.append(max(len(chunk) for tower in step.towers for chunk in tower.chunks))
                # Graphs that were kept must not live on while the next step is prepared.
                del step
                snapshot.undo(phase, reason, tried)
                self._halve(phase, tried[-1])
                step = self.prepare(inputs)

    def _halve(self, phase: str, rows: int) -> None:
        self._plan = self._plan.halved(rows)
        warnings.warn(
            f"GradCache: out of memory in the {phase} with chunks of {rows} rows; the step "
            f"starts again, from now on with chunk_size={self._plan.chunk_size}",
            stacklevel=4,
        )
