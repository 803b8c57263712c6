"""One model with a method for each input is one encoder."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from strategy_processes import result_of, run_cases
from strategy_steps import PlainClip, full
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP

from gradcache_clip import ClipLoss, GradCache, methods, verify
from gradcache_clip.distributed import AllReduceStrategy, DDPStrategy, FSDPStrategy

HF = ("get_image_features", "get_text_features")
OPEN_CLIP = ("encode_image", "encode_text")
ROWS, CHUNK = 12, 5
_LAYERS = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
_TEXT = {**_LAYERS, "vocab_size": 50, "max_position_embeddings": 8, "eos_token_id": 2}
_IMAGE = {**_LAYERS, "image_size": 8, "patch_size": 4}


def clip_model() -> nn.Module:
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    config = CLIPConfig(text_config=_TEXT, vision_config=_IMAGE, projection_dim=8)
    return CLIPModel(config).double()


def siglip_model() -> nn.Module:
    from transformers import SiglipConfig, SiglipModel

    torch.manual_seed(0)
    text = {**_TEXT, "projection_size": 16}
    return SiglipModel(SiglipConfig(text_config=text, vision_config=_IMAGE)).double()


def siglip2_model() -> nn.Module:
    from transformers import Siglip2Config, Siglip2Model

    torch.manual_seed(0)
    text, vision = {**_TEXT, "projection_size": 16}, {**_LAYERS, "patch_size": 4, "num_patches": 9}
    return Siglip2Model(Siglip2Config(text_config=text, vision_config=vision)).double()


def open_clip_model() -> nn.Module:
    import open_clip

    torch.manual_seed(0)
    vision = {"layers": 1, "width": 64, "image_size": 8, "patch_size": 4}
    text = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}
    return open_clip.CLIP(8, vision_cfg=vision, text_cfg=text).double()


def pixels() -> Tensor:
    return torch.randn(ROWS, 3, 8, 8, generator=_generator(), dtype=torch.float64)


def tokens() -> Tensor:
    return torch.randint(3, 50, (ROWS, 8), generator=_generator())


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def batch(model: nn.Module) -> tuple[Any, Any]:
    text = {"input_ids": tokens(), "attention_mask": torch.ones(ROWS, 8).long()}
    if hasattr(model, "encode_image"):
        return pixels(), tokens()
    if type(model).__name__ == "Siglip2Model":
        shapes = torch.tensor([[2, 2]]).expand(ROWS, 2)
        patches = pixels().reshape(ROWS, 4, 48)
        mask = torch.ones(ROWS, 4)
        given = {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": shapes}
        return given, text
    return {"pixel_values": pixels()}, text


def plain_loss(model: nn.Module, names: tuple[str, str], inputs: tuple[Any, Any]) -> Tensor:
    features = [
        getattr(model, name)(**x) if isinstance(x, dict) else getattr(model, name)(x)
        for name, x in zip(names, inputs, strict=True)
    ]
    pooled = [x if isinstance(x, Tensor) else x.pooler_output for x in features]
    return PlainClip().double()(*pooled)


MODELS = {
    "CLIPModel": (clip_model, HF),
    "SiglipModel": (siglip_model, HF),
    "Siglip2Model": (siglip2_model, HF),
    "open_clip.CLIP": (open_clip_model, OPEN_CLIP),
}


def checkpointed(model: nn.Module) -> None:
    # Its name since transformers 5.
    older = model.gradient_checkpointing_enable
    getattr(model, "activation_checkpointing_enable", older)({"use_reentrant": False})


def largest_error(model: nn.Module, truth: nn.Module) -> float:
    """Relative to each gradient, or to all: that of a key's bias is zero but for rounding."""
    pairs = zip(model.parameters(), truth.parameters(), strict=True)
    gradients = [(full(ours.grad), theirs.grad) for ours, theirs in pairs]
    assert all((got is None) == (expected is None) for got, expected in gradients)
    given = [(got, expected) for got, expected in gradients if got is not None]
    whole = nn.utils.get_total_norm([expected for _, expected in given])
    return max(
        float((got - expected).norm() / expected.norm().clamp_min(1e-6 * whole))
        for got, expected in given
    )


