"""Towers and tokenizer: shapes, pooling, gradients, names, and captions to ids and back."""

from __future__ import annotations

import pickle
import random
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gradcache_clip.train.config_model import DualConfig
from gradcache_clip.train.probe import check_towers
from gradcache_clip.train.tokenizer import CLS, PAD, SEP, Tokenizer, load_tokenizer, train_tokenizer
from gradcache_clip.train.towers import DualEncoder, build_towers

TINY_TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}
TINY_VIT = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
TINY = DualConfig(
    image="vit_tiny_patch16_224",
    image_kwargs=TINY_VIT,
    text="bert",
    text_kwargs=TINY_TEXT,
    feature_dim=16,
)
CAPTIONS = [
    "grinning face",
    "flag: Åland Islands",
    "woman\u2019s boot",
    "man running: dark skin tone",
]


def build(config: DualConfig = TINY, **changes: object) -> DualEncoder:
    return build_towers(
        config.model_copy(update=changes),
        image_size=32,
        context_length=12,
        vocab_size=300,
        pad_token_id=0,
    )


def images(rows: int = 3) -> Tensor:
    return torch.randint(0, 256, (rows, 3, 32, 32), dtype=torch.uint8)


def tokens(rows: int = 3, length: int = 7, padding: int = 0) -> dict[str, Tensor]:
    ids = torch.randint(1, 300, (rows, length))
    mask = torch.ones_like(ids)
    pad = torch.zeros(rows, padding, dtype=torch.long)
    return {"input_ids": torch.cat([ids, pad], 1), "attention_mask": torch.cat([mask, pad], 1)}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(CAPTIONS * 3, vocab_size=400, context_length=10)


def test_features_have_the_asked_width() -> None:
    encoder = build()
    assert encoder.training
    assert encoder(0, images()).shape == (3, 16)
    assert encoder(1, tokens()).shape == (3, 16)
    assert torch.equal(encoder.eval()(0, x := images()), encoder.encode_image(x))
    assert encoder.tower_names == ("image", "text")
    # Unit length is the loss's business.
    assert not torch.allclose(encoder(1, tokens()).norm(dim=1), torch.ones(3), atol=1e-3)


def test_bytes_are_normalised_and_floats_are_left_alone() -> None:
    encoder = build(image="resnet10t", image_kwargs={}).eval()
    pixels = images()
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
    expected = encoder(0, (pixels.float() / 255 - mean) / std)
    torch.testing.assert_close(encoder(0, pixels), expected)


@pytest.mark.parametrize("pool", ["cls", "mean", "default"])
@pytest.mark.parametrize("text", ["bert", "roberta", "modernbert"])
def test_every_parameter_gets_a_gradient(pool: str, text: str) -> None:
    encoder = build(image_pool=pool, text=text, text_pool="cls" if pool == "cls" else "mean")
    (encoder(0, images()).square().sum() + encoder(1, tokens()).square().sum()).backward()
    idle = [name for name, p in encoder.named_parameters() if p.grad is None or not p.grad.any()]
    # Exactly without effect: a constant added to every key leaves the softmax as it is.
    assert [name for name in idle if "key.bias" not in name] == []


@pytest.mark.parametrize("name", ["convnext_atto", "swin_tiny_patch4_window7_224", "mixer_s16_224"])
def test_other_image_towers(name: str) -> None:
    kwargs = {"convnext_atto": {"depths": [1, 1, 1, 1]}}.get(name, {})
    encoder = build(image=name, image_kwargs=kwargs, image_pool="mean")
    assert encoder(0, images(2)).shape == (2, 16)


def test_image_pooling_by_hand() -> None:
    pixels = images()
    for pool in ("cls", "mean"):
        encoder = build(image_pool=pool).eval()
        backbone = encoder.image_tower.backbone
        hidden = backbone.forward_features((pixels.float() / 255 - 0.5) / 0.5)  # (B, 1 + N, C)
        pooled = hidden[:, 0] if pool == "cls" else backbone.fc_norm(hidden[:, 1:].mean(1))
        torch.testing.assert_close(encoder(0, pixels), encoder.image_projection(pooled))


