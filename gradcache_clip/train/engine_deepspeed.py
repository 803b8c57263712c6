"""The encoder in a DeepSpeed engine: ZeRO 0 to 3, with the optimizer of its configuration or ours.

The loss's scale stays outside, in 32 bits on every process, with an optimizer of its own: its
gradient is complete everywhere.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gradcache_clip.distributed import DeepSpeedStrategy
from gradcache_clip.train.config import Config, ConfigError
from gradcache_clip.train.deepspeed_config import deepspeed_settings, zero_stage
from gradcache_clip.train.engine import Engine
from gradcache_clip.train.optimizer import (
    apply_learning_rate,
    build_optimizer,
    clip_grad_norm,
    parameter_groups,
)
from gradcache_clip.train.optimizer_state import load_state_by_name, state_by_name
from gradcache_clip.train.peers import Peers, first_keeps


class DeepSpeedTraining(Engine):
    """`deepspeed.initialize` over the encoder, and what a run needs of it.

    Args:
        encoder, loss: on the device of this process, with the same weights on all.
        config: of the run; `distributed.deepspeed_config` may name a file.
        peers: the processes.

    Raises:
        ConfigError: the file contradicts the run, or a moving average under ZeRO-3.
    """

    def __init__(self, encoder: nn.Module, loss: nn.Module, config: Config, peers: Peers) -> None:
        settings = deepspeed_settings(config, peers.world_size)
        _check(config, settings)
        self.engine = _initialize(encoder, config, settings)
        super().__init__(encoder, loss, config, self.engine, DeepSpeedStrategy(self.engine))
        # The engine scales by itself.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=False)
        self.strategy.grad_scaler = None
        self._has_own_schedule = "scheduler" in settings

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = self.engine.optimizer.param_groups
        return groups

    def autocast(self) -> AbstractContextManager[Any]:
        """The engine keeps weights in the precision of its configuration."""
        return nullcontext()

    def set_learning_rate(self, rate: float) -> None:
        """Unless the configuration has a scheduler, which the scale then follows."""
        if not self._has_own_schedule:
            apply_learning_rate(self.engine.optimizer, rate)
        apply_learning_rate(self.optimizer, self.param_groups[0]["lr"])

    def finish_step(self) -> Tensor:
        """Gradients, clipped, into the weights; their global norm before."""
        scale_norm = clip_grad_norm(self.loss.parameters(), 0.0)
        norm = self._step_encoder()
        # In fp16 a step whose gradients overflow is left out.
        if self.engine.was_step_applied():
            self._clip_scale(norm)
            self.optimizer.step()
        return torch.hypot(norm, scale_norm)

    def _step_encoder(self) -> Tensor:
        """The norm of its gradients, which DeepSpeed clips by."""
        # Under ZeRO-0 the engine knows a norm only where it clips.
        plain = None if self._holds_parts else clip_grad_norm((p for _, p in self._trained), 0.0)
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        known = next((each for each in (norm, plain) if each is not None), float("nan"))
        return torch.as_tensor(known, dtype=torch.float32, device=self.device)

    def _clip_scale(self, norm: Tensor) -> None:
        """By the factor that the engine has clipped the encoder's gradients by."""
        most = self.engine.gradient_clipping()
        if most > 0:
            factor = (most / (norm + 1e-6)).nan_to_num(1.0).clamp(max=1.0)
            for parameter in self.loss.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)

    def weights(self) -> dict[str, Tensor]:
        state = self.encoder.state_dict(keep_vars=True)
        whole = {id(value): self._whole(value) for value in state.values()}
        return {name: whole[id(value)] for name, value in state.items()}

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        for name, value in self.encoder.state_dict(keep_vars=True).items():
            weight = weights[name].to(self.device)
            with _gathered([value] if hasattr(value, "ds_id") else []):
                value.copy_(weight)
            if _is_trained(value) and self._holds_parts:
                _set_part(value, weight.float())

    def state(self) -> dict[str, Any]:
        scale = state_by_name(self.optimizer, self.loss.named_parameters())
        return {
            "optimizer": {**self._moments(), **scale},
            "scaler": self.scaler.state_dict(),
            "deepspeed": self._schedule(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        load_state_by_name(self.optimizer, self.loss.named_parameters(), state["optimizer"])
        self._load_moments(state["optimizer"])
        saved = state.get("deepspeed", {})
        if "scheduler" in saved and self._has_own_schedule:
            self.engine.lr_scheduler.load_state_dict(saved["scheduler"])
        if "loss_scale" in saved and self.engine.fp16_enabled():
            self.engine.optimizer.loss_scaler.cur_scale = saved["loss_scale"]

    def _optimizer(self) -> torch.optim.Optimizer:
        """Of the loss's scale; the engine has that of the encoder."""
        return build_optimizer(self.config.optimizer, self.loss)

    def _schedule(self) -> dict[str, Any]:
        saved: dict[str, Any] = {}
        if self._has_own_schedule:
            saved["scheduler"] = self.engine.lr_scheduler.state_dict()
        if self.engine.fp16_enabled():
            saved["loss_scale"] = float(self.engine.optimizer.loss_scale)
        return saved

    @property
    def _base(self) -> torch.optim.Optimizer:
        """The optimizer that DeepSpeed's own, if it has one, wraps."""
        inner: torch.optim.Optimizer = getattr(
            self.engine.optimizer, "optimizer", self.engine.optimizer
        )
        return inner

    @property
    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.encoder.named_parameters() if p.requires_grad]

    @property
    def _holds_parts(self) -> bool:
        """Whether DeepSpeed keeps flat 32-bit copies, and their moments, apart from parameters."""
        return any(hasattr(p, "ds_id") or hasattr(p, "_hp_mapping") for _, p in self._trained)

    @property
    def _flat_copies(self) -> list[Tensor]:
        """What the wrapped optimizer steps; ZeRO-3 shows it one group at a time."""
        of_stage_3 = getattr(self.engine.optimizer, "fp32_partitioned_groups_flat", None)
        return of_stage_3 or [p for group in self._base.param_groups for p in group["params"]]

    def _whole(self, value: Tensor) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param

        if _is_trained(value) and self._holds_parts:
            return first_keeps(safe_get_full_fp32_param(value))
        with _gathered([value] if hasattr(value, "ds_id") else []):
            return value.detach().clone()

    def _moments(self) -> dict[str, dict[str, Any]]:
        from deepspeed.utils import safe_get_full_optimizer_state

        if not self._holds_parts:
            return state_by_name(self._base, self._trained)
        self._link_moments()
        first: dict[str, Any] = next(iter(self._base.state.values()), {})
        moments = [key for key, value in first.items() if _is_moment(value)]
        state: dict[str, dict[str, Any]] = {}
        for name, parameter in self._trained:
            # Each its own count of steps: on one tensor the steps of all would add up.
            state[name] = {k: _copy(value) for k, value in first.items() if k not in moments}
            for key in moments:
                state[name][key] = first_keeps(safe_get_full_optimizer_state(parameter, key))
        return state

    def _load_moments(self, saved: Mapping[str, Mapping[str, Any]]) -> None:
        if not self._holds_parts:
            load_state_by_name(self._base, self._trained, saved)
            return
        self._make_room(saved[self._trained[0][0]])
        self._link_moments()
        for name, parameter in self._trained:
            for key, value in saved[name].items():
                if _is_moment(value):
                    _set_part(parameter, value.to(self.device), key)

    def _make_room(self, of_one: Mapping[str, Any]) -> None:
        """Moments of the flat copies, which the first step would make, so that they can be set."""
        for flat in self._flat_copies:
            state = self._base.state[flat]
            for key, value in of_one.items():
                if _is_moment(value):
                    state[key] = torch.zeros_like(flat)
                else:
                    state[key] = _copy(value)

    def _link_moments(self) -> None:
        """Let parameters find their moments; DeepSpeed (0.19.8) does so when the first group of
        parameters has taken its first step, and the other groups have none yet."""
        optimizer = self.engine.optimizer
        if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
            optimizer._hp_optimizer_states_linked = False
            optimizer._lazy_init_hp_params_optimizer_state()


def _is_moment(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _set_part(parameter: Any, whole: Tensor, key: str | None = None) -> None:
    """What this process holds of a moment, or without a key of the 32-bit weights."""
    from deepspeed import utils

    if not hasattr(parameter, "ds_id"):
        if key is None:
            utils.safe_set_full_fp32_param(parameter, whole)
        else:
            utils.safe_set_full_optimizer_state(parameter, whole, key)
        return
    # ZeRO-3 pads the last part, which its functions for whole values do not.
    size = parameter.ds_tensor.numel()
    padded = whole.new_zeros(size * dist.get_world_size())
    padded[: whole.numel()] = whole.flatten()
    part = padded[size * dist.get_rank() : size * (dist.get_rank() + 1)]
    if key is None:
        utils.safe_set_local_fp32_param(parameter, part)
    else:
        utils.safe_set_local_optimizer_state(parameter, part, key)


def _gathered(partitioned: list[Tensor]) -> AbstractContextManager[Any]:
    """Parameters that ZeRO-3 keeps in parts are whole in this context; rank 0's changes stay."""
    import deepspeed

    gathered: AbstractContextManager[Any]
    gathered = deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0)
    return gathered


def _is_trained(value: Tensor) -> bool:
    return isinstance(value, nn.Parameter) and value.requires_grad


def _initialize(encoder: nn.Module, config: Config, settings: dict[str, Any]) -> Any:
    if next(encoder.parameters()).device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # A launcher sets it; a process that nobody launched is alone.
    os.environ.setdefault("LOCAL_RANK", "0")
    import deepspeed

    if "optimizer" in settings:
        groups = parameter_groups(encoder)
        engine, *_ = deepspeed.initialize(model=encoder, model_parameters=groups, config=settings)
    else:
        optimizer = build_optimizer(config.optimizer, encoder)
        engine, *_ = deepspeed.initialize(model=encoder, optimizer=optimizer, config=settings)
    return engine


def _check(config: Config, settings: dict[str, Any]) -> None:
    if config.train.ema_decay and zero_stage(settings) == 3:
        raise ConfigError(
            f"train.ema_decay: expected 0 with ZeRO-3, whose processes hold parts of the weights, "
            f"got {config.train.ema_decay}; use ZeRO-2"
        )
