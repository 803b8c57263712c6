"""The Trainer of transformers with large batches. B pairs of one process, D feature width."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import Trainer

from gradcache_clip.cache import ByLength, GradCache
from gradcache_clip.cache.auxiliary import AuxiliaryOutput
from gradcache_clip.cache.checks import loss_in
from gradcache_clip.cache.deferred import deferred_step
from gradcache_clip.cache.graph_budget import MemoryBudget
from gradcache_clip.cache.packed import Division
from gradcache_clip.cache.settings import GetFeatures
from gradcache_clip.cache.trunk import call_encoder
from gradcache_clip.distributed import AllReduceStrategy
from gradcache_clip.integrations.arguments import ENGINE_ARGUMENTS, translate_errors
from gradcache_clip.integrations.pooling import (
    Pooling,
    check_masks,
    check_pooling,
    entries_of_batch,
    pooled_output,
)
from gradcache_clip.integrations.transformers_checks import (
    METHODS,
    check_columns,
    check_loss_of_all_processes,
    check_methods,
    check_parts,
    check_scale,
    checked_pairs,
    refuse_a_single_pair,
    refuse_functions,
    refuse_settings,
)
from gradcache_clip.losses import ClipLoss, SigLipLoss

Towers = Callable[[Any, Mapping[str, Any]], Sequence[tuple[Callable[..., Any], Any]]]
"""Model and batch -> one (encoder, inputs) per tower."""
ModelLoss = Callable[..., Any]
"""Model and the features of each tower -> a scalar, or an object whose `.loss` is one."""

_CLIP, _SIGLIP = ClipLoss(), SigLipLoss()

_OWN_NAMES = {
    **ENGINE_ARGUMENTS,
    " (_Towers)": " of towers",
    "say which with get_features, such as get_features=lambda output: "
    "output.last_hidden_state[:, 0] for a BERT; around a causal model write a module that returns "
    "each row's last token, hidden[torch.arange(len(mask)), mask.sum(1) - 1] where padding is on "
    "the right": 'pass pooling="last" for a causal model, pooling="mean" or "cls" for a BERT, or '
    "say which with get_features",
    "} to GradCache (0.0 leaves": "} (0.0 leaves",
    "pass strategy=DDPStrategy()": "give the Trainer the model itself",
}
"""Texts in errors of the engine -> texts with the arguments of this trainer."""


class GradCacheTrainer(Trainer):
    """`Trainer` in which `chunk_size`, not `per_device_train_batch_size`, determines the memory.

    Takes every argument of `Trainer`. Loss and gradients are those of the model's own loss over the
    whole batch; on several processes over the batches of all, with one reduction per step. The
    Trainer does everything after the loss: accumulation, mixed precision, clipping, schedules,
    checkpoints. Logs also contain `accuracy`, the in-batch accuracy. Evaluation reports the loss
    over `per_device_eval_batch_size` pairs of every process, and passes features (B, D) of each
    tower to `compute_metrics`.

    Args:
        chunk_size: pairs that go through a tower at once, for all towers or per tower.
        memory_budget: memory for graphs that are kept; see `GradCache`.
        sort_by_length: `ByLength()` for texts of unequal length, for all towers or per tower; see
            `GradCache`.
        towers: function of model and batch that returns one (encoder, inputs) per tower. An encoder
            is a submodule or method of the model, called like those of `GradCache`. A reranker is
            one tower: pairs go in, and the `logits` of its output are the features.
        loss: function of the model and the features of each tower that returns a scalar, an
            object with `.loss`, or a dict of parts, which are logged. Its parameters must be in the
            model, for the optimizer. On several processes it must be that of all rows: losses of
            this library are, others call `gather_rows`.
        loss_key: which part of the loss is minimised.
        pooling: takes one vector per row from `last_hidden_state`: the "last" token that
            `attention_mask` keeps, "cls", the first one, or the "mean" of all, padded on either
            side. Without `towers`, each entry of a batch is a dict of the model's arguments and a
            tower, such as "query" and "document".
        get_features: extracts features from an encoder's output in place of `pooling`, for all
            towers or per tower; see `GradCache`.
        rows: `PackedPatches()` for packed images, or another division, for all towers or per tower;
            see `GradCache`.
        auxiliary_losses: weights of losses that encoders return beside features; see `GradCache`.

    Raises:
        ValueError: settings of the Trainer that would give wrong gradients, such as FSDP; in the
            first step, a loss that differs between processes.
        TypeError: a loss that is a module outside of the model.

    Example:
        from transformers import CLIPModel, TrainingArguments
        from gradcache_clip.integrations.transformers import GradCacheTrainer
        model = CLIPModel.from_pretrained("openai/clip-vit-base-patch32")
        arguments = TrainingArguments("run", per_device_train_batch_size=4096)
        trainer = GradCacheTrainer(model, arguments, train_dataset=pairs, chunk_size=64)
        trainer.train()
    """

    def __init__(
        self,
        *args: Any,
        chunk_size: int | Sequence[int] = 64,
        memory_budget: MemoryBudget = None,
        sort_by_length: ByLength | Sequence[ByLength | None] | None = None,
        towers: Towers | None = None,
        loss: ModelLoss | None = None,
        loss_key: str = "loss",
        pooling: Pooling | None = None,
        get_features: GetFeatures | Sequence[GetFeatures | None] | None = None,
        rows: Division | Sequence[Division | None] | None = None,
        auxiliary_losses: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        refuse_settings(self)
        check_pooling(pooling, rows, get_features)
        if pooling and towers is None:
            check_columns(self.args)
            towers = entries_of_batch
        refuse_functions(self.model, towers, loss, get_features)
        if loss is None and not hasattr(self.model, "logit_bias"):
            refuse_a_single_pair(self)
        # The loss is a mean over the batch and needs no labels; evaluation should compute it too.
        self.model_accepts_loss_kwargs, self.can_return_loss = False, True
        self.label_names: list[str] = []
        self.contrast, self.loss_key = loss or loss_of_model, loss_key
        self.towers = _Towers(self.model, towers or image_and_text, pooling)
        self.cache = GradCache(
            self.towers,
            self._contrasted,
            chunk_size=chunk_size,
            memory_budget=memory_budget,
            get_features=get_features,
            rows=rows,
            sort_by_length=sort_by_length,
            auxiliary_losses=auxiliary_losses,
            strategy=_OnceAStep(self.accelerator),
        )
        self._parts: dict[str, list[Tensor]] = {}
        self._checked_loss = False

    def create_accelerator_and_postprocess(self) -> None:
        """Create the accelerator, and leave the model unwrapped on several processes."""
        super().create_accelerator_and_postprocess()
        self.accelerator.prepare_model = partial(_prepared, self.accelerator.prepare_model)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Compute the loss of a batch; its backward, if gradients are enabled, replays the chunks.

        Returns:
            The 0-dim loss; with `return_outputs` also (loss, *features).
        """
        batches = self.towers.inputs_of(self.accelerator.unwrap_model(model), inputs)
        with self.accelerator.autocast(), translate_errors(_OWN_NAMES):
            output = deferred_step(self.cache, *batches)
        contrasted = output.output if isinstance(output, AuxiliaryOutput) else output
        if torch.is_grad_enabled():
            if not self._checked_loss:
                check_loss_of_all_processes(contrasted.loss)
            self._checked_loss = True
            self._remember(contrasted.parts, getattr(output, "auxiliary", {}))
        return (output.loss, (output.loss, *contrasted.features)) if return_outputs else output.loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with the mean of each part of the loss over the same batches as `loss`."""
        if "loss" in logs:
            logs |= {name: float(torch.stack(each).mean()) for name, each in self._parts.items()}
            self._parts.clear()
        super().log(logs, *args, **kwargs)

    def _remember(self, parts: Mapping[str, Tensor], auxiliary: Mapping[str, Tensor]) -> None:
        named = {f"auxiliary_{name}": loss for name, loss in auxiliary.items()}
        for name, part in {**parts, **named}.items():
            self._parts.setdefault(name, []).append(part.detach())

    def _contrasted(self, *features: Any) -> _Contrasted:
        output = self.contrast(self.towers.model, *features)
        return _Contrasted(
            loss_in(output, self.loss_key), _parts_of(output, self.loss_key), features
        )


def image_and_text(
    model: Any, inputs: Mapping[str, Any]
) -> list[tuple[Callable[..., Any], dict[str, Any]]]:
    """Return the towers of a model with `get_image_features` and `get_text_features`.

    `CLIPModel`, `SiglipModel`, `VisionTextDualEncoderModel` and others have these methods. Each
    entry of the batch goes to the method with an argument of its name.

    Raises:
        TypeError: the model lacks these methods.
        ValueError: an entry of the batch belongs to neither.
    """
    check_methods(model)
    methods = [getattr(model, name) for name in METHODS]
    names = [list(inspect.signature(method).parameters) for method in methods]
    # `return_loss` is for the model's own forward, which nothing here calls.
    unknown = sorted(inputs.keys() - {*chain.from_iterable(names)} - {"return_loss"})
    if unknown:
        raise ValueError(
            f"batch: expected arguments of {' and '.join(METHODS)}, got {', '.join(unknown)}; "
            "leave it out in the data collator, or pass towers=function"
        )
    return [
        (method, {name: inputs[name] for name in wanted if name in inputs})
        for method, wanted in zip(methods, names, strict=True)
    ]


def loss_of_model(model: Any, image_features: Tensor, text_features: Tensor) -> Any:
    """Compute the model's own loss over a batch: SigLIP's if it has a `logit_bias`, else CLIP's.

    The scale is exp(model.logit_scale) without an upper bound, as in transformers.

    Args:
        model: has the parameter `logit_scale`.
        image_features, text_features: (B, D), not normalised.
    """
    check_scale(model)
    scale = model.logit_scale.exp()
    if hasattr(model, "logit_bias"):
        return _SIGLIP(image_features, text_features, scale, model.logit_bias)
    return _CLIP(image_features, text_features, scale)


class _Contrasted(NamedTuple):
    loss: Tensor
    parts: dict[str, Tensor]
    """For the log, by name."""
    features: tuple[Any, ...]


def _parts_of(output: Any, loss_key: str) -> dict[str, Tensor]:
    """Collect the numbers beside the loss: of a dict all, of an object its `accuracy`."""
    named = (
        output if isinstance(output, Mapping) else {"accuracy": getattr(output, "accuracy", None)}
    )
    numbers = {
        name: torch.as_tensor(part)
        for name, part in named.items()
        if name != loss_key and isinstance(part, (Tensor, int, float))
    }
    parts = {n: x.detach().float().reshape(()) for n, x in numbers.items() if x.numel() == 1}
    check_parts(parts)
    return parts


class _Towers(nn.Module):
    """Calls the towers of a model by number."""

    def __init__(self, model: nn.Module, split: Towers, pooling: Pooling | None) -> None:
        super().__init__()
        self.model, self.split, self.pooling = model, split, pooling
        self.encoders: list[Callable[..., Any]] = []

    def inputs_of(self, model: nn.Module, batch: Mapping[str, Any]) -> list[Any]:
        """Return the inputs of each tower from a batch, and remember the encoders."""
        self.model = model
        pairs = checked_pairs(self.split(model, batch))
        self.encoders = [encoder for encoder, _ in pairs]
        batches = [inputs for _, inputs in pairs]
        if self.pooling is not None:
            check_masks(batches)
        return batches

    def forward(self, tower: int, inputs: Any) -> Any:
        output = call_encoder(self.encoders[tower], inputs)
        return output if self.pooling is None else pooled_output(output, inputs, self.pooling)


class _OnceAStep(AllReduceStrategy):
    """Reduces gradients only in the last of several accumulated batches."""

    def __init__(self, accelerator: Any) -> None:
        super().__init__()
        self.accelerator = accelerator

    @contextmanager
    def step_context(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        with super().step_context(modules) if self.accelerator.sync_gradients else nullcontext():
            yield


def _prepared(prepare_model: Callable[..., Any], model: nn.Module, **options: Any) -> Any:
    """Move the model to its device with rank 0's weights, without wrapping it.

    DistributedDataParallel would wait for a gradient of `logit_scale` in every replay, and keep a
    second copy of all gradients.
    """
    prepared = prepare_model(model, **{**options, "evaluation_mode": True})
    if not options.get("evaluation_mode") and dist.is_initialized():
        with torch.no_grad():
            for tensor in chain(prepared.parameters(), prepared.buffers()):
                dist.broadcast(tensor, src=0)
    return prepared
