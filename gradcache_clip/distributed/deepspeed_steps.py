"""Steps, weights and state of a DeepSpeed engine, and of what is trained outside of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradcache_clip.distributed.deepspeed_engine import engine_state, load_engine_state
from gradcache_clip.distributed.many_ranks import ManyRanks
from gradcache_clip.distributed.state import (
    check_optimizer,
    checked_weights,
    load_state_by_name,
    state_by_name,
    trained_by_name,
    trained_parameters,
)
from gradcache_clip.distributed.wrappers import innermost
from gradcache_clip.distributed.zero_state import (
    holds_parts,
    load_moments,
    load_weight,
    moments_by_name,
    whole_weight,
)


class DeepSpeedSteps(ManyRanks):
    """The half of `DeepSpeedStrategy` that comes after the gradients.

    Args:
        engine: what `deepspeed.initialize` returned.
    """

    def __init__(self, engine: Any) -> None:
        super().__init__()
        self.engine = engine

    def clip(self, modules: Sequence[nn.Module], max_norm: float) -> Tensor:
        """Refused: the engine clips while it steps.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "clip: expected step() under DeepSpeedStrategy, whose engine clips while it steps, got "
            "clip(); set gradient_clipping in the DeepSpeed configuration"
        )

    def step(
        self, optimizer: Optimizer | None, modules: Sequence[nn.Module], max_norm: float = 0.0
    ) -> Tensor:
        """Step the engine, which clips, and the optimizer of what is trained outside of it.

        DeepSpeed clips by the norm of the engine's gradients. Those outside, such as of the logit
        scale, are multiplied by the same factor.

        Args:
            optimizer: over the trainable parameters of `modules` that are not in the engine; None
                where there are none.
            modules: the engine, and all else that is trained.
            max_norm: as `gradient_clipping` in the configuration of the engine; 0 for no clipping.

        Returns:
            The global norm before clipping, also over what is outside of the engine.

        Raises:
            ValueError: another `max_norm` than the engine clips to, or an optimizer over other
                parameters.
        """
        self._check_optimizer(optimizer, modules)
        clipping = float(self.engine.gradient_clipping())
        if max_norm != clipping:
            raise ValueError(
                f"max_norm: expected {clipping}, the gradient_clipping of the DeepSpeed "
                f"configuration (1.0 where it is left out), got {max_norm}; make them equal"
            )
        outside = [p.grad for p in self._outside(modules) if p.grad is not None]
        norm_outside = nn.utils.get_total_norm(outside)
        norm = self._step_engine()
        # In fp16 a step whose gradients overflow is left out.
        if optimizer is not None and self.engine.was_step_applied():
            if max_norm > 0:
                factor = (max_norm / (norm + 1e-6)).nan_to_num(1.0).clamp(max=1.0)
                for gradient in outside:
                    gradient.mul_(factor)
            optimizer.step()
        return torch.hypot(norm, norm_outside)

    def _step_engine(self) -> Tensor:
        """The norm of its gradients, which DeepSpeed clips by."""
        # Under ZeRO-0 the engine knows a norm only where it clips.
        plain = None if holds_parts(self.engine) else super().clip([self.engine], 0.0)
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        known = next((each for each in (norm, plain) if each is not None), float("nan"))
        return torch.as_tensor(known, dtype=torch.float32, device=self.engine.device)

    def set_learning_rate(self, optimizer: Optimizer | None, rate: float) -> None:
        """Set the rate for the next step, unless the configuration of the engine has a scheduler,
        which `optimizer` then follows."""
        if self.engine.lr_scheduler is not None:
            rate = self.engine.optimizer.param_groups[0]["lr"]
        else:
            super().set_learning_rate(self.engine.optimizer, rate)
        if optimizer is not None:
            super().set_learning_rate(optimizer, rate)

    def load_weights(self, module: nn.Module, weights: Mapping[str, Any]) -> None:
        for weight, value in checked_weights(innermost(module), weights).values():
            load_weight(self.engine, value, weight)

    def state(self, optimizer: Optimizer | None, modules: Sequence[nn.Module]) -> dict[str, Any]:
        """As `LocalStrategy.state`; "deepspeed" holds scheduler and loss scale of the engine."""
        inside, outside = self._by_name(optimizer, modules)
        moments = moments_by_name(self.engine, inside)
        if optimizer is not None:
            moments |= state_by_name(optimizer, outside, lambda value: value)
        return {"optimizer": moments, "scaler": {}, "deepspeed": engine_state(self.engine)}

    def load_state(
        self, optimizer: Optimizer | None, modules: Sequence[nn.Module], state: Mapping[str, Any]
    ) -> None:
        inside, outside = self._by_name(optimizer, modules)
        if optimizer is not None:
            load_state_by_name(optimizer, outside, state["optimizer"], lambda value, _: value)
        load_moments(self.engine, inside, state["optimizer"])
        load_engine_state(self.engine, state.get("deepspeed", {}))

    def _whole(self, value: Any) -> Any:
        return whole_weight(self.engine, value) if isinstance(value, Tensor) else value

    def _outside(self, modules: Sequence[nn.Module]) -> list[nn.Parameter]:
        """What is trained, but not by the engine."""
        inside = {id(parameter) for parameter in self.engine.parameters()}
        return [p for p in trained_parameters(modules) if id(p) not in inside]

    def _check_optimizer(self, optimizer: Optimizer | None, modules: Sequence[nn.Module]) -> None:
        outside = self._outside(modules)
        if optimizer is not None:
            check_optimizer(optimizer, outside)
        elif outside:
            raise ValueError(
                f"optimizer: expected one over the {len(outside)} trainable parameters outside of "
                "the engine, got None; pass one, or make them parameters of the engine's module"
            )

    def _by_name(
        self, optimizer: Optimizer | None, modules: Sequence[nn.Module]
    ) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
        """Parameters in the engine, and those outside of it."""
        self._check_optimizer(optimizer, modules)
        outside = {id(parameter) for parameter in self._outside(modules)}
        named = trained_by_name([self.engine, *modules])
        inside = {name: p for name, p in named.items() if id(p) not in outside}
        return inside, {name: p for name, p in named.items() if id(p) in outside}
