"""Real encoders (timm, transformers) under the engine: gradients against the one-shot step."""

from __future__ import annotations

import pytest
import torch
from conftest import EACH_PARAMETER, WORST_ERROR
from one_shot import gradient_errors, one_shot, twins, worst
from torch import Tensor, nn

from gradcache_clip import ClipLoss, GradCache
from gradcache_clip.train.config_model import DualConfig
from gradcache_clip.train.towers import DualEncoder, build_towers

ROWS, CHUNK = 10, 4
LIMIT = {torch.float64: 1e-10, torch.float32: 1e-5}
IMAGES = {
    "ViT": ("vit_tiny_patch16_224", {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}),
    "ConvNeXt": ("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]}),
}


class Tower(nn.Module):
    """One tower of a dual encoder, as a module of its own."""

    def __init__(self, both: DualEncoder, tower: int) -> None:
        super().__init__()
        self.both, self.tower = both, tower

    def forward(self, *args: Tensor, **tokens: Tensor) -> Tensor:
        return self.both(self.tower, args[0] if args else tokens)


def build(image: str, dtype: torch.dtype, *, dropout: float) -> DualEncoder:
    name, arguments = IMAGES[image]
    if image == "ViT":
        arguments = {**arguments, "proj_drop_rate": dropout, "drop_path_rate": dropout}
    text = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    config = DualConfig(
        image=name,
        image_kwargs=arguments,
        text_kwargs={**text, "intermediate_size": 64},
        feature_dim=16,
    )
    sizes = {"image_size": 32, "context_length": 12, "vocab_size": 60, "pad_token_id": 0}
    return build_towers(config, **sizes).to(dtype)


def batch() -> tuple[Tensor, dict[str, Tensor]]:
    ids = torch.randint(1, 60, (ROWS, 12))
    mask = (torch.arange(12) < torch.randint(3, 13, (ROWS, 1))).long()
    images = torch.randint(256, (ROWS, 3, 32, 32), dtype=torch.uint8)
    return images, {"input_ids": ids * mask, "attention_mask": mask}


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("image", IMAGES)
def test_real_encoders(image, dtype, dropout, record_property):
    encoder, loss = build(image, dtype, dropout=dropout), ClipLoss().to(dtype)
    (encoder, loss), (true_encoder, true_loss) = twins(encoder, loss)
    inputs = batch()
    torch.manual_seed(1)
    out = GradCache(encoder, loss, chunk_size=CHUNK)(*inputs)
    torch.manual_seed(1)
    towers = [Tower(true_encoder, tower) for tower in (0, 1)]
    # Without dropout in one piece; with dropout over the same chunks, which draw the same numbers.
    expected = one_shot(towers, true_loss, inputs, CHUNK if dropout else None)
    torch.testing.assert_close(out.loss, expected.loss.detach())
    errors = gradient_errors([encoder, loss], [true_encoder, true_loss])
    # A key bias moves no softmax: its gradient is zero but for rounding, so an error relative to
    # itself means nothing.
    shown = {name: error for name, error in errors.items() if not name.endswith("key.bias")}
    name, error = worst(shown)
    dtype_name = str(dtype).removeprefix("torch.")
    record_property(EACH_PARAMETER, (dtype_name, shown))
    setting = f"{image} + BERT, {dtype_name}, dropout {dropout}, chunk {CHUNK} of {ROWS}"
    record_property(WORST_ERROR, (setting, name, error))
    assert error < LIMIT[dtype], errors