def test_text_pooling_by_hand() -> None:
    texts = tokens(padding=2)
    texts["attention_mask"][1, 3:] = 0
    for pool in ("cls", "mean"):
        encoder = build(text_pool=pool).eval()
        hidden = encoder.text_tower.backbone(**texts).last_hidden_state
        rows = [
            h[0] if pool == "cls" else h[: int(kept)].mean(0)
            for h, kept in zip(hidden, texts["attention_mask"].sum(1), strict=True)
        ]
        torch.testing.assert_close(encoder(1, texts), encoder.text_projection(torch.stack(rows)))


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_padding_does_not_change_a_feature(pool: str) -> None:
    encoder = build(text_pool=pool).eval()
    torch.manual_seed(1)
    short = tokens()
    torch.manual_seed(1)
    padded = tokens(padding=5)
    padded["input_ids"][:, 7:] = 123
    torch.testing.assert_close(encoder(1, padded), encoder(1, short))


def test_the_first_token_sees_the_others() -> None:
    encoder = build(text_pool="cls").eval()
    texts = tokens(1)
    before = encoder(1, texts)
    texts["input_ids"][0, -1] += 1
    assert not torch.allclose(encoder(1, texts), before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": "vit_tinny_patch16_224"}, "model.image: .*'vit_tiny_patch16_224'"),
        ({"text": "brt"}, "model.text: .*'bert'"),
        ({"text_kwargs": {"hiden_size": 32}}, "model.text_kwargs: .*'hiden_size'.*'hidden_size'"),
        ({"image_kwargs": {"dept": 2}}, "model.image: .*dept"),
        ({"image": "resnet10t", "image_kwargs": {}, "image_pool": "cls"}, "image_pool"),
        ({"text": "t5", "text_kwargs": {}}, "model.text: expected a text encoder"),
        ({"text": "vit", "text_kwargs": {}}, "model.text: expected a text encoder"),
        ({"text": "gpt2", "text_kwargs": {"n_layer": 1}}, "model.text_pool=mean"),
        ({"text_kwargs": TINY_TEXT | {"max_position_embeddings": 8}}, "context_length=8"),
        ({"text_kwargs": TINY_TEXT | {"vocab_size": 200}}, "data.tokenizer: .* 200 .* 300"),
        ({"text": "no/such/folder", "text_pretrained": True}, "model.text: .*no/such/folder"),
        ({"text": "xlnet", "text_kwargs": {}}, "model.text: .*'xlnet' .*; .*model.text=bert"),
        ({"text": "funnel", "text_kwargs": {}}, "model.text: .*'funnel' .*; .*model.text=bert"),
        ({"image": "resnet10t", "image_kwargs": {"global_pool": "x"}}, "model.image: .*'x'"),
        (
            {"image": "davit_large", "image_pretrained": True},
            "model.image_pretrained: .*davit_large",
        ),
    ],
)
def test_bad_models_are_named(
    changes: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=message):
        build(**changes)


@pytest.mark.parametrize(
    "error", [LocalEntryNotFoundError("not here\nat all"), OSError("no route")]
)
def test_pretrained_weights_that_cannot_be_fetched(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(timm, "create_model", fail)
    reason = str(error).splitlines()[0]
    message = f"model.image_pretrained: expected the weights of 'resnet10t' .*'{reason}'; check the"
    with pytest.raises(ValueError, match=message) as caught:
        build(image="resnet10t", image_kwargs={}, image_pretrained=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "image_size", "message"),
    [
        ({"image": "convnext_atto", "image_kwargs": {}}, 8, "model.image: .*image_size=8, .*atto"),
        ({"image_kwargs": TINY_VIT | {"patch_size": 16}}, 8, "model.image: .*data.image_size=8"),
        (
            {
                "text": "clip_text_model",
                "text_kwargs": {"num_hidden_layers": 1},
                "text_pool": "mean",
            },
            32,
            "model.text: .*context_length=12 .*'clip_text_model'.*; pass e.g. model.text=bert",
        ),
    ],
)
def test_towers_that_cannot_work_are_found(
    changes: dict[str, object], image_size: int, message: str
) -> None:
    encoder = build_towers(
        TINY.model_copy(update=changes),
        image_size=image_size,
        context_length=12,
        vocab_size=300,
        pad_token_id=0,
    )
    with pytest.raises(ValueError, match=message) as caught:
        check_towers(encoder, image_size=image_size, tokens=tokens(2, 12))
    assert "\n" not in str(caught.value)


