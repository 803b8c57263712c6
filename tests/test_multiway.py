"""One Transformer for images and texts: what is shared, and gradients of both passes."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from one_shot import gradient_errors, worst
from processes import SAME_BATCHES, alone, assert_same_run, in_processes, weights
from test_distributed import LOCAL, WORLD, in_two_processes
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP
from trainer_step import assert_same_gradients

from gradcache_clip import ByLength, ClipLoss, GradCache
from gradcache_clip.distributed import DDPStrategy
from gradcache_clip.memory.planner import plan_config
from gradcache_clip.train.checkpoint import load_latest, save_checkpoint
from gradcache_clip.train.config_errors import ConfigError
from gradcache_clip.train.config_file import load_config
from gradcache_clip.train.config_model import MultiwayConfig
from gradcache_clip.train.optimizer import parameter_groups
from gradcache_clip.train.towers import DualEncoder, build_towers
from gradcache_clip.verification.compare import verify

SIZES = {"width": 16, "depth": 2, "heads": 2, "hidden": 24, "patch_size": 8}
KWARGS = "{width: 16, depth: 2, heads: 2, hidden: 24, patch_size: 8}"
MULTIWAY = ("model.architecture=multiway", f"model.multiway_kwargs={KWARGS}")
ROWS, CHUNK = 10, 4


def build(image_size: int = 16, **changes: object) -> DualEncoder:
    config = MultiwayConfig(multiway_kwargs=SIZES | changes, feature_dim=8)
    return build_towers(
        config, image_size=image_size, context_length=9, vocab_size=40, pad_token_id=0
    )


def batch(rows: int = ROWS) -> tuple[Tensor, dict[str, Tensor]]:
    mask = (torch.arange(9) < torch.randint(2, 10, (rows, 1))).long()
    ids = torch.randint(1, 40, (rows, 9)) * mask
    images = torch.randint(256, (rows, 3, 16, 16), dtype=torch.uint8)
    return images, {"input_ids": ids, "attention_mask": mask}


def backward_of(encoder: DualEncoder, loss: ClipLoss, inputs: tuple) -> Tensor:
    out = loss(*(encoder(tower, given) for tower, given in enumerate(inputs))).loss
    out.backward()
    return out.detach()


def test_attention_is_shared_and_experts_are_not():
    encoder = build()
    images, texts = encoder.image_tower.backbone, encoder.text_tower.backbone
    assert images.transformer is texts.transformer
    for tower, given in enumerate(batch()):
        encoder.zero_grad()
        encoder(tower, given).square().sum().backward()
        for block in images.transformer.blocks:
            assert block.qkv.weight.grad.abs().sum() > 0 < block.out.weight.grad.abs().sum()
            own, other = block.experts[tower], block.experts[1 - tower]
            assert all(p.grad is not None and p.grad.any() for p in own.parameters())
            assert all(p.grad is None for p in other.parameters())


def test_every_parameter_learns_from_a_pair():
    encoder, loss = build(), ClipLoss()
    backward_of(encoder, loss, batch())
    assert [name for name, p in encoder.named_parameters() if p.grad is None] == []


def test_one_block_has_the_size_that_the_paper_gives():
    """Table 2: 1.9 billion parameters, 317 million of them in the shared attention of 40 layers,
    and 692 million in the vision experts."""
    with torch.device("meta"):
        encoder = build(width=1408, depth=40, heads=16, hidden=6144, patch_size=8)
    blocks = encoder.image_tower.backbone.transformer.blocks
    attention = sum(p.numel() for b in blocks for m in (b.qkv, b.out) for p in m.parameters())
    vision = sum(p.numel() for block in blocks for p in block.experts[0].mlp.parameters())
    assert round(attention / 1e6) == 317
    assert round(vision / 1e6) in range(690, 696)


def test_padding_does_not_change_a_feature():
    encoder, (_, texts) = build().double().eval(), batch()
    features = encoder.encode_text(texts)
    for row, length in enumerate(texts["attention_mask"].sum(1).tolist()):
        alone_ = {name: tensor[row : row + 1, :length] for name, tensor in texts.items()}
        torch.testing.assert_close(encoder.encode_text(alone_), features[row : row + 1])


def test_values_and_experts_start_larger_in_deeper_transformers():
    for depth in (2, 24):
        transformer = build(width=64, hidden=96, depth=depth).image_tower.backbone.transformer
        block, gain = transformer.blocks[0], math.sqrt(math.log(2 * depth))
        q, k, v = block.qkv.weight.detach().chunk(3)
        for weight, expected in ((q, 1), (k, 1), (v, gain), (block.out.weight, gain)):
            assert weight.std().item() == pytest.approx(expected * 64**-0.5, rel=0.1)
        fc1 = block.experts[1].mlp.fc1.weight
        assert fc1.std().item() == pytest.approx(gain * (2 / (64 + 96)) ** 0.5, rel=0.1)


@pytest.mark.parametrize("drop_path", [0.0, 0.4])
@pytest.mark.parametrize("sort", [None, (None, ByLength())], ids=["as they come", "sorted"])
def test_cached_gradients_are_exact(drop_path, sort):
    encoder, loss = build(drop_path=drop_path).double(), ClipLoss().double()
    if sort and drop_path:
        encoder.eval()
    truth, inputs = copy.deepcopy([encoder, loss]), batch()
    torch.manual_seed(1)
    GradCache(encoder, loss, chunk_size=CHUNK, sort_by_length=sort)(*inputs)
    torch.manual_seed(1)
    features = [_in_chunks(truth[0], tower, given) for tower, given in enumerate(inputs)]
    truth[1](*features).loss.backward()
    assert_same_gradients([encoder, loss], truth)


def _in_chunks(encoder: DualEncoder, tower: int, given: Tensor | dict[str, Tensor]) -> Tensor:
    """Over the same chunks, which draw the same numbers."""

    def part(start: int) -> Tensor | dict[str, Tensor]:
        rows = slice(start, start + CHUNK)
        if isinstance(given, Tensor):
            return given[rows]
        return {name: tensor[rows] for name, tensor in given.items()}

    return torch.cat([encoder(tower, part(start)) for start in range(0, ROWS, CHUNK)])


def test_verify_agrees():
    report = verify(GradCache(build().double(), ClipLoss().double()), *batch())
    assert report.exact and report.reasons == []


def test_a_checkpoint_keeps_shared_weights_once(tmp_path):
    encoder = build()
    save_checkpoint(tmp_path, 1, modules={"encoder": encoder.state_dict()}, state={})
    stored = load_latest(tmp_path).modules["encoder"]
    assert stored.keys() == encoder.state_dict().keys()
    (file,) = tmp_path.rglob("encoder.safetensors")
    needed = sum(p.numel() * 4 for p in encoder.parameters())
    assert file.stat().st_size < 1.2 * needed + 20_000
    torch.manual_seed(5)
    other = build()
    other.load_state_dict(stored)
    inputs = batch()
    for tower, given in enumerate(inputs):
        assert torch.equal(other.eval()(tower, given), encoder.eval()(tower, given))


def test_tables_and_class_token_do_not_decay():
    encoder = build()
    names = {id(p): name for name, p in encoder.named_parameters()}
    rest, decay = ({names[id(p)] for p in group["params"]} for group in parameter_groups(encoder))
    kept = {name for name in rest if dict(encoder.named_parameters())[name].ndim > 1}
    assert {name.rsplit("backbone.")[1] for name in kept} == {
        "cls_token", "pos_embed", "embedding.weight",
    }  # fmt: skip
    assert any("experts.0.mlp.fc1.weight" in name for name in decay)


def test_a_plan_counts_shared_weights_once():
    config = load_config(None, [*MULTIWAY, "data.image_size=16", "model.feature_dim=8"])
    found = plan_config(config, "24GB")
    sizes = {"image_size": 16, "context_length": 32, "vocab_size": 8192, "pad_token_id": 0}
    encoder = build_towers(config.model, **sizes)
    assert found.trained_parameters == sum(p.numel() for p in encoder.parameters())
    assert (found.image, found.text) == ("multiway", "multiway") and found.fits


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ("dpeth=3", "multiway_kwargs.dpeth: no such key; did you mean .*depth"),
        ("heads=3", "multiway_kwargs.width: expected a multiple of 3, the number of heads"),
        ("depth=0", "multiway_kwargs.depth: expected at least 1, got 0"),
        ("width=16.5", "multiway_kwargs.width: expected an integer, got 16.5"),
        ("hidden=true", "multiway_kwargs.hidden: expected an integer, got True"),
        ("drop_path=1", "multiway_kwargs.drop_path: expected less than 1, got 1"),
        ("drop_path=x", "multiway_kwargs.drop_path: expected a number, got 'x'"),
    ],
)
def test_unfit_sizes_are_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        load_config(None, [*MULTIWAY, f"model.multiway_kwargs.{changes}"])


def test_patches_divide_the_image():
    expected = "multiway_kwargs.patch_size: expected a divisor of data.image_size, which is 16, got"
    with pytest.raises(ConfigError, match=expected):
        build(patch_size=7)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["model.architecture=triple"], "architecture: expected one of dual, multiway, got"),
        (["model.multiway_kwargs.depth=3"], "multiway_kwargs: no such key with .*the default"),
        ([*MULTIWAY, "model.freeze=image"], "model.freeze: no such key with .*=multiway"),
        ([*MULTIWAY, "model.image_pool=mean"], "model.image_pool: no such key with .*=multiway"),
        ([*MULTIWAY, "model.text_pretrained=true", "data.tokenizer=x"], "model.text_pretrained: "),
    ],
)
def test_mistakes_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        load_config(None, settings)


def two_ranks(rank: int) -> None:
    torch.manual_seed(3)
    encoder, loss = build().double(), ClipLoss().double()
    truth, inputs = copy.deepcopy([encoder, loss]), batch(WORLD * LOCAL)
    mine = slice(rank * LOCAL, (rank + 1) * LOCAL)
    images, texts = inputs[0][mine], {name: tensor[mine] for name, tensor in inputs[1].items()}
    truth[1].group = torch.distributed.new_group([rank], use_local_synchronization=True)
    cache = GradCache(DDP(encoder), loss, chunk_size=CHUNK, strategy=DDPStrategy())
    for _ in range(2):
        nn.ModuleList([encoder, loss, *truth]).zero_grad()
        out = cache(images, texts)
        torch.testing.assert_close(out.loss, backward_of(*truth, inputs), rtol=1e-12, atol=0)
        assert_same_gradients([encoder, loss], truth)
    assert worst(gradient_errors([loss], [truth[1]]))[1] < 1e-10


@pytest.mark.distributed
def test_two_ranks_have_the_gradients_of_one():
    in_two_processes(two_ranks)


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ["fsdp", pytest.param("ddp", marks=pytest.mark.slow)])
def test_a_run_in_two_processes(data, tmp_path, engine):
    more = (*MULTIWAY, "train.steps=3")
    one = alone(data, tmp_path / "one", *more)
    settings = [*SAME_BATCHES, *more, f"distributed.strategy={engine}"]
    assert in_processes(2, data, tmp_path / "two", *settings) == ["finished"] * 2
    assert_same_run(tmp_path / "two", one)
    assert any("experts" in name for name in weights(one))
