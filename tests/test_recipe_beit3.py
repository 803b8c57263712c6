"""recipes/beit3.yaml: the Multiway Transformer and its contrastive objective, as in BEiT-3."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from recipe_runs import assert_trains_and_resumes, recipe, shortened
from torch import Tensor, nn
from trainer_step import assert_step_equals, trainer_of, unit

from gradcache_clip.train.config_file import load_config
from gradcache_clip.train.multiway import MultiwayBlock, MultiwayImages, MultiwayTexts


def norm(x: Tensor, layer: nn.LayerNorm) -> Tensor:
    """Ba et al. 2016, with a gain and a bias."""
    centred = x - x.mean(-1, keepdim=True)
    deviation = (centred.square().mean(-1, keepdim=True) + layer.eps).sqrt()
    return centred / deviation * layer.weight + layer.bias


def attention(x: Tensor, block: MultiwayBlock, seen: Tensor) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V of each head, side by side; the weights know no modality."""
    q, k, v = (
        F.linear(x, weight, bias)
        for weight, bias in zip(block.qkv.weight.chunk(3), block.qkv.bias.chunk(3), strict=True)
    )
    heads = []
    for Q, K, V in zip(*(t.chunk(block.heads, -1) for t in (q, k, v)), strict=True):
        logits = Q @ K.transpose(1, 2) / math.sqrt(Q.shape[-1])
        heads.append(logits.masked_fill(~seen[:, None, :], -torch.inf).softmax(-1) @ V)
    return torch.cat(heads, -1)


def multiway(x: Tensor, backbone: MultiwayImages | MultiwayTexts, tower: int, seen: Tensor):
    """Section 2.1: shared self-attention, then the expert of the modality; Sub-LN of Magneto."""
    for block in backbone.transformer.blocks:
        own = block.experts[tower]
        heads = norm(attention(norm(x, own.attention_norm), block, seen), own.heads_norm)
        x = x + F.linear(heads, block.out.weight, block.out.bias)
        inner = F.gelu(F.linear(norm(x, own.mlp_norm), own.mlp.fc1.weight, own.mlp.fc1.bias))
        x = x + F.linear(norm(inner, own.mlp.norm), own.mlp.fc2.weight, own.mlp.fc2.bias)
    return norm(x, backbone.transformer.norms[tower])[:, 0]


def image_features(encoder: nn.Module, pixels: Tensor) -> Tensor:
    """Patches of an image in rows, from the left, each flattened and projected; [CLS] first."""
    backbone, images = encoder.image_tower.backbone, (pixels.double() / 255 - 0.5) / 0.5
    size, weight = backbone.patches.patch_size[0], backbone.patches.proj.weight
    cut = images.unfold(2, size, size).unfold(3, size, size)  # (B, 3, H / size, W / size, ...)
    flat = cut.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    patches = F.linear(flat, weight.flatten(1), backbone.patches.proj.bias)
    x = torch.cat([backbone.cls_token.expand(len(images), -1, -1), patches], 1) + backbone.pos_embed
    everything = torch.ones(x.shape[:2], dtype=torch.bool)
    return multiway(x, backbone, 0, everything) @ encoder.image_projection.weight.T


def text_features(encoder: nn.Module, tokens: dict[str, Tensor]) -> Tensor:
    backbone, ids = encoder.text_tower.backbone, tokens["input_ids"]
    x = F.embedding(ids, backbone.embedding.weight, padding_idx=0)
    x = x + backbone.pos_embed[:, : ids.shape[1]]
    hidden = multiway(x, backbone, 1, tokens["attention_mask"].bool())
    return hidden @ encoder.text_projection.weight.T


def test_features_and_objective_are_those_of_the_paper(data, tmp_path):
    trainer = trainer_of(recipe("beit3"), shortened(data, tmp_path / "run"), tmp_path / "run")
    encoder, loss = trainer.encoder, trainer.loss
    batch = next(iter(trainer.batches()))
    (images, tokens), _ = trainer.inputs_of(batch)
    vectors = image_features(encoder, images), text_features(encoder, tokens)
    for tower, expected in enumerate(vectors):
        found = encoder(tower, (images, tokens)[tower])
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    I, T = (unit(each) for each in vectors)
    S, own = loss.log_logit_scale.exp() * I @ T.T, torch.arange(len(I))
    expected = (F.cross_entropy(S, own) + F.cross_entropy(S.T, own)) / 2
    torch.testing.assert_close(loss(*vectors).loss, expected, rtol=1e-10, atol=0)


def test_the_step_is_that_of_the_whole_batch(data, tmp_path):
    trainer = trainer_of(recipe("beit3"), shortened(data, tmp_path / "run"), tmp_path / "run")

    def formula(images: Tensor, texts: Tensor, loss: nn.Module, groups: list[str]) -> Tensor:
        S = loss.log_logit_scale.exp() * unit(images) @ unit(texts).T
        return -(S.log_softmax(1).diagonal() + S.log_softmax(0).diagonal()).mean() / 2

    assert_step_equals(trainer, formula)


def test_a_short_run_resumes_exactly(data, tmp_path):
    summary = assert_trains_and_resumes("beit3", data, tmp_path)
    assert 0 <= summary.metrics["image_to_text_recall_at_1"] <= 1


def test_the_recipe_says_what_it_trains():
    config = load_config(recipe("beit3"))
    assert (config.model.architecture, config.loss.name) == ("multiway", "clip")
    assert config.train.batch_size == 1024 and config.train.grad_cache
