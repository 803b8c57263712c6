"""The training steps that memory_vs_batch.py measures, and one measurement of them.

B pairs a batch, L tokens a text.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from fresh_process import PeakGrowth, interleaved_times_ms
from torch import Tensor, nn

from gradcache_clip import ClipLoss, GradCache

Inputs = tuple[Tensor, dict[str, Tensor]]
_FEATURES = 512


@dataclass(frozen=True)
class ModelSize:
    """A pair of encoders and the shape of their inputs."""

    description: str
    image: dict[str, Any]
    """Arguments of timm.create_model; empty for an MLP that needs no library."""
    text: dict[str, Any]
    """Arguments of transformers.BertConfig."""
    image_size: int = 64
    tokens: int = 32
    vocabulary: int = 30522


SIZES = {
    "small": ModelSize(
        "ViT-S/16 at 64 px + BERT-small (4 x 512) at 32 tokens",
        {"model_name": "vit_small_patch16_224"},
        {"hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8},
    ),
    "mini": ModelSize(
        "ViT (4 x 192, patch 16) at 64 px + BERT-mini (2 x 256) at 32 tokens",
        {"model_name": "vit_tiny_patch16_224", "depth": 4},
        {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4},
    ),
    "mlp": ModelSize("two MLPs, to try the script itself", {}, {}, 16, 8, 512),
}


class BertEncoder(nn.Module):
    """BERT from a configuration; the projected first token is the feature."""

    def __init__(self, vocabulary: int, config: dict[str, Any]) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        full = BertConfig(
            vocab_size=vocabulary,
            intermediate_size=4 * config["hidden_size"],
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            **config,
        )
        self.bert = BertModel(full, add_pooling_layer=False)
        self.projection = nn.Linear(config["hidden_size"], _FEATURES, bias=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return self.projection(hidden[:, 0])


class BagOfWords(nn.Module):
    """The text side of the "mlp" pair."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, 64)
        self.layers = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, _FEATURES))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.layers(self.embedding(input_ids) * attention_mask.unsqueeze(-1)).mean(1)


class PlainClipLoss(nn.Module):
    """The CLIP loss as it is usually written, with its B x B matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.log_logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())

    def forward(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        image_features = F.normalize(image_features, dim=-1)
        text_features = F.normalize(text_features, dim=-1)
        logits = self.log_logit_scale.exp() * image_features @ text_features.T
        labels = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


class Encoders(NamedTuple):
    """An image and a text encoder with features of the same width."""

    image: nn.Module
    text: nn.Module


def build_encoders(size: ModelSize) -> Encoders:
    """Randomly initialised encoders; the same weights for the same seed."""
    if not size.image:
        pixels = 3 * size.image_size**2
        image = nn.Sequential(
            nn.Flatten(), nn.Linear(pixels, 256), nn.GELU(), nn.Linear(256, _FEATURES)
        )
        return Encoders(image, BagOfWords(size.vocabulary))
    import timm

    image = timm.create_model(**size.image, img_size=size.image_size, num_classes=_FEATURES)
    return Encoders(image, BertEncoder(size.vocabulary, size.text))


def make_inputs(size: ModelSize, batch_size: int) -> Inputs:
    """Random images (B, 3, H, W), and token ids and mask (B, L)."""
    images = torch.randn(batch_size, 3, size.image_size, size.image_size)
    ids = torch.randint(size.vocabulary, (batch_size, size.tokens))
    return images, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def make_steps(
    size: ModelSize, batch_size: int, chunk_size: int
) -> dict[str, Callable[[], object]]:
    """One step of each method on the same model, inputs and optimizer: gradients, then AdamW."""
    torch.manual_seed(0)
    encoders, losses = build_encoders(size), {"plain": PlainClipLoss(), "cached": ClipLoss()}
    images, texts = make_inputs(size, batch_size)
    cache = GradCache(encoders, losses["cached"], chunk_size=chunk_size)
    modules = nn.ModuleList([*encoders, *losses.values()])
    optimizer = torch.optim.AdamW(modules.parameters(), lr=1e-4)

    def plain() -> None:
        losses["plain"](encoders.image(images), encoders.text(**texts)).backward()
        finish()

    def cached() -> None:
        cache(images, texts)
        finish()

    def finish() -> None:
        optimizer.step()
        optimizer.zero_grad()

    # Two pairs make the optimizer's states, which then stand in memory from the first step on.
    few = {name: tensor[:2] for name, tensor in texts.items()}
    losses["plain"](encoders.image(images[:2]), encoders.text(**few)).backward()
    finish()
    return {"plain": plain, "cached": cached}


def measure_memory(arguments: dict[str, Any]) -> dict[str, Any]:
    """Growth of peak resident memory over model, optimizer, inputs and steps; time of a step."""
    warnings.simplefilter("ignore")
    size = SIZES[arguments["size"]]
    _load_libraries(size)
    with PeakGrowth() as growth:
        steps = make_steps(size, arguments["batch_size"], arguments["chunk_size"])
        step = steps[arguments["method"]]
        rounds = interleaved_times_ms([step], arguments["steps"], arguments["seconds"])
    return {
        "peak_growth_bytes": growth.bytes,
        "step_ms": median(duration for (duration,) in rounds),
        "steps": len(rounds),
    }


def _load_libraries(size: ModelSize) -> None:
    """Import what a step imports on its way; code is no part of a step's memory."""
    if size.image:
        import timm  # noqa: F401
        from transformers import BertConfig, BertModel  # noqa: F401
    for step in make_steps(SIZES["mlp"], 2, 1).values():
        step()


def measure_pair(arguments: dict[str, Any]) -> dict[str, Any]:
    """Plain and cached steps that take turns in one process: the median ratio of their times."""
    warnings.simplefilter("ignore")
    size = SIZES[arguments["size"]]
    steps = make_steps(size, arguments["batch_size"], arguments["chunk_size"])
    both = [steps["plain"], steps["cached"]]
    rounds = interleaved_times_ms(both, arguments["steps"], arguments["seconds"])
    return {"cached_over_plain_time": median(cached / plain for plain, cached in rounds)}
