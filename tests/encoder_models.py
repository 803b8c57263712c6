"""Tiny configurations of the encoders that people train, each with a batch of `ROWS` rows.

Every builder returns two encoders, or one, and an input for each; weights and numbers in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from lora_models import decoder, with_lora
from packed_inputs import (
    Grid,
    LastToken,
    Molecules,
    PackedModernBert,
    graph_library,
    packed,
    vision_batch,
    vision_models,
)
from torch import Tensor, nn
from trimmed_inputs import NaFlex, Siglip2, naflex_images, siglip2_images, tokens

from gradcache_clip import PackedPatches, PackedTokens

ROWS = 8
NUMBERS = 3
LENGTHS = 5, 1, 9, 3, 3, 7, 2, 4
AUXILIARY = 0.1

ONE: list[Grid] = [(1, 4, 4)]
TWO: list[Grid] = [(1, 2, 4), (1, 4, 2)]
# The second of two ranks has texts alone; its tower of images still has to get the gradients.
ON_ONE_RANK = [(ONE, [], 3), ([], [], 5), (TWO, [], 2), ([], [], 2)] + [([], [], 4)] * 4
# With collectives in the forward, the same modules must run in every chunk.
ON_BOTH = [(ONE, [], 3), ([], [], 5), (TWO, [], 2), ([], [], 7)] * 2

Loss = Callable[..., Tensor]
MakeLoss = Callable[[Loss, Callable[[Tensor], Tensor]], Loss]
"""From a contrastive loss of features, and a function that gathers rows of all ranks."""


@dataclass
class Pair:
    """Encoders, and the batch of all ranks."""

    encoders: list[nn.Module]
    inputs: list[Any]
    rows: Sequence[Any] = (None, None)
    auxiliary: Mapping[str, float] = field(default_factory=dict)
    loss: MakeLoss = lambda contrast, _: contrast
    draws: bool = False
    """Whether the one-shot step must draw chunk by chunk."""
    four_bits: bool = False

    def with_inputs(self, inputs: list[Any]) -> Pair:
        return replace(self, inputs=inputs)


def beside_numbers(encoder: nn.Module, inputs: Any, width: int, **options: Any) -> Pair:
    """An encoder, and a linear one whose inputs are numbers."""
    division = options.pop("rows", None)
    numbers = torch.randn(ROWS, NUMBERS)
    both = [encoder, nn.Sequential(nn.Linear(NUMBERS, width))]
    return Pair(both, [inputs, numbers], [division, None], **options)


SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2}


def word_ids(vocabulary: int = 40, length: int = 6) -> Tensor:
    return torch.randint(2, vocabulary, (ROWS, length))


def clip() -> Pair:
    from transformers import (
        CLIPTextConfig,
        CLIPTextModelWithProjection,
        CLIPVisionConfig,
        CLIPVisionModelWithProjection,
    )

    wide = {**SIZES, **HEADS, "projection_dim": 12}
    special = {"bos_token_id": None, "eos_token_id": 39}
    words = CLIPTextConfig(vocab_size=40, max_position_embeddings=8, **special, **wide)
    view = CLIPVisionConfig(image_size=8, patch_size=4, **wide)
    encoders = CLIPVisionModelWithProjection(view), CLIPTextModelWithProjection(words)
    ids = word_ids(39)
    ids[:, -1] = 39
    return Pair([*encoders], [{"pixel_values": torch.randn(ROWS, 3, 8, 8)}, {"input_ids": ids}])


def in_fp32(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        key: part[:ROWS].float() if part.is_floating_point() else part[:ROWS]
        for key, part in given.items()
    }


def siglip2() -> Pair:
    return beside_numbers(Siglip2(), in_fp32(siglip2_images()), 16)


def naflex() -> Pair:
    return beside_numbers(NaFlex(), in_fp32(naflex_images()), 16)


def vision_language(name: str, everywhere: bool) -> Pair:
    batch = vision_batch(ON_BOTH if everywhere else ON_ONE_RANK, by_frame=name == "Qwen3-VL")
    batch["pixel_values"] = batch["pixel_values"].float()
    encoder = LastToken(vision_models()[name]())
    return beside_numbers(encoder, batch, 32, rows=PackedPatches())


def qwen3_with_lora() -> Pair:
    """Checkpointed, with dropout; queries and passages share the model."""
    encoder = LastToken(with_lora(decoder(), dropout=0.3))
    sides = [{k: v[:ROWS] for k, v in tokens("left").items()} for _ in range(2)]
    return Pair([encoder, encoder], sides, draws=True)


def nf4_with_lora() -> Pair:
    """The base in four bits, as QLoRA has it; bitsandbytes computes in fp32 on a CPU."""
    import bitsandbytes

    model = decoder()
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear):
            four = bitsandbytes.nn.Linear4bit(
                layer.in_features, layer.out_features, bias=False, compute_dtype=torch.float32,
                quant_type="nf4",
            )  # fmt: skip
            four.load_state_dict(layer.state_dict())
            model.set_submodule(name, four.to("cpu"))
    encoder = LastToken(with_lora(model.requires_grad_(False)))
    given = {key: part[:ROWS] for key, part in tokens("left").items()}
    return beside_numbers(encoder, given, 16, four_bits=True)


def modern_bert() -> Pair:
    from transformers import ModernBertConfig, ModernBertModel

    special = ["pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"]
    more = {**dict.fromkeys(special, 0), "local_attention": 4, "vocab_size": 100}
    encoder = PackedModernBert(ModernBertModel(ModernBertConfig(**SIZES, **HEADS, **more)))
    return beside_numbers(encoder, packed(LENGTHS, bounds=True), 16, rows=PackedTokens())


class Routed(nn.Module):
    """Mixtral: features, how its experts are used per row, and a loss of its router's logits."""

    def __init__(self) -> None:
        from transformers import MixtralConfig, MixtralModel

        super().__init__()
        wide = {"hidden_size": 32, "num_key_value_heads": 2, "vocab_size": 40}
        self.model = MixtralModel(MixtralConfig(**{**SIZES, **wide}, **HEADS))

    def double(self) -> Routed:
        # The fused kernel for experts takes no fp64.
        self.model.config._experts_implementation = "eager"
        return super().double()

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        output = self.model(input_ids, output_router_logits=True, use_cache=False)
        logits = torch.stack(output.router_logits).unflatten(1, input_ids.shape)
        chosen = F.one_hot(logits.topk(2).indices, 8).sum(-2).to(logits)
        used = {"routed": logits.softmax(-1).mean((0, 2)), "chosen": chosen.mean((0, 2))}
        z_loss = logits.logsumexp(-1).square().mean()
        return {"embedding": output.last_hidden_state[:, -1], "z_loss": z_loss, **used}


