"""AdamW's groups, the learning rate, and the moving average."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from gradcache_clip.train.config import OptimizerConfig
from gradcache_clip.train.config_model import DualConfig
from gradcache_clip.train.ema import moving_average, update_average
from gradcache_clip.train.optimizer import build_optimizer, learning_rate_at
from gradcache_clip.train.towers import build_towers

CONFIG = OptimizerConfig(
    learning_rate=0.1, weight_decay=0.5, beta1=0.8, beta2=0.9, eps=1e-5, warmup_steps=4
)


def names_of(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, set[str]]:
    name_of = {id(parameter): name for name, parameter in module.named_parameters()}
    return {
        "decay" if group["weight_decay"] else "no_decay": {name_of[id(p)] for p in group["params"]}
        for group in optimizer.param_groups
    }


def test_groups_of_real_towers() -> None:
    model = DualConfig(
        image="vit_tiny_patch16_224",
        image_kwargs={"depth": 1, "embed_dim": 16, "num_heads": 2},
        text_kwargs={"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
    )
    encoder = build_towers(model, image_size=32, context_length=8, vocab_size=300, pad_token_id=0)
    encoder.register_parameter("log_logit_scale", nn.Parameter(torch.tensor(2.0)))
    names = names_of(build_optimizer(CONFIG, encoder), encoder)
    assert names["decay"] | names["no_decay"] == {name for name, _ in encoder.named_parameters()}
    assert not names["decay"] & names["no_decay"]
    text = "text_tower.backbone.embeddings."
    assert names["no_decay"] >= {
        "log_logit_scale",
        "image_tower.backbone.cls_token",
        "image_tower.backbone.pos_embed",
        "image_tower.backbone.norm.weight",
        "image_tower.backbone.blocks.0.attn.qkv.bias",
        text + "word_embeddings.weight",
        text + "position_embeddings.weight",
        text + "token_type_embeddings.weight",
        text + "LayerNorm.weight",
    }
    assert names["decay"] >= {
        "image_projection.weight",
        "text_projection.weight",
        "image_tower.backbone.patch_embed.proj.weight",
        "image_tower.backbone.blocks.0.attn.qkv.weight",
        "text_tower.backbone.encoder.layer.0.intermediate.dense.weight",
    }
    vectors = {n for n, p in encoder.named_parameters() if p.ndim < 2}
    assert vectors <= names["no_decay"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("wte.weight", False),
        ("embeddings.tok_embeddings.weight", False),
        ("layers.0.attn.relative_position_bias_table", False),
        ("embed_tokens.weight", False),
        ("patch_embed.proj.weight", True),
        ("patch_embeddings.projection.weight", True),
        ("embedding_head.weight", True),
    ],
)
def test_tables_are_known_by_name(name: str, expected: bool) -> None:
    *places, last = name.split(".")
    module = outer = nn.Module()
    for place in places:
        module.add_module(place, nn.Module())
        module = module.get_submodule(place)
    module.register_parameter(last, nn.Parameter(torch.zeros(2, 2)))
    [group] = build_optimizer(CONFIG, outer).param_groups
    assert group["weight_decay"] == (CONFIG.weight_decay if expected else 0)


def test_tied_once_and_frozen_never() -> None:
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    second.bias.requires_grad_(False)
    groups = build_optimizer(CONFIG, first, second).param_groups
    held = [id(p) for group in groups for p in group["params"]]
    assert held == [id(first.bias), id(first.weight)]


def test_one_step_is_adamw_by_hand() -> None:
    layer = nn.Linear(2, 2).double()
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    optimizer = build_optimizer(CONFIG, layer)
    layer.weight.grad, layer.bias.grad = torch.full_like(weight, 3.0), torch.full_like(bias, -2.0)
    optimizer.step()
    # In the first step the bias corrections leave the gradient over its own size.
    move = 0.1 * 3.0 / (3.0 + 1e-5)
    torch.testing.assert_close(layer.weight.detach(), weight * (1 - 0.1 * 0.5) - move)
    torch.testing.assert_close(layer.bias.detach(), bias + 0.1 * 2.0 / (2.0 + 1e-5))


def test_fused_only_where_it_runs() -> None:
    assert build_optimizer(CONFIG, nn.Linear(2, 2)).defaults["fused"]
    meta = nn.Linear(2, 2, device="meta")
    assert not build_optimizer(CONFIG, meta).defaults["fused"]


def test_schedule_values() -> None:
    rates = [learning_rate_at(step, CONFIG, 12) for step in range(13)]
    assert rates[:5] == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1])
    assert rates[8] == pytest.approx(0.05)
    assert rates[12] == pytest.approx(0.0)
    assert all(a >= b for a, b in pairwise(rates[3:]))
    assert learning_rate_at(0, OptimizerConfig(learning_rate=1.0, warmup_steps=0), 5) == 1.0


def wandering_model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).double()


def wander(model: nn.Module) -> None:
    model(torch.randn(5, 3, dtype=torch.float64))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))


def test_ema_is_exact() -> None:
    model = wandering_model()
    average = moving_average(model, 0.3)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    for update in range(1, 6):
        wander(model)
        update_average(average, model, update)
        decay = min(0.3, (1 + update) / (10 + update))
        for name, value in model.state_dict().items():
            mixed = decay * expected[name] + (1 - decay) * value
            expected[name] = mixed if value.is_floating_point() else value.clone()
    for name, value in average.module.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-12)


def test_ema_keeps_its_precision_when_the_model_is_halved() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    average = moving_average(model, 0.5)
    nn.init.constant_(model.bfloat16().weight, 1.0078125)
    update_average(average, model, 1)
    assert average.module.weight.dtype == torch.float32
    assert 1.0 < average.module.weight.item() < 1.0078125