@pytest.mark.parametrize(("build", "names"), MODELS.values(), ids=MODELS)
def test_one_model_is_exact(build: Callable[[], nn.Module], names: tuple[str, str]):
    model = build()
    truth, inputs = copy.deepcopy(model), batch(model)
    encoder = methods(model, *names)
    out = GradCache(encoder, ClipLoss().double(), chunk_size=CHUNK)(*inputs)
    expected = plain_loss(truth, names, inputs)
    expected.backward()
    assert abs(out.loss - expected) < 1e-12
    # It resizes its position embedding in 32 bits.
    assert largest_error(model, truth) < (1e-6 if build is siglip2_model else 1e-10)
    assert {id(p) for p in encoder.parameters()} == {id(p) for p in model.parameters()}


def test_gradient_checkpointing_and_verify():
    model = clip_model()
    checkpointed(model)
    cache = GradCache(methods(model.train(), *HF), ClipLoss().double(), chunk_size=CHUNK)
    assert verify(cache, *batch(model)).exact


@pytest.mark.parametrize(("build", "names"), MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("given", ["bare", "twice", "bound"])
def test_the_model_itself_is_refused_with_the_remedy(build: Any, names: Any, given: str):
    model = build()
    bound = [getattr(model, name) for name in names]
    encoders = {"bare": model, "twice": (model, model), "bound": bound}[given]
    remedy = (
        "methods.model, ..."
        if given == "bound"
        else f'pass methods.model, "{names[0]}", "{names[1]}"'
    )
    with pytest.raises((ValueError, TypeError), match=f"^encoders: expected.*{remedy}"):
        GradCache(encoders, ClipLoss())


def test_wrong_use():
    model = clip_model()
    with pytest.raises(
        ValueError, match=r"methods of CLIPModel, got 'get_audio'; it has get_image"
    ):
        methods(model, "get_audio")
    with pytest.raises(ValueError, match="got 'none'"):
        methods(model)
    with pytest.raises(TypeError, match="expected a torch.nn.Module and names"):
        methods("CLIPModel", *HF)
    with pytest.raises(ValueError, match="inputs: expected 2, one for each of get_image_features"):
        GradCache(methods(model, *HF), ClipLoss())(*batch(model), batch(model)[1])


# Several processes


def sharded(encoder: nn.Module) -> nn.Module:
    for layer in [m for m in encoder.modules() if type(m).__name__ == "CLIPEncoderLayer"]:
        fully_shard(layer)
    return fully_shard(encoder)


WRAPS = {
    "AllReduce": (lambda encoder: encoder, AllReduceStrategy),
    "DDP": (DDP, DDPStrategy),
    "FSDP": (sharded, FSDPStrategy),
}


def over_ranks(kind: str) -> dict[str, Any]:
    wrap, strategy = WRAPS[kind]
    model = clip_model()
    # FSDP takes no parameter without a dimension.
    model.logit_scale = nn.Parameter(model.logit_scale.detach()[None])
    truth, inputs = copy.deepcopy(model), batch(model)
    checkpointed(model)
    mine = ROWS // dist.get_world_size()
    rows = slice(dist.get_rank() * mine, (dist.get_rank() + 1) * mine)
    local = [{name: x[rows] for name, x in given.items()} for given in inputs]
    cache = GradCache(
        wrap(methods(model.train(), *HF)),
        ClipLoss().double(),
        chunk_size=CHUNK,
        strategy=strategy(),
    )
    cache(*local)
    plain_loss(truth.train(), HF, inputs).backward()
    return {"error": largest_error(model, truth)}


def wrapped_inside() -> dict[str, Any]:
    with pytest.raises(ValueError, match=r"got one in DistributedDataParallel.*wrap what methods"):
        methods(DDP(clip_model()), "forward")
    model = clip_model()
    model.logit_scale = None
    encoder = methods(model, *HF)
    fully_shard(model)
    fully_shard(encoder)
    cache = GradCache(encoder, ClipLoss(), chunk_size=CHUNK, strategy=FSDPStrategy())
    with pytest.raises(ValueError, match="got one in FSDPModule"):
        cache(*batch(model))
    return {}


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    from functools import partial

    cases = {kind: partial(over_ranks, kind) for kind in WRAPS}
    folder: Path = tmp_path_factory.mktemp("methods")
    return run_cases({**cases, "wrapped inside": wrapped_inside}, 2, folder)


@pytest.mark.parametrize("kind", WRAPS)
def test_over_two_processes(processes: dict[str, Any], kind: str):
    assert result_of(processes, kind)["error"] < 1e-10


def test_wrappers_go_around(processes: dict[str, Any]):
    assert result_of(processes, "wrapped inside") == {}
