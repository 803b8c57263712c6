"""Encoders in one DeepSpeed engine, with ZeRO 0, 1, 2 or 3."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gradcache_clip.distributed.collectives import world_size
from gradcache_clip.distributed.deepspeed_engine import (
    check_settings,
    check_version,
    loss_scale,
    one_prologue,
)
from gradcache_clip.distributed.deepspeed_steps import DeepSpeedSteps
from gradcache_clip.distributed.graph import leaves_behind
from gradcache_clip.distributed.same_backward import same_backward
from gradcache_clip.distributed.same_forward import ForwardLog
from gradcache_clip.distributed.unreached import reach
from gradcache_clip.distributed.wrappers import DEEPSPEED, is_kind, refuse_heads, refuse_wrappers


class DeepSpeedStrategy(DeepSpeedSteps):
    """One DeepSpeed engine that embeds every input; step it after every cached step.

    `engine.step()` does, or `step` of this, which also steps what is trained outside of the engine.

    The module of the engine has `forward(tower, inputs)` and the engine is the one encoder of
    `GradCache`, or it embeds two inputs alike and stands for both. Replays go through
    `engine.backward`, which scales and unscales as its configuration says; only the last of a step
    is a gradient accumulation boundary. ZeRO 2 and 3 still reduce in every backward, as they must
    to partition gradients; ZeRO 0 and 1 reduce once a step.

    A parameter of the loss may live outside, such as in `ClipLoss()`: its `.grad` is complete,
    unscaled, on every rank, and its own optimizer steps it (in fp16, if
    `engine.was_step_applied()`). Or it is a parameter of the engine's module that the loss reads,
    of shape (1,), for DeepSpeed takes none without a dimension: its gradient then takes the way of
    all others. Under ZeRO-3 the loss must read it inside of
    `deepspeed.zero.GatheredParameters([parameter])`.

    The loss must be that of the global batch on every rank, as for `DDPStrategy`. With ZeRO 2 and 3
    all ranks must cut their rows into as many chunks, and `chunk_size="auto"` is refused.

    Args:
        engine: what `deepspeed.initialize` returned, with `gradient_accumulation_steps` 1 in its
            configuration, and `gradient_clipping` set: DeepSpeed clips to a norm of 1.0 otherwise.

    Raises:
        TypeError: not a DeepSpeed engine.
        ImportError: DeepSpeed before 0.19.4, some releases of which give wrong gradients in
            silence: ZeRO-2 with an offloaded optimizer, ZeRO-1 and 2 with bf16.

    Example:
        model = TwoTowers(image_encoder, text_encoder)  # forward(tower, inputs)
        engine, *_ = deepspeed.initialize(model=model, config=config)
        cache = GradCache(engine, ClipLoss(), strategy=DeepSpeedStrategy(engine))
        out = cache(images, texts)
        engine.step()
    """

    joint_first_and_last = True
    kept_graphs_first = False
    plain_backward = False
    fills_grad = False

    def __init__(self, engine: Any) -> None:
        if not is_kind(engine, DEEPSPEED):
            raise TypeError(
                "engine: expected the engine that deepspeed.initialize returns, got "
                f"{type(engine).__name__}; write engine, *_ = deepspeed.initialize(model=model, "
                "config=config)"
            )
        check_version()
        super().__init__(engine)
        # ZeRO-3 gathers parameters in every forward, ZeRO-2 reduces in every backward.
        self._stage = engine.zero_optimization_stage()
        self.collective_forward = self._stage >= 2
        self._log = ForwardLog(
            "run them on every rank, or take ZeRO 0 or 1, DDPStrategy or AllReduceStrategy",
            gathers=self._stage == 3,
        )
        self._held: Tensor | None = None
        self._began_at: int | None = None
        self._broken_off = False
        self._first, self._scale = True, 1.0

    def check(self, modules: Sequence[nn.Module], heads: Sequence[nn.Module] = ()) -> None:
        """Refuse encoders beside the engine, and settings that another way of stepping needs.

        Raises:
            ValueError: a trainable encoder is not the engine, or `get_features` has parameters;
                `gradient_accumulation_steps` is not 1 or the engine leaves reducing to the caller;
                it averages over a part of the ranks, scales nothing where it unscales, or still
                holds the gradients of an earlier cached step.
        """
        others = [module for module in modules if module is not self.engine]
        refuse_wrappers(others, self)
        refuse_heads(heads, self)
        for index, module in enumerate(modules):
            trained = any(parameter.requires_grad for parameter in module.parameters())
            if module is not self.engine and trained:
                raise ValueError(
                    f"encoder {index}: expected the engine of this strategy, got "
                    f"{type(module).__name__}, which DeepSpeed would not train; put all encoders "
                    "into one module with forward(tower, inputs) and initialize that"
                )
        check_settings(self.engine)
        if self._broken_off:
            raise ValueError(
                "engine: expected an engine that holds no gradients, got one in which a step was "
                "broken off after its first backward; load a checkpoint into a new engine from "
                "deepspeed.initialize, because DeepSpeed cannot drop what it has added up"
            )
        if self._began_at == self.engine.micro_steps:
            raise ValueError(
                "engine: expected engine.step() after the last cached step, got none, and the "
                "engine still holds its gradients; call engine.step() after every cached step"
            )

    def gradient_factor(self) -> float:
        """None; `backward` multiplies, in 32 bits, what in fp16 is scaled until then."""
        return 1.0

    @contextmanager
    def step_context(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        self._held, self._first, self._scale = None, True, loss_scale(self.engine)
        with self._noting_breaks(), ExitStack() as stack:
            if self.collective_forward:
                root = self.engine.module
                parts = {name or "the engine": part for name, part in root.named_modules()}
                # ZeRO-3 keeps a list of all modules that run, prefetches by it, and compares ranks.
                if self._stage < 3:
                    parts = {n: p for n, p in parts.items() if p is root or _owns_parameters(p)}
                stack.enter_context(self._log.watching(parts))
                stack.enter_context(same_backward([root], [*parts.values()], _trained))
            yield
            if self._first and self._stage < 3:
                # No rank had anything to replay, and the optimizer wants gradients all the same.
                self.engine.set_gradient_accumulation_boundary(True)
                self.backward([], [])

    @contextmanager
    def _noting_breaks(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._broken_off = not self._first
            raise

    def meet(self) -> None:
        self._log.meet()

    def embedded(self) -> None:
        if self.collective_forward:
            self._log.end()

    def backward_of_loss(self, loss: Tensor, features: Sequence[Tensor]) -> None:
        """Gradients of features come out scaled as the engine scales; those of the loss do not.

        Parameters of the engine that the loss reads get theirs in the first replay.
        """
        scale, mine = self._scale, {id(p) for p in self.engine.parameters()}
        scaled, held = {id(feature) for feature in features}, []
        leaves = list({id(leaf): leaf for leaf in leaves_behind([loss])}.values())
        gradients = torch.autograd.grad(loss * scale, leaves, allow_unused=True)
        for leaf, gradient in zip(leaves, gradients, strict=True):
            if gradient is None or id(leaf) in scaled:
                leaf.grad = gradient if id(leaf) in scaled else leaf.grad
            elif id(leaf) in mine:
                held.append((leaf, gradient / scale))
            else:
                gradient = gradient / scale
                leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient
        if held:
            self._held = _times(held)

    @contextmanager
    def replay_context(
        self, modules: Sequence[nn.Module], finished: AbstractSet[nn.Module]
    ) -> Iterator[None]:
        self.engine.set_gradient_accumulation_boundary(self.engine in finished)
        yield

    def backward(self, features: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """`engine.backward` of the sum of features times their gradients, in 32 bits."""
        first, self._first = self._first, False
        if first:
            self._began_at = self.engine.micro_steps
        factor = world_size() / self._scale
        products = [
            (_wide(feature) * _wide(gradient)).sum()
            for feature, gradient in zip(features, gradients, strict=True)
        ]
        last = self.engine.is_gradient_accumulation_boundary()
        if not products or (self._stage < 2 and last):
            # ZeRO-1 reduces what has a gradient on this rank, which must be the same on all.
            trained = _trained(self.engine, recurse=True)
            products.append(_wide(reach(trained, with_zeros=self._stage > 0)))
        surrogate = sum(products) * factor
        if self._held is not None:
            surrogate, self._held = surrogate + self._held, None
        if hasattr(self.engine.optimizer, "clear_backward_seen_flag"):
            # As a forward does, which a kept graph has long had: ZeRO-3 counts backwards by it.
            self.engine.optimizer.clear_backward_seen_flag()
        if first and self._stage == 3:
            # The first backward overwrites only what it reaches; the rest is of the last step.
            self.engine.optimizer.grad_partitions_flat_buffer.zero_()
        with one_prologue(self.engine):
            self.engine.backward(surrogate, scale_wrt_gas=False)


def _owns_parameters(part: nn.Module) -> bool:
    return next(part.parameters(recurse=False), None) is not None


def _trained(part: nn.Module, *, recurse: bool = False) -> list[nn.Parameter]:
    return [p for p in part.parameters(recurse=recurse) if p.requires_grad]


def _times(held: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Parameters times their gradients, summed: what has these gradients.

    A graph from before the replay comes after it in the backward: by then the engine has prepared,
    which with bf16 drops what is there already.
    """
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter for parameter, _ in held]):
        return torch.stack([(_wide(p) * _wide(gradient)).sum() for p, gradient in held]).sum()


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
