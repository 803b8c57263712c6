"""Checks the arguments of the loss for sentence-transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gradcache_clip.cache.checks import one_of
from gradcache_clip.cache.graph_budget import checked_budget
from gradcache_clip.distributed import world_size
from gradcache_clip.distributed.wrappers import innermost, wrapper_in
from gradcache_clip.losses.matryoshka import check_dims
from gradcache_clip.losses.options import check_finite, check_positive, check_positive_int

_OPTIONS = (
    *("matryoshka_dims", "matryoshka_weights", "pad_to_multiple_of"),
    *("memory_budget", "check_replay"),
)

_WRAPPERS = {
    "FSDPModule": "FSDP, which frees parameters between the embed and the replay",
    "FullyShardedDataParallel": "FSDP, which frees parameters between the embed and the replay",
    "DeepSpeedEngine": "DeepSpeed, whose engine must run every backward itself",
}


def check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model: expected a SentenceTransformer, got {model!r}; such as "
            "SentenceTransformer('microsoft/mpnet-base')"
        )


def check_scale(scale: Any) -> None:
    check_positive("scale", scale, "such as 20.0; to learn it from there pass learnable_scale=True")


def check_temperature(name: str, temperature: Any) -> None:
    check_positive(name, temperature, "such as 0.05, which is a scale of 20")


def check_chunking(rows: Any, tokens: Any, options: Mapping[str, Any]) -> None:
    """Raise for sizes and keywords that no chunk can have."""
    check_positive_int("mini_batch_size", rows, "take the largest that fits, such as 32")
    if tokens is not None:
        remedy = "such as 16384, or leave it out to cut by mini_batch_size"
        check_positive_int("mini_batch_num_tokens", tokens, remedy)
    if unknown := sorted(set(options) - set(_OPTIONS)):
        raise TypeError(
            f"{unknown[0]}: expected a keyword of the library's loss or one of "
            f"{', '.join(_OPTIONS)}, got another; correct its name"
        )
    remedy = "such as 64, or leave it out to trim chunks to their longest row"
    check_positive_int("pad_to_multiple_of", options.get("pad_to_multiple_of", 1), remedy)
    checked_budget(options.get("memory_budget"))
    one_of("check_replay", options.get("check_replay", "error"), ("error", "warn", "off"))


def temperatures(temperature: Any, student: Any, teacher: Any) -> tuple[float, float]:
    """Return those of student and teacher, which are `temperature` where they are None."""
    check_temperature("temperature", temperature)
    student = temperature if student is None else student
    teacher = temperature if teacher is None else teacher
    check_temperature("student_temperature", student)
    check_temperature("teacher_temperature", teacher)
    return student, teacher


def check_score_rows(rows: Any) -> None:
    if rows is not None:
        check_positive_int("score_mini_batch_size", rows, "leave it out: it has no effect")


def check_similarity(similarity_fct: Any, *known: Callable[..., Any]) -> None:
    if similarity_fct not in known:
        name = getattr(similarity_fct, "__name__", type(similarity_fct).__name__)
        names = " or ".join(each.__name__ for each in known)
        raise ValueError(
            f"similarity_fct: expected sentence_transformers.util.{names}, got {name}; leave it "
            "out, and use sentence-transformers' own loss for another similarity"
        )


def check_margin(strategy: Any, margin: Any) -> None:
    one_of("margin_strategy", strategy, ("absolute", "relative"))
    check_finite("margin", margin, "such as 0.05")


def check_in_batch(weight: Any, scale: Any) -> None:
    check_positive("in_batch_scale", scale, "such as 20.0")
    if weight != 0:
        check_positive("in_batch_weight", weight, "or 0 for scores alone")


def check_widths(
    dims: Sequence[int] | None, weights: Sequence[float] | None, model: nn.Module
) -> None:
    """Raise ValueError for invalid widths and weights, or widths beyond the model's."""
    if dims is None and weights is not None:
        raise ValueError(
            f"matryoshka_weights: expected None without matryoshka_dims, got {weights!r}; "
            "pass the widths too"
        )
    if dims is None:
        return
    check_dims(dims, weights, prefix="matryoshka_")
    width = getattr(model, "get_embedding_dimension", lambda: None)()
    if width is not None and max(dims) > width:
        raise ValueError(
            f"matryoshka_dims: expected at most the width of the model, {width}, got {max(dims)}; "
            "leave out wider ones"
        )


