"""Small models of transformers, image-text pairs, and runs of a Trainer over them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from one_shot import gradient_errors, worst
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    SiglipConfig,
    SiglipModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    VisionTextDualEncoderModel,
    ViTConfig,
    ViTModel,
    default_data_collator,
)

from gradcache_clip import InfoNCELoss

WIDTHS = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
TEXT = {**WIDTHS, "vocab_size": 40, "max_position_embeddings": 8}
IMAGE = {**WIDTHS, "image_size": 8, "patch_size": 4}
BATCH, STEPS = 12, 3
CONSTRUCTOR = (
    *("callbacks", "chunk_size", "towers", "loss", "train_dataset", "eval_dataset"),
    *("compute_metrics", "data_collator", "compute_loss_func", "pooling", "rows"),
    *("auxiliary_losses", "loss_key", "sort_by_length", "get_features"),
)


def clip(dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> CLIPModel:
    torch.manual_seed(1)
    text = {**TEXT, "eos_token_id": 39, "attention_dropout": dropout}
    image = {**IMAGE, "attention_dropout": dropout}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=image, projection_dim=12)).to(dtype)


def siglip(dtype: torch.dtype = torch.float32) -> SiglipModel:
    torch.manual_seed(1)
    return SiglipModel(SiglipConfig(text_config=TEXT, vision_config=IMAGE)).to(dtype)


def dual(dtype: torch.dtype = torch.float32) -> VisionTextDualEncoderModel:
    torch.manual_seed(1)
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return VisionTextDualEncoderModel(
        vision_model=ViTModel(ViTConfig(**IMAGE, **off)),
        text_model=BertModel(BertConfig(**TEXT, **off)),
    ).to(dtype)


def pairs(dtype: torch.dtype = torch.float32, count: int = BATCH * STEPS) -> list[dict]:
    """Texts of two to six tokens, the last of them an end of text, padded on the right."""
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(count, 3, 8, 8, generator=generator).to(dtype)
    lengths = torch.randint(2, 7, (count, 1), generator=generator)
    tokens = torch.randint(1, 39, (count, 6), generator=generator)
    mask = (torch.arange(6) < lengths).long()
    tokens = tokens.scatter(1, lengths - 1, 39) * mask
    rows = zip(images, tokens, mask, strict=True)
    return [{"pixel_values": i, "input_ids": t, "attention_mask": m} for i, t, m in rows]


def collate(rows: list[dict]) -> dict[str, Any]:
    """What the Trainer of transformers needs to compute a loss."""
    return {**default_data_collator(rows), "return_loss": True}


def trainer(
    kind: type[Trainer], model: nn.Module, folder: Path, data: list[dict], **more: Any
) -> Trainer:
    """Arguments of the Trainer's constructor, and else settings."""
    given = {"data_collator": collate, "train_dataset": data}
    given |= {name: more.pop(name) for name in CONSTRUCTOR if name in more}
    settings = {
        "per_device_train_batch_size": BATCH,
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "logging_strategy": "no",
        "train_sampling_strategy": "sequential",
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "use_cpu": True,
        **more,
    }
    return kind(model, TrainingArguments(str(folder), **settings), **given)


def train(kind: type[Trainer], model: nn.Module, folder: Path, data: list[dict], **more: Any):
    trainer(kind, model, folder, data, **more).train()
    return model


class FirstGradients(TrainerCallback):
    """Gradients before the first optimizer step, and the random state before the first batch."""

    def __init__(self) -> None:
        self.gradients: dict[str, Tensor] = {}
        self.random_state: Tensor | None = None

    def on_step_begin(self, args, state, control, **_):
        if self.random_state is None:
            self.random_state = torch.get_rng_state()

    def on_pre_optimizer_step(self, args, state, control, model, **_):
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                self.gradients.setdefault(name, parameter.grad.clone())

    def given_to(self, model: nn.Module) -> nn.Module:
        for name, parameter in model.named_parameters():
            parameter.grad = self.gradients.get(name)
        return model


def first_gradients(kind: type[Trainer], model: nn.Module, folder: Path, data, **more: Any):
    """The model with the gradients of its first step."""
    seen = FirstGradients()
    more = {"max_steps": 1, "max_grad_norm": 0.0, "callbacks": [seen], **more}
    train(kind, model, folder, data, **more)
    return seen.given_to(model)


def worst_of(ours: nn.Module, truth: nn.Module) -> tuple[str, float]:
    """Without biases that every key or every score shares: their gradient is rounding alone."""
    zero = "k_proj.bias", "key.bias", "classifier.bias", "head.bias"
    errors = gradient_errors([ours], [truth])
    return worst({name: error for name, error in errors.items() if not name.endswith(zero)})


def one_graph(model: nn.Module, data: list[dict]) -> nn.Module:
    """The same of the model's own loss over a batch."""
    model(**collate(data)).loss.backward()
    return model


class Retriever(nn.Module):
    """No model of transformers: two encoders, and a loss with a scale of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.document = nn.Linear(5, 4), nn.Linear(7, 4)
        self.loss = InfoNCELoss(symmetric=False)

    def forward(self, query: Tensor, document: Tensor) -> None:
        raise AssertionError("only its parts are called")


def one_of_each(rows: list[Any]) -> dict[str, Any]:
    """A collator of data sets whose rows are whole batches."""
    (batch,) = rows
    return batch


BATCHES = {
    "per_device_train_batch_size": 1,
    "data_collator": one_of_each,
    "remove_unused_columns": False,
    "chunk_size": 2,
}
