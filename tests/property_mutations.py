"""Where each fault goes, and for several processes under which strategy it is looked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any
from unittest import mock

import property_faults as faults
from property_faults import CACHE, DISTRIBUTED, Change


def _same_chunks(target: str, change: Callable[..., Any]) -> Change:
    return partial(faults.around, f"{CACHE}.{target}", change)


def _over_ranks(target: str, change: Callable[..., Any]) -> Change:
    return partial(faults.around, f"{DISTRIBUTED}.{target}", change)


def _as_it_is(target: str, value: Any) -> Change:
    return partial(mock.patch, f"{DISTRIBUTED}.{target}", value)


ON_ONE: Mapping[str, Change] = {
    "a replay is dropped": _same_chunks("schedule.groups", faults.drops_a_replay),
    "kept graphs get no backward": _same_chunks("schedule.groups", faults.drops_kept_graphs),
    "a replay draws new numbers": _same_chunks(
        "tower.Tower.replay", faults.replays_with_new_numbers
    ),
    "draws are not noticed": _same_chunks("random_state.Draws.settle", faults.draws_unnoticed),
    "a key is shifted by a row": _same_chunks(
        "host_inputs.chunk_of", partial(faults.cuts, change=faults.rolled)
    ),
    "a key is cut too little": _same_chunks(
        "host_inputs.chunk_of", partial(faults.cuts, change=faults.too_few)
    ),
    "Shared is cut": _same_chunks("batch_tree._cut", faults.shared_is_cut),
    "features stay sorted": _same_chunks("tower.Tower.as_passed", faults.as_it_came),
    "gradients do not get sorted": _same_chunks("tower.Tower.as_held", faults.as_it_came),
    "a column of tokens is lost": _same_chunks(
        "lengths.ByLength.chunks", faults.trims_one_column_more
    ),
    "any column is trimmed": _same_chunks("columns._are_padding", faults.all_is_padding),
    "hooks run on parts": _same_chunks("prepare.held_hooks", faults.hooks_on_parts),
    "a tower gets the gradient of another": faults.with_gradients(faults.of_first_tower),
    "rows get the gradient of others": faults.with_gradients(faults.of_other_rows),
    "the second feature gets none": faults.with_gradients(faults.first_feature_alone),
    "the first chunk tells what is trained": _same_chunks(
        "tower.Tower._embed", faults.decided_by_first_chunk
    ),
    "earlier gradients are lost": _same_chunks(
        "recovery.StepSnapshot.finish", faults.earlier_gradients_lost
    ),
    "the loss's own parameters get none": _over_ranks(
        "strategy.LocalStrategy.backward_of_loss", faults.loss_parameters_left_out
    ),
}

ON_TWO: Mapping[str, tuple[str, Change]] = {
    "AllReduce: not averaged": (
        "AllReduce",
        _as_it_is("strategy_all_reduce._average", faults.nothing),
    ),
    "AllReduce: summed": ("AllReduce", _over_ranks("strategy_all_reduce._average", faults.summed)),
    "AllReduce: what this rank has": (
        "AllReduce",
        _as_it_is("strategy_all_reduce._with_gradient_anywhere", faults.of_this_rank),
    ),
    "DDP: no factor": ("DDP", _as_it_is("many_ranks.ManyRanks.gradient_factor", faults.one)),
    "DDP: every backward reduces": (
        "DDP",
        _over_ranks("strategy_ddp.DDPStrategy.replay_context", faults.every_replay_is_the_last),
    ),
    "DDP: nothing is reached": (
        "DDP",
        _over_ranks("strategy_ddp.DDPStrategy.backward", faults.own_gradients),
    ),
    "DDP: wrappers reduce in any order": (
        "DDP",
        _over_ranks("strategy_ddp.DDPStrategy.backward", faults.zeros_made_late),
    ),
    "DDP: one parameter is reached": (
        "DDP",
        _over_ranks("strategy_ddp.reach", faults.reaches_the_first),
    ),
    "DDP: zeros where nobody uses": ("DDP", _as_it_is("unreached.without_use", faults.none_unused)),
    "DDP: None where this rank does not use": (
        "DDP",
        _over_ranks("unreached.without_use", faults.missing_everywhere),
    ),
    "FSDP: no factor": ("FSDP", _as_it_is("many_ranks.ManyRanks.gradient_factor", faults.one)),
    "FSDP: no zeros": (
        "FSDP gathered",
        _over_ranks("strategy_fsdp.without_use", faults.missing_everywhere),
    ),
    "FSDP: zeros where nobody uses": (
        "FSDP",
        _as_it_is("strategy_fsdp.without_use", faults.none_unused),
    ),
    "FSDP: backwards differ": ("FSDP", _as_it_is("strategy_fsdp.same_backward", faults.without)),
    "DDP: trained is not agreed": (
        "DDP",
        _over_ranks("strategy.LocalStrategy.anywhere", faults.found_here),
    ),
    "FSDP: forwards are not compared": (
        "FSDP",
        _as_it_is("same_forward.ForwardLog._compare", faults.nothing),
    ),
    "FSDP: every replay reduces": (
        "FSDP",
        _over_ranks("strategy_fsdp.FSDPStrategy.replay_context", faults.every_replay_is_the_last),
    ),
    "ZeRO: no factor": (
        "ZeRO-3",
        _over_ranks("strategy_deepspeed.DeepSpeedStrategy.backward", faults.halves),
    ),
    "ZeRO-1: one parameter is reached": (
        "ZeRO-1",
        _over_ranks("strategy_deepspeed.reach", faults.reaches_the_first),
    ),
    "ZeRO-2: every replay steps": (
        "ZeRO-2",
        _over_ranks(
            "strategy_deepspeed.DeepSpeedStrategy.replay_context", faults.every_replay_is_the_last
        ),
    ),
}

EQUIVALENT = ["FSDP: every replay reduces"]
"""Shards add up averages of parts: gradients stay as they are, only time is lost."""

FIRST = {
    "draws are not noticed": 139,
    "Shared is cut": 71,
    "features stay sorted": 57,
    "gradients do not get sorted": 57,
    "the first chunk tells what is trained": 33,
    "the second feature gets none": 13,
    "DDP: every backward reduces": 8,
    "FSDP: no zeros": 6,
}
"""The case that has shown a fault is tried before the others, which show it later."""