def test_features_that_are_no_numbers_are_found() -> None:
    encoder = build()
    torch.nn.init.constant_(encoder.text_projection.weight, torch.nan)
    with pytest.raises(ValueError, match=r"model.text: .*'bert', whose features are NaN"):
        check_towers(encoder, image_size=32, tokens=tokens(2))


def test_the_probe_leaves_no_trace() -> None:
    """Statistics of batch norm, modes, gradients and random numbers are as if it had not run."""
    encoder = build(image="resnet10t", image_kwargs={})
    encoder.image_tower.backbone.bn1.eval()
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    modes, texts = [module.training for module in encoder.modules()], tokens(2, 12)
    drawn = torch.get_rng_state()
    check_towers(encoder, image_size=32, tokens=texts)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert [module.training for module in encoder.modules()] == modes
    assert all(torch.equal(encoder.state_dict()[name], old) for name, old in before.items())
    assert all(parameter.grad is None for parameter in encoder.parameters())


def test_too_little_memory_is_no_unfit_tower(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    encoder = build()
    monkeypatch.setattr(encoder.image_tower, "forward", fail)
    with pytest.raises(torch.OutOfMemoryError):
        check_towers(encoder, image_size=32, tokens=tokens(2))


def test_tower_is_zero_or_one() -> None:
    with pytest.raises(ValueError, match="tower: expected 0 .* got 2"):
        build()(2, images())


def test_pretrained_text_tower_from_a_folder(tmp_path: Path) -> None:
    trained = build().text_tower.backbone
    trained.save_pretrained(tmp_path)
    loaded = build(text=str(tmp_path), text_kwargs={}, text_pretrained=True).text_tower.backbone
    assert loaded.training
    for name, value in trained.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_a_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    backbone = build().text_tower.backbone
    backbone.config.save_pretrained(tmp_path)
    torch.save(backbone.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="model.text: .*safetensors"):
        build(text=str(tmp_path), text_kwargs={}, text_pretrained=True)


def test_pretrained_weights_that_do_not_fit_or_are_damaged(tmp_path: Path) -> None:
    build().text_tower.backbone.save_pretrained(tmp_path)
    pretrained = {"text": str(tmp_path), "text_pretrained": True}
    with pytest.raises(ValueError, match="model.text: ") as caught:
        build(text_kwargs={"intermediate_size": 64}, **pretrained)
    assert "\n" not in str(caught.value)
    (tmp_path / "model.safetensors").write_bytes(b"cut short")
    with pytest.raises(ValueError, match="model.text: .*safetensors"):
        build(text_kwargs={}, **pretrained)


def test_weights_that_are_not_there_are_not_drawn_at_random(tmp_path: Path) -> None:
    backbone = build().text_tower.backbone
    backbone.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    gone = weights.pop("encoder.layer.0.attention.self.query.weight")
    save_file({**weights, "pooler.dense.weight": gone}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"got none for 1 \(first: encoder.layer.0.*query.weight"):
        build(text=str(tmp_path), text_kwargs={}, text_pretrained=True)


def test_loading_says_nothing_of_a_pooler(tmp_path: Path, capfd) -> None:
    backbone = build().text_tower.backbone
    backbone.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({**weights, "pooler.dense.bias": torch.ones(3)}, tmp_path / "model.safetensors")
    build(text=str(tmp_path), text_kwargs={}, text_pretrained=True)
    assert "pooler" not in capfd.readouterr().err


def test_special_tokens_padding_and_truncation(tokenizer: Tokenizer) -> None:
    batch = tokenizer([CAPTIONS[0], CAPTIONS[3], "word " * 50])
    ids, mask = batch["input_ids"], batch["attention_mask"]
    cls, sep, pad = (tokenizer._backend.token_to_id(name) for name in (CLS, SEP, PAD))
    assert ids.dtype == mask.dtype == torch.int64
    assert ids.shape == mask.shape == (3, 10)
    assert (ids[:, 0] == cls).all()
    assert all(row[kept - 1] == sep for row, kept in zip(ids, mask.sum(1), strict=True))
    assert torch.equal(mask == 0, ids == pad)
    assert pad == tokenizer.pad_token_id == 0
    assert mask.sum(1).tolist()[2] == 10


def test_padded_to_the_longest_or_to_the_context(tokenizer: Tokenizer) -> None:
    short = tokenizer(["grinning face"])
    full = tokenizer(["grinning face"], pad_to_context=True)
    kept = short["input_ids"].shape[1]
    assert kept < 10
    assert full["input_ids"].shape == full["attention_mask"].shape == (1, 10)
    assert torch.equal(full["input_ids"][:, :kept], short["input_ids"])
    assert full["attention_mask"].sum() == kept


@pytest.mark.parametrize("caption", [*CAPTIONS, "unseen wörd 日本語 ❤️"])
def test_round_trip_loses_case_and_spacing_only(tokenizer: Tokenizer, caption: str) -> None:
    whole = Tokenizer(tokenizer._backend, context_length=60)
    decoded = whole.decode(whole([caption])["input_ids"][0])
    Tokenizer(tokenizer._backend, context_length=10)
    assert decoded.replace(" ", "") == caption.lower().replace(" ", "")


def test_saved_and_pickled_tokenizers_are_equal(tokenizer: Tokenizer, tmp_path: Path) -> None:
    loaded = load_tokenizer(tokenizer.save(tmp_path), context_length=10)
    for copy in (loaded, pickle.loads(pickle.dumps(tokenizer))):
        assert copy.vocab_size == tokenizer.vocab_size
        assert copy.pad_token_id == tokenizer.pad_token_id
        assert torch.equal(copy(CAPTIONS)["input_ids"], tokenizer(CAPTIONS)["input_ids"])


def test_a_transformers_folder_is_loaded(tokenizer: Tokenizer, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._backend, pad_token=PAD, cls_token=CLS, sep_token=SEP
    ).save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path, context_length=10)
    assert loaded.pad_token == PAD
    assert torch.equal(loaded(CAPTIONS)["input_ids"], tokenizer(CAPTIONS)["input_ids"])


