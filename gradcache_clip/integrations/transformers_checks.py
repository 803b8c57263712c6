"""Refuses settings, models and functions with which `GradCacheTrainer` would not be exact."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers.trainer_utils import has_length

from gradcache_clip.distributed.collectives import all_gather, world_size

METHODS = ("get_image_features", "get_text_features")
_TOWERS = (
    "pass towers=function, which returns one (encoder, inputs) for each tower, such as "
    'lambda model, batch: [(model.image, batch["images"]), (model.text, batch["texts"])]'
)

_LOGGED = {"loss", "grad_norm", "learning_rate", "epoch", "step"}

_WHY_NOT = {
    "FSDP": "FSDP, which frees parameters between the embed and the replay",
    "DEEPSPEED": "DeepSpeed, whose engine must run every backward itself",
}


def check_methods(model: Any) -> None:
    if not all(hasattr(model, name) for name in METHODS):
        raise TypeError(
            f"model: expected {' and '.join(METHODS)}, got {type(model).__name__} without; "
            f"{_TOWERS}"
        )


def checked_pairs(pairs: Any) -> list[tuple[Any, Any]]:
    """Check that `towers` returned one (encoder, inputs) per tower, and return them as a list."""
    found = list(pairs) if isinstance(pairs, (list, tuple)) else []
    if not found or not all(isinstance(p, (list, tuple)) and len(p) == 2 for p in found):
        got = [type(each).__name__ for each in found] or type(pairs).__name__
        raise TypeError(
            f"towers: expected one (encoder, inputs) for each tower, got {got}; such as "
            'lambda model, batch: [(model.image, batch["images"]), (model.text, batch["texts"])]'
        )
    return found


def check_columns(args: Any) -> None:
    if args.remove_unused_columns:
        raise ValueError(
            "remove_unused_columns: expected False with pooling and without towers, because the "
            "columns of the data set are towers and not arguments of the model, got True; set "
            "TrainingArguments(remove_unused_columns=False)"
        )


def check_parts(parts: Mapping[str, Any]) -> None:
    if taken := sorted(_LOGGED & parts.keys()):
        raise ValueError(
            f"loss: expected parts with names that the Trainer does not log itself, got "
            f"{taken[0]!r}; rename it, or name it with loss_key if it is what to minimise"
        )


def check_loss_of_all_processes(loss: Tensor) -> None:
    """Raise ValueError unless all processes found one loss: gradients are summed over them."""
    if (ranks := world_size()) == 1:
        return
    losses = loss.detach().new_empty(ranks)
    all_gather(losses, loss.detach().reshape(1))
    if losses.max() - losses.min() > 1e-5 * losses.abs().max():
        raise ValueError(
            "loss: expected that of the rows of all processes, the same on each, got "
            f"{losses.tolist()}; gather features first, such as loss=lambda model, scores: "
            "listwise(gather_rows(scores)) with gather_rows of gradcache_clip.distributed"
        )


def check_scale(model: Any) -> None:
    if not hasattr(model, "logit_scale"):
        raise TypeError(
            f"model: expected a parameter logit_scale, got {type(model).__name__} without; pass "
            "loss=function, such as lambda model, *features: model.loss(*features)"
        )


def refuse_settings(trainer: Any) -> None:
    """Raise ValueError for settings that would give wrong gradients or have no effect."""
    args, engine = trainer.args, trainer.accelerator.distributed_type.value
    for refused, message in (
        (
            engine != "NO" and not engine.startswith("MULTI_"),
            f"distributed_type: expected one process, or data parallelism over several, got "
            f"{_WHY_NOT.get(engine, engine)}; leave fsdp and deepspeed out, and for sharded "
            "training use `gradcache-clip launch --strategy`, or GradCache with FSDPStrategy or "
            "DeepSpeedStrategy in your own loop",
        ),
        (
            trainer.is_distributed_loading_by_transformers or args.parallelism_config is not None,
            "model: expected whole weights on every process, got distributed_config or "
            "parallelism_config; leave them out",
        ),
        (
            args.n_gpu > 1,
            f"n_gpu: expected one GPU for each process, got {args.n_gpu}; start with torchrun "
            "--nproc-per-node, or set CUDA_VISIBLE_DEVICES",
        ),
        (
            args.torch_compile,
            "torch_compile: expected False, because towers are called without the compiled "
            "wrapper, got True; compile them in place, such as model.vision_model.compile()",
        ),
        (
            str(args.optim).lower().endswith("lomo"),
            f"optim: expected an optimizer that steps after the backward, got {args.optim}; use "
            "another one, such as adamw_torch",
        ),
        (
            args.label_smoothing_factor != 0,
            f"label_smoothing_factor: expected 0, got {args.label_smoothing_factor}; pass "
            "loss=lambda model, *features: smoothed(*features, model.logit_scale.exp()) with "
            "smoothed = ClipLoss(label_smoothing=...)",
        ),
        (
            trainer.compute_loss_func is not None,
            "compute_loss_func: expected None, got a function; pass loss=, a function of the model "
            "and its features",
        ),
    ):
        if refused:
            raise ValueError(message)


def refuse_functions(model: Any, towers: Any, loss: Any, get_features: Any) -> None:
    """Raise TypeError for arguments that are not functions, and for models without the defaults."""
    several = get_features if isinstance(get_features, (list, tuple)) else [get_features]
    if heads := [type(each).__name__ for each in several if isinstance(each, nn.Module)]:
        raise TypeError(
            f"get_features: expected a function of an encoder's output, got {heads[0]}, whose "
            "parameters the optimizer would not find; make it a submodule of the model and pass "
            "get_features=lambda output: model.head(output.pooler_output)"
        )
    if towers is None:
        check_methods(model)
    elif not callable(towers):
        raise TypeError(
            f"towers: expected a function of model and batch, got {type(towers).__name__}; "
            f"{_TOWERS}"
        )
    if loss is None:
        check_scale(model)
    elif not callable(loss):
        raise TypeError(
            f"loss: expected a function of model and features, got {type(loss).__name__}; such as "
            "loss=lambda model, *features: model.loss(*features)"
        )
    if isinstance(loss, nn.Module):
        raise TypeError(
            f"loss: expected a function of model and features, got {type(loss).__name__}, whose "
            "parameters the optimizer would not find; make it a submodule of the model and pass "
            "loss=lambda model, *features: model.loss(*features)"
        )


def refuse_a_single_pair(trainer: Any) -> None:
    """Raise ValueError now for a last batch of one pair, which would fail late in the epoch."""
    args, evaluated = trainer.args, trainer.eval_dataset
    several = evaluated if isinstance(evaluated, Mapping) else {"eval_dataset": evaluated}
    sizes = [("train_dataset", trainer.train_dataset, args.train_batch_size)]
    sizes += [(name, dataset, args.eval_batch_size) for name, dataset in several.items()]
    for name, dataset, size in sizes:
        alone = has_length(dataset) and args.world_size == 1 and len(dataset) % size == 1
        if alone and not args.dataloader_drop_last:
            raise ValueError(
                f"{name}: expected batches of two pairs or more, got {len(dataset)} pairs in "
                f"batches of {size}, whose last is a single pair without negatives; set "
                "dataloader_drop_last=True, or another batch size"
            )