def balanced(contrast: Loss, gather: Callable[[Tensor], Tensor]) -> Loss:
    """The contrastive loss, and the balance of experts over the whole batch."""

    def loss(x: Mapping[str, Tensor], y: Tensor) -> Tensor:
        routed, chosen = (gather(x[name]).mean(0) for name in ("routed", "chosen"))
        return contrast(x["embedding"], y) + 8 * AUXILIARY * (routed * chosen).sum()

    return loss


def mixtral() -> Pair:
    auxiliary = {"z_loss": AUXILIARY}
    return beside_numbers(
        Routed(), {"input_ids": word_ids()}, 32, auxiliary=auxiliary, loss=balanced
    )


def coca() -> Pair:
    """Images and texts are one input of open_clip's CoCa, whose captions are its own loss."""
    import open_clip

    class Captioning(open_clip.CoCa):
        def forward(self, images: Tensor, texts: Tensor) -> dict[str, Tensor]:
            out = super().forward(images, texts)
            logits, words = out["logits"].transpose(1, 2), out["labels"]
            losses = F.cross_entropy(logits, words, ignore_index=0, reduction="none")
            sums = {"caption": losses.sum(1), "words": (words != 0).sum(1)}
            return {"image": out["image_features"], "text": out["text_features"], **sums}

    sizes = {"width": 32, "heads": 2, "layers": 1, "context_length": 8, "vocab_size": 50}
    view = {"width": 64, "layers": 1, "image_size": 32, "attentional_pool": True}
    words = {**sizes, "output_tokens": True, "embed_cls": True}
    model = Captioning(32, sizes, words, {**view, "output_tokens": True})
    nn.init.normal_(model.text_decoder.text_projection, std=0.1)  # open_clip leaves it unset
    # The loss has a scale of its own, and FSDP shards no parameter without a dimension.
    scale = model.logit_scale.detach()
    del model.logit_scale
    model.register_buffer("logit_scale", scale)
    ids = torch.randint(1, 50, (ROWS, 8)) * (torch.arange(8) < torch.randint(3, 9, (ROWS, 1)))
    return Pair([model], [(torch.randn(ROWS, 3, 32, 32), ids)], [None], loss=captioned)


