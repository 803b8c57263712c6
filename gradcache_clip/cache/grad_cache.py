"""Gradient caching as a person calls it. B rows, D feature width."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from torch import nn

from gradcache_clip.cache.arguments import (
    checked_chunk_size,
    checked_embed_chunk_size,
    checked_encoders,
    checked_get_features,
    checked_loss,
    checked_sorting,
    checked_strategy,
    names_checked,
    refuse_keywords,
)
from gradcache_clip.cache.auto_chunk import ChunkRecord, settled_chunk_sizes
from gradcache_clip.cache.checks import (
    check_inputs,
    check_no_partial_gradients,
    check_plain_backward,
    check_strategy,
    module_for_each,
    one_for_each,
    one_of,
)
from gradcache_clip.cache.chunks import Chunk
from gradcache_clip.cache.cutting import cut_all
from gradcache_clip.cache.gradient_hooks import MODES as HOOK_MODES
from gradcache_clip.cache.gradient_hooks import held_hooks, without_hooks
from gradcache_clip.cache.graph_budget import GraphBudget, MemoryBudget, checked_budget
from gradcache_clip.cache.lengths import ByLength
from gradcache_clip.cache.recovery import StepSnapshot, halved, is_out_of_memory
from gradcache_clip.cache.replay_check import failures_of
from gradcache_clip.cache.step import CachedStep
from gradcache_clip.cache.torch_state import refuse_cached_parametrizations, warn_of_batch_norm
from gradcache_clip.cache.tower import Encode, Tower, device_of, surely_trainable
from gradcache_clip.cache.trunk import call_encoder, frozen_trunk_of
from gradcache_clip.distributed.strategies import LocalStrategy

GetFeatures = Callable[[Any], Any]


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
            returns for all rows; returns a scalar tensor or an object whose `.loss` is one.
        chunk_size: rows that go through an encoder at once, for all inputs or one for each; "auto"
            measures the first batch and doubles the size while that is faster and fits.
        chunk_record: JSON file in which "auto" remembers what it found, such as one in the run
            folder.
        get_features: extracts features from an encoder's output, for all or one for each.
            Without it a tensor or tuple of tensors is taken as it is, and of a transformers
            output `image_embeds`, `text_embeds`, `sentence_embedding` or `pooler_output`.
        memory_budget: memory for graphs that are kept from the embed, so that their chunks need no
            replay: bytes, a share of the device's memory as a float, or "auto" for most of what is
            free. With None the graph of one chunk is kept. With room for the whole batch a step
            costs what a plain one costs.
        sort_by_length: `ByLength()` for inputs of unequal length, for all inputs or one for each.
        embed_chunk_size: rows that are embedded at once where no random numbers are drawn; a
            multiple of the chunk size in effect. The embed keeps no graph, so it has room for more.
        strategy: how the backward is taken; `LocalStrategy()` by default.
        replay_check: "error" raises `ReplayMismatchError` at the end of a step whose replay
            computed other features than its embed, "warn" warns, "off" does not look.
        on_out_of_memory: "halve" undoes the step, halves the chunk size and starts again, on one
            process; gradients of earlier steps are set aside meanwhile. "raise" does not.
        gradient_hooks: hooks on the gradients of parameters (`register_hook`,
            `register_post_accumulate_grad_hook`): "error" refuses them; "once" runs them on the
            finished gradient, on one process after the last replay that adds to it, so that an
            optimizer may step in a hook; "every_chunk" lets autograd run them on parts.
        check_rows: compare, in the first step, the first chunk of every encoder with its two
            halves, and raise where rows of a chunk depend on each other. Costs two more forwards
            of that chunk, once.

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
        sort_by_length: ByLength | Sequence[ByLength | None] | None = None,
        embed_chunk_size: int | Sequence[int] | None = None,
        get_features: GetFeatures | Sequence[GetFeatures | None] | None = None,
        strategy: LocalStrategy | None = None,
        replay_check: Literal["error", "warn", "off"] = "error",
        on_out_of_memory: Literal["halve", "raise"] = "halve",
        gradient_hooks: Literal["error", "once", "every_chunk"] = "error",
        check_rows: bool = True,
    ) -> None:
        self.encoders = checked_encoders(encoders)
        self.loss = checked_loss(loss)
        self.chunk_size = chunk_size if chunk_size == "auto" else checked_chunk_size(chunk_size)
        self.memory_budget = checked_budget(memory_budget)
        self.sort_by_length = checked_sorting(sort_by_length)
        self.embed_chunk_size = checked_embed_chunk_size(
            embed_chunk_size, self.chunk_size, sort_by_length
        )
        self.get_features = checked_get_features(get_features)
        self.strategy = checked_strategy(strategy)
        self.replay_check = one_of("replay_check", replay_check, ("error", "warn", "off"))
        self.on_out_of_memory = one_of("on_out_of_memory", on_out_of_memory, ("halve", "raise"))
        self.gradient_hooks = one_of("gradient_hooks", gradient_hooks, HOOK_MODES)
        self.check_rows = check_rows
        self._record = ChunkRecord(None if chunk_record is None else Path(chunk_record))
        self._warned_of_batch_norm = self._broken_off = False
        self._stepped = self._rows_checked = False

    def __call__(
        self, *inputs: Any, loss_kwargs: Mapping[str, Any] | None = None, **unknown: NoReturn
    ) -> Any:
        """One step's forward and backward; adds to `.grad` of encoders and loss.

        Args:
            inputs: one batch for each encoder, nested as the encoder wants it.
            loss_kwargs: further arguments of the loss, such as labels for the whole batch.

        Returns:
            What the loss returned, detached; a bare tensor comes back as an object with `.loss`.
        """
        refuse_keywords(unknown)
        if not torch.is_grad_enabled():
            raise RuntimeError(
                "GradCache: expected gradients to be enabled, got a call inside torch.no_grad(); "
                "call it outside, or run the encoders alone to evaluate"
            )
        towers = self._checked_towers(inputs)
        if self.on_out_of_memory == "raise" or not self.strategy.recovers:
            output, failures = self._step(towers, loss_kwargs or {})
        else:
            output, failures = self._step_that_fits(towers, inputs, loss_kwargs or {})
        if failures:
            warnings.warn(failures, stacklevel=2)
        return output

    def _checked_towers(self, inputs: tuple[Any, ...]) -> list[Tower]:
        """The towers of a step, which may begin."""
        refuse_cached_parametrizations()
        self._settle_chunk_size(inputs)
        towers = self._towers(inputs)
        check_inputs(towers)
        check_strategy(self.strategy, towers)
        if self._broken_off:
            check_no_partial_gradients(self._modules_with_gradients(towers), self.strategy)
            self._broken_off = False
        if not self._warned_of_batch_norm:
            modules = [module for tower in towers for module in tower.modules]
            self._warned_of_batch_norm = warn_of_batch_norm(modules)
        return towers

    def _step_that_fits(
        self, towers: list[Tower], inputs: tuple[Any, ...], loss_kwargs: Mapping[str, Any]
    ) -> tuple[Any, str]:
        """A step that starts again with smaller chunks for as long as memory runs out."""
        snapshot, tried = StepSnapshot(self._modules_with_gradients(towers), towers), []
        try:
            while True:
                try:
                    return self._step(towers, loss_kwargs, snapshot)
                except Exception as error:
                    if not is_out_of_memory(error):
                        raise
                    phase, reason = snapshot.phase, str(error)
                # Outside of the handler, whose traceback holds on to tensors of the step.
                tried.append(max(len(chunk) for tower in towers for chunk in tower.chunks))
                # In place: the caller holds this very list, and kept graphs must not live on in it.
                towers.clear()
                snapshot.undo(phase, reason, tried)
                self._halve(phase, tried)
                towers.extend(self._towers(inputs))
        except BaseException:
            snapshot.drop()
            raise
        finally:
            snapshot.finish()

    def _step(
        self,
        towers: list[Tower],
        loss_kwargs: Mapping[str, Any],
        snapshot: StepSnapshot | None = None,
    ) -> tuple[Any, str]:
        step = self._new_step(towers, snapshot)
        agree = self.strategy.smallest if self.strategy.collective_forward else None
        budget = GraphBudget(self.memory_budget, device_of(towers), agree)
        try:
            output, check = step.run(budget, loss_kwargs)
            failures = failures_of(check, self.replay_check, self.strategy)
        except BaseException:
            # A snapshot takes back what was added, and there is nothing before the loss.
            undone = snapshot is not None and snapshot.changed is None
            self._broken_off = not undone and step.phase != "embed"
            raise
        self._took(step)
        return output, failures

    def _took(self, step: CachedStep) -> None:
        """Looks that a step had cost are not taken again."""
        self._stepped, self._rows_checked = True, self._rows_checked or step.rows_checked

    def _new_step(self, towers: list[Tower], snapshot: StepSnapshot | None = None) -> CachedStep:
        """A step that is checked as far as this cache asks for it."""
        return CachedStep(
            towers,
            self.loss,
            self.strategy,
            snapshot,
            self.replay_check != "off",
            held_hooks(self.gradient_hooks, towers, self.strategy, snapshot),
            first=not self._stepped,
            check_rows=self.check_rows and not self._rows_checked,
        )

    def _halve(self, phase: str, tried: list[int]) -> None:
        """Smaller chunks, and less memory for graphs, from here on."""
        assert self.chunk_size != "auto"
        self.chunk_size = halved(self.chunk_size, lambda size: max(1, min(size, tried[-1]) // 2))
        self.embed_chunk_size = None
        self.sort_by_length = halved(self.sort_by_length, ByLength.halved)
        if isinstance(self.memory_budget, (int, float)):
            self.memory_budget = type(self.memory_budget)(self.memory_budget / 2)
        warnings.warn(
            f"GradCache: out of memory in the {phase} with chunks of {tried[-1]} rows; the step "
            f"starts again, from now on with chunk_size={self.chunk_size}",
            stacklevel=4,
        )

    def _modules_with_gradients(self, towers: list[Tower]) -> list[nn.Module]:
        extractors = one_for_each(self.get_features, len(towers), "get_features")
        candidates = [*(tower.module for tower in towers), *extractors, self.loss]
        return [module for module in candidates if isinstance(module, nn.Module)]

    def _towers(self, inputs: tuple[Any, ...], chunk_size: Any = None) -> list[Tower]:
        modules = module_for_each(self.encoders, len(inputs))
        extractors = one_for_each(self.get_features, len(inputs), "get_features")
        embed_sizes = one_for_each(self.embed_chunk_size, len(inputs), "embed_chunk_size")
        cut, towers = self._cut(inputs, chunk_size or self.chunk_size), []
        for index, (module, given) in enumerate(zip(modules, inputs, strict=True)):
            one_for_all = isinstance(self.encoders, nn.Module)
            encode: Encode = partial(_call_tower, index) if one_for_all else call_encoder
            unwrapped = self.strategy.unwrap(module)
            # A trunk cannot be called by itself where a forward gathers the parameters.
            own = index if one_for_all and not self.strategy.collective_forward else None
            towers.append(
                Tower(
                    name=f"encoder {index} ({type(unwrapped).__name__})",
                    module=module,
                    bare_module=unwrapped,
                    encode=encode,
                    get_features=extractors[index],
                    inputs=given,
                    chunks=cut[index],
                    # One module for all inputs may be frozen for this one; only its graph tells.
                    trainable=True if not one_for_all and surely_trainable(module, given) else None,
                    embed_chunk_size=embed_sizes[index],
                    trunk=frozen_trunk_of(unwrapped, own),
                )
            )
        return towers

    def _settle_chunk_size(self, inputs: tuple[Any, ...]) -> None:
        """Turn "auto" into sizes, on the first batch."""
        if self.chunk_size != "auto":
            return
        check_plain_backward(self.strategy, "chunk_size='auto'", "pass a number")
        towers = self._towers(inputs, chunk_size=1)
        check_inputs(towers)
        modules = self._modules_with_gradients(towers)
        with without_hooks(towers):
            self.chunk_size = settled_chunk_sizes(towers, modules, self._record, self.strategy)

    def _cut(self, inputs: tuple[Any, ...], chunk_size: Any) -> list[list[Chunk]]:
        """The chunks of every input."""
        sizes = one_for_each(chunk_size, len(inputs), "chunk_size")
        sorting = one_for_each(self.sort_by_length, len(inputs), "sort_by_length")
        return cut_all(inputs, sizes, sorting, two_at_least=self.strategy.joint_first_and_last)


def _call_tower(index: int, module: nn.Module, inputs: Any) -> Any:
    return module(index, inputs)
