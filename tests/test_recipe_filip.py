"""recipes/filip.yaml: the objective is FILIP's equations, token by token, and so is retrieval."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from processes import SAME_BATCHES, alone, assert_same_run, in_processes
from recipe_runs import assert_trains_and_resumes, recipe, run_recipe, shortened
from torch import Tensor, nn
from trainer_step import Trainer, assert_step_equals, trainer_of

from gradcache_clip.cli import main
from gradcache_clip.train.config_errors import ConfigError
from gradcache_clip.train.config_file import load_config
from gradcache_clip.train.token_towers import PatchTower, Tokens
from gradcache_clip.train.towers import ImageTower

SMALL = (
    "model.image_kwargs={patch_size: 8, embed_dim: 16, depth: 1, num_heads: 2}",
    "model.text_kwargs={hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2,"
    " intermediate_size: 32}",
    "model.feature_dim=8",
)
CONVNEXT = (
    "model.image=convnext_atto",
    "model.image_kwargs={depths: [1, 1, 1, 1], dims: [8, 8, 16, 16], output_stride: 8}",
)


def started(data: Path, folder: Path, *more: str) -> Trainer:
    """The recipe as it starts, with small towers, in fp64."""
    return trainer_of(recipe("filip"), shortened(data, folder, *SMALL, *more), folder)


def equations_of_filip(images: Tensor, texts: list[Tensor], scale: Tensor) -> Tensor:
    """B images of n1 tokens, B texts of n2 tokens each, none of them padding."""
    b = len(images)
    f = [[token / token.square().sum().sqrt() for token in image] for image in images]
    g = [[token / token.square().sum().sqrt() for token in text] for text in texts]
    similarity = [[torch.stack([torch.stack([x @ y for y in t]) for x in i]) for t in g] for i in f]
    s_I = torch.stack([torch.stack([s.max(1).values.mean() for s in row]) for row in similarity])
    s_T = torch.stack([torch.stack([s.max(0).values.mean() for s in row]) for row in similarity])
    L_I = torch.zeros((), dtype=s_I.dtype)
    L_T = torch.zeros((), dtype=s_I.dtype)
    for k in range(b):
        own_I, own_T = (scale * s_I[k, k]).exp(), (scale * s_T[k, k]).exp()
        L_I = L_I - torch.log(own_I / (scale * s_I[k, :]).exp().sum()) / b
        L_T = L_T - torch.log(own_T / (scale * s_T[:, k]).exp().sum()) / b
    return (L_I + L_T) / 2


def formula(images: Tensor, texts: Tokens, loss: nn.Module, groups: list[str]) -> Tensor:
    kept = [vectors[mask] for vectors, mask in zip(*texts, strict=True)]
    return equations_of_filip(images, kept, loss.loss.log_logit_scale.exp())


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("train.sort_by_length=false",),
        ("train.memory_budget_gib=1",),
        ("train.impl=reference",),
        ("model.freeze=image",),
        ("model.freeze=text",),
        CONVNEXT,
        ("loss.init_logit_scale=99",),
    ],
)
def test_the_step_is_the_equations(data: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    settings = ("train.batch_size=12", "train.chunk_size=5", *more)
    trainer = started(data, tmp_path / "run", *settings)
    output = assert_step_equals(trainer, formula)
    assert 0 <= float(output.accuracy) <= 1
    frozen = [name for name, p in trainer.encoder.named_parameters() if p.grad is None]
    assert bool(frozen) == any("freeze" in setting for setting in more)


def test_chunks_compete_alone_where_they_are_told_to(data: Path, tmp_path: Path) -> None:
    def of_chunks(images: Tensor, texts: Tokens, loss: nn.Module, groups: list[str]) -> Tensor:
        parts = [slice(0, 5), slice(5, 10), slice(10, 12)]
        losses = [formula(images[p], Tokens(*(t[p] for t in texts)), loss, groups) for p in parts]
        return sum(loss * (p.stop - p.start) / 12 for loss, p in zip(losses, parts, strict=True))

    settings = ("train.batch_size=12", "train.chunk_size=5", "train.grad_cache=false")
    assert_step_equals(started(data, tmp_path / "run", *settings), of_chunks)


def test_patches_without_class_token_and_all_tokens_of_a_text(data: Path, tmp_path: Path) -> None:
    trainer = started(data, tmp_path / "run")
    encoder = trainer.encoder
    (images, tokens), loss_kwargs = trainer.inputs_of(next(iter(trainer.batches())))
    vit = encoder.image_tower.backbone
    patches = vit.forward_features((images.double() / 255 - 0.5) / 0.5)[:, 1:]
    assert patches.shape[1] == 16
    torch.testing.assert_close(encoder(0, images), patches @ encoder.image_projection.weight.T)
    texts, length = encoder(1, tokens), tokens["input_ids"].shape[1]
    hidden = encoder.text_tower.backbone(**tokens).last_hidden_state
    expected = hidden @ encoder.text_projection.weight.T
    torch.testing.assert_close(texts.vectors[:, :length], expected)
    assert texts.vectors.shape[1] == texts.mask.shape[1] == trainer.config.data.context_length
    assert torch.equal(texts.mask.sum(1), tokens["attention_mask"].sum(1))
    assert (texts.mask[:, :3]).all() and not loss_kwargs


@pytest.mark.parametrize(
    ("image", "arguments", "patches"),
    [
        (
            "vit_small_patch14_reg4_dinov2",
            "{img_size: 28, depth: 1, embed_dim: 12, num_heads: 2}",
            4,
        ),
        ("vit_base_patch16_siglip_224", "{img_size: 32, depth: 1, embed_dim: 12, num_heads: 2}", 4),
        ("vit_base_patch16_gap_224", "{img_size: 32, depth: 1, embed_dim: 12, num_heads: 2}", 4),
        ("resnet18", "{layers: [1, 1, 1, 1]}", 1),
        (
            "swin_tiny_patch4_window7_224",
            "{img_size: 32, window_size: 4, depths: [1, 1], embed_dim: 12, num_heads: [2, 2]}",
            16,
        ),
    ],
)
def test_patches_of_other_models(
    data: Path, tmp_path: Path, image: str, arguments: str, patches: int
) -> None:
    size = 28 if "14" in image else 32
    more = (f"model.image={image}", f"model.image_kwargs={arguments}", f"data.image_size={size}")
    trainer = started(data, tmp_path / "run", *more)
    tower, pixels = trainer.encoder.image_tower, torch.randn(2, 3, size, size).double()
    found = tower.eval()(pixels)
    assert found.shape[:2] == (2, patches)
    whole = tower.backbone.forward_features(pixels)
    if whole.ndim == 4 and whole.shape[1] == found.shape[2]:
        whole = whole.permute(0, 2, 3, 1)
    kept = whole.flatten(1, -2)[:, -patches:]
    # Behind the norm that the model has behind its pooling, if any.
    norm = getattr(tower.backbone, "fc_norm", nn.Identity())
    torch.testing.assert_close(found, norm(kept))
    found.sum().backward()
    unused = [name for name, p in tower.named_parameters() if p.grad is None]
    assert unused == []


def test_what_padding_holds_changes_nothing(data: Path, tmp_path: Path) -> None:
    trainer = started(data, tmp_path / "run")
    loss, images = trainer.loss, torch.randn(4, 3, 8, dtype=torch.float64)
    vectors = torch.randn(4, 5, 8, dtype=torch.float64)
    mask = torch.arange(5) < torch.tensor([5, 3, 4, 2])[:, None]
    other = torch.where(mask[:, :, None], vectors, torch.full_like(vectors, 50.0))
    same = [loss(images, Tokens(each, mask)).loss for each in (vectors, other)]
    assert same[0] == same[1]


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    summary = assert_trains_and_resumes("filip", data, folder, *SMALL)
    assert 0 <= summary.metrics["text_to_image_recall_at_10"] <= 1
    return folder / "whole"


def test_a_run_is_evaluated_and_classifies(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    templates = ["--zero-shot", "a photo of {}", "--zero-shot", "{}"]
    assert main(["evaluate", str(run), "--device", "cpu", "--folds", "3", *templates]) == 0
    said = capsys.readouterr().out
    assert "mean of 3 folds" in said and "R@1" in said
    assert "zero-shot accuracy among the first 5" in said
    assert main(["evaluate", str(run), "--folds", "0"]) == 2
    assert "evaluation.folds: expected at least 1, got 0" in capsys.readouterr().err


def test_a_run_draws_its_pictures(run: Path, data: Path) -> None:
    settings = [*shortened(data, run, *SMALL), "train.resume=true"]
    assert main(["train", str(recipe("filip")), *settings]) == 0
    pictures = {path.name for path in (run / "pictures").iterdir()}
    assert pictures == {"curves.png", "similarity.png", "similarity_held_out.png", "gallery.png"}


def test_verify_says_that_it_is_exact(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("train.sort_by_length=false", "model.freeze=image")
    settings = shortened(data, tmp_path / "run", *SMALL, *more)
    assert main(["verify", str(recipe("filip")), *settings, "--rows", "12"]) == 0
    assert "exact" in capsys.readouterr().out


@pytest.mark.distributed
@pytest.mark.parametrize("exchange", ["ring", pytest.param("gather", marks=pytest.mark.slow)])
def test_two_processes_give_the_weights_of_one(data: Path, tmp_path: Path, exchange: str) -> None:
    more = ("loss.name=late_interaction", f"train.exchange={exchange}", "train.steps=4")
    one = alone(data, tmp_path / "one", *more)
    outcome = in_processes(2, data, tmp_path / "two", *SAME_BATCHES, *more)
    assert outcome == ["finished"] * 2
    assert_same_run(tmp_path / "two", one)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("loss.positives=group", "loss.positives: no such key with loss.name=late_interaction"),
        ("loss.matryoshka=[4, 8]", "loss.matryoshka: no such key with"),
        ("loss.label_smoothing=0.1", "loss.label_smoothing: no such key with"),
        (
            "model.architecture=multiway",
            "model.image: no such key with model.architecture",
        ),
    ],
)
def test_what_scores_of_tokens_cannot_do_is_refused(
    data: Path, tmp_path: Path, setting: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run_recipe("filip", data, tmp_path / "run", *SMALL, setting)
    assert not (tmp_path / "run").exists()


def test_one_vector_of_a_multiway_transformer_has_no_tokens() -> None:
    settings = ["model.architecture=multiway", "loss.name=late_interaction"]
    with pytest.raises(ConfigError, match="architecture: expected 'dual' with loss.name=late"):
        load_config(None, settings)


class Flat(nn.Module):
    """A network that gives one vector an image."""

    head_hidden_size = 4

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.layer(images.float().mean((2, 3)))
        return features


class SurelyFlat(Flat):
    """A model that still pools although timm says that its pooling can be removed."""

    def reset_classifier(self, num_classes: int, global_pool: str) -> None:
        pass


def test_a_model_without_patches_is_refused() -> None:
    flat, surely_flat = (
        ImageTower(kind(), width=4, mean=[0.5] * 3, std=[0.5] * 3) for kind in (Flat, SurelyFlat)
    )
    with pytest.raises(ConfigError, match="expected a model whose pooling can be removed, got"):
        PatchTower(flat)
    with pytest.raises(ValueError, match=r"a vector for each patch, got shape \(2, 4\)"):
        PatchTower(surely_flat)(torch.zeros(2, 3, 8, 8))