def test_training_is_deterministic_in_any_order() -> None:
    words = ["red", "blue", "green", "heart", "car", "house", "hat", "moon", "star", "bear"]
    captions = [f"{a} {b}" for a in words for b in words]
    # The library seeds its hash maps anew for each training, in one process too.
    vocabularies = set()
    for seed in range(5):
        random.Random(seed).shuffle(captions)
        trained = train_tokenizer(captions, vocab_size=290)
        assert trained.vocab_size == 290
        vocabularies.add(trained._backend.to_str())
    assert len(vocabularies) == 1


def test_bad_tokenizer_input(tokenizer: Tokenizer, tmp_path: Path) -> None:
    broken = tmp_path / "tokenizer.json"
    broken.write_text("{}")
    for call, message in (
        (lambda: tokenizer([]), "captions: expected a non-empty list"),
        (lambda: tokenizer("one string"), "captions: expected a non-empty list"),
        (lambda: train_tokenizer(["", " "]), "captions: .* got 2 empty"),
        (lambda: train_tokenizer(["a"], vocab_size=100), "vocab_size: .* 259"),
        (lambda: train_tokenizer(["a"], context_length=2), "context_length: .* 2"),
        (lambda: load_tokenizer(broken), "tokenizer: .*tokenizer.json"),
        (lambda: load_tokenizer(tmp_path / "none.json"), "tokenizer: .*no such file"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