def captioned(contrast: Loss, gather: Callable[[Tensor], Tensor]) -> Loss:
    def loss(x: Mapping[str, Tensor]) -> Tensor:
        caption = gather(x["caption"]).sum() / gather(x["words"]).sum()
        return contrast(x["image"], x["text"]) + 2 * caption

    return loss


def clap() -> Pair:
    from transformers import (
        ClapAudioConfig,
        ClapAudioModelWithProjection,
        ClapTextConfig,
        ClapTextModelWithProjection,
    )

    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "projection_dim": 12}
    sound = {"spec_size": 64, "num_mel_bins": 16, "window_size": 4, "patch_stride": [4, 4]}
    sound |= {"patch_embeds_hidden_size": 8, "hidden_size": 16, "depths": [1, 1]}
    sound |= {"num_attention_heads": [2, 2], "enable_fusion": False, "drop_path_rate": 0.0}
    words = {**SIZES, **HEADS, "vocab_size": 40, "max_position_embeddings": 16}
    audio = ClapAudioModelWithProjection(ClapAudioConfig(**sound, **off))
    # In training its statistics would be those of a chunk.
    audio.audio_model.audio_encoder.batch_norm = FrozenBatchNorm(16).eval()
    text = ClapTextModelWithProjection(ClapTextConfig(**words, **off))
    sounds = {"input_features": torch.randn(ROWS, 1, 256, 16)}
    return Pair([audio, text], [sounds, {"input_ids": word_ids()}])


class FrozenBatchNorm(nn.BatchNorm2d):
    """Normalises by the running statistics, in training too."""

    def train(self, mode: bool = True) -> FrozenBatchNorm:
        return super().train(False)


def graphs() -> Pair:
    pyg = graph_library()
    each = [
        pyg.data.Data(x=torch.randn(n, 4), edge_index=torch.randint(n, (2, 3 * n))) for n in LENGTHS
    ]
    return beside_numbers(Molecules(pyg), pyg.data.Batch.from_data_list(each), 5)


def bags() -> Pair:
    offsets = torch.tensor([0, *LENGTHS]).cumsum(0)[:-1]
    given = {"input": torch.randint(50, (sum(LENGTHS),)), "offsets": offsets}
    return beside_numbers(nn.EmbeddingBag(50, 8, mode="sum"), given, 8, rows=PackedTokens())


ENCODERS: dict[str, Callable[[bool], Pair]] = {
    "CLIP": lambda _: clip(),
    "SigLIP 2 NaFlex": lambda _: siglip2(),
    "timm NaFlexViT": lambda _: naflex(),
    "Qwen2.5-VL, 0 to 2 images": lambda everywhere: vision_language("Qwen2.5-VL", everywhere),
    "Qwen3-VL, 0 to 2 images": lambda everywhere: vision_language("Qwen3-VL", everywhere),
    "Qwen3 + LoRA, left, dropout": lambda _: qwen3_with_lora(),
    "Qwen3 in nf4 + LoRA": lambda _: nf4_with_lora(),
    "ModernBERT, packed": lambda _: modern_bert(),
    "Mixtral, router losses": lambda _: mixtral(),
    "CoCa, caption loss": lambda _: coca(),
    "CLAP": lambda _: clap(),
    "GCN and GAT on graphs": lambda _: graphs(),
    "EmbeddingBag": lambda _: bags(),
}
"""By name; a builder is told whether every chunk must run the same modules."""