def check_matryoshka_loss(replaced: Any, dims: Any, name: str) -> None:
    """Raise TypeError unless it comes from one `MatryoshkaLoss`, with all widths."""
    from sentence_transformers.sentence_transformer.losses.matryoshka import CachedLossDecorator

    several = isinstance(replaced, CachedLossDecorator) and replaced.n_dims_per_step < 1
    if not several or dims is not None:
        raise TypeError(
            f"{name}: expected one MatryoshkaLoss around it, with n_dims_per_step=-1, or "
            f"matryoshka_dims, got {type(replaced).__name__} with matryoshka_dims={dims}; pass "
            "matryoshka_dims= alone"
        )


def check_columns(columns: Sequence[Mapping[str, Any]], least: int) -> None:
    if len(columns) < least:
        *some, last = ("anchors", "positives", "negatives")[:least]
        raise ValueError(
            f"sentence_features: expected at least {least} columns, {', '.join(some)} and {last}, "
            f"got {len(columns)}; give the dataset a column of {last}"
        )


def check_not_wrapped_in_a_loss(model: nn.Module, name: str) -> None:
    """Raise TypeError if another loss has temporarily replaced the model's forward.

    The trainer's backward replays the chunks after that loss has restored the forward.
    """
    for part in innermost(model).modules():
        replaced = type(vars(part).get("forward"))
        if replaced.__module__.startswith("sentence_transformers.") and "losses" in str(replaced):
            raise TypeError(
                f"{name}: expected to be used by itself, got a loss around it that changes the "
                "model during its forward, such as AdaptiveLayerLoss; wrap a loss of "
                "sentence-transformers that does not cache instead"
            )


def check_place(model: nn.Module, *, gathers: bool) -> None:
    """Raise ValueError for wrappers and numbers of processes that would give wrong gradients."""
    if isinstance(model, nn.DataParallel):
        raise ValueError(
            "model: expected one process per GPU, got DataParallel, whose replicas draw random "
            "numbers that cannot be reproduced; start the script with torchrun"
        )
    if (wrapper := wrapper_in(model)) in _WRAPPERS:
        raise ValueError(
            f"model: expected a plain model or DistributedDataParallel, got {_WRAPPERS[wrapper]}; "
            "leave fsdp and deepspeed out of the arguments, or train with `gradcache-clip launch "
            "--strategy`"
        )
    ranks = world_size()
    if ranks > 1 and not gathers:
        raise ValueError(
            f"gather_across_devices: expected True on {ranks} processes, got False; the loss "
            "is that of the whole batch: pass gather_across_devices=True"
        )
    if ranks > 1 and torch.is_grad_enabled() and not isinstance(model, DistributedDataParallel):
        raise ValueError(
            f"model: expected DistributedDataParallel on {ranks} processes, got "
            f"{type(model).__name__}, whose gradients would not be reduced; let the trainer wrap "
            "the model, without torch_compile (compile model[0].auto_model in place)"
        )


def check_wrapper(model: nn.Module, inputs: int) -> None:
    """Raise ValueError for settings of DDP that assume one forward per step."""
    if not isinstance(model, DistributedDataParallel):
        return
    if model.static_graph:
        raise ValueError(
            "ddp_static_graph: expected False, got True, which assumes one forward per step; "
            "leave it out"
        )
    if inputs > 1 and model.find_unused_parameters:
        raise ValueError(
            "ddp_find_unused_parameters: expected False for columns that are embedded separately, "
            "because they are tokenized differently, padded on the left or packed, got True; pass "
            "ddp_find_unused_parameters=False, which handles unused parameters as well"
        )


def sentence_embedding(output: Any) -> Tensor:
    """Return the pooled output of a model; `get_features` of the cache."""
    pooled = output.get("sentence_embedding") if isinstance(output, Mapping) else None
    if not isinstance(pooled, Tensor):
        got = ", ".join(map(str, output)) if isinstance(output, Mapping) else type(output).__name__
        raise TypeError(
            f"model: expected an output with sentence_embedding, got {got}; add a Pooling module, "
            "with pooling_mode='lasttoken' for a causal model"
        )
    return pooled
