"""Features of a locked image tower that later epochs and runs read from files."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from recipe_runs import recipe, run_recipe, shortened
from safetensors.torch import save_file
from tiny_run import logged
from torch import Tensor, nn

from gradcache_clip.train.config_errors import ConfigError
from gradcache_clip.train.config_file import load_config
from gradcache_clip.train.frozen_features import FrozenFeatures

TEXT = (
    "{hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 32,"
    " hidden_dropout_prob: 0.1}"
)
SMALL = (
    *("data.image_size=32", "data.tokenizer=train", "model.text=bert"),
    *("model.text_pretrained=false", f"model.text_kwargs={TEXT}", "train.steps=8"),
)


class Tower(nn.Module):
    """Counts the images that go through it."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layer = nn.Linear(12, 5).requires_grad_(False)
        self.seen: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(len(images))
        return self.layer(images.float().flatten(1))


def images(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(255, (count, 3, 2, 2), generator=generator, dtype=torch.uint8)


def stored(tower: nn.Module, folder: Path, **options: object) -> FrozenFeatures:
    return FrozenFeatures(tower, folder, **{"chunk_size": 4, **options})


def test_each_image_goes_through_the_tower_once(tmp_path: Path) -> None:
    tower, given = Tower(), images(11)
    features = stored(tower, tmp_path)
    expected = Tower()(given)
    for rows in ([0, 1, 2], [5, 1, 0, 7, 8, 9, 10], [4, 3, 6], torch.randperm(11).tolist()):
        torch.testing.assert_close(features.of(given[rows]), expected[rows])
    # In chunks of at most four, and never again.
    assert tower.seen == [3, 4, 1, 3] and len(features) == 11
    twice = stored(Tower(), tmp_path).of(given[[2, 2, 2]])
    torch.testing.assert_close(twice, expected[[2, 2, 2]])


def test_one_pixel_makes_another_image(tmp_path: Path) -> None:
    tower, given = Tower(), images(2)
    features = stored(tower, tmp_path)
    first = features.of(given)
    given[0, 2, 1, 1] ^= 1
    assert not torch.equal(features.of(given)[0], first[0])
    assert torch.equal(features.of(given)[1], first[1]) and sum(tower.seen) == 3
    # Of equal bytes in another order too: a mirrored image.
    assert not torch.equal(features.of(given.flip(3)), features.of(given))


def test_files_of_all_processes_are_read_and_an_unchanged_one_is_not_written(
    tmp_path: Path,
) -> None:
    given = images(9)
    for rank, rows in enumerate((slice(0, 5), slice(4, 9))):
        features = stored(Tower(), tmp_path / "none yet", rank=rank)
        features.of(given[rows])
        features.save()
    tower = Tower()
    both = stored(tower, tmp_path / "none yet")
    torch.testing.assert_close(both.of(given), Tower()(given))
    assert tower.seen == [] and len(both) == 9
    files = sorted((tmp_path / "none yet").iterdir())
    assert [file.name for file in files] == ["rank-0.safetensors", "rank-1.safetensors"]
    before = files[0].stat().st_mtime_ns
    both.save()
    assert files[0].stat().st_mtime_ns == before


def test_features_of_another_tower_or_setting_are_refused(tmp_path: Path) -> None:
    features = stored(Tower(), tmp_path, setting="32 fp32")
    features.of(images(3))
    features.save()
    for tower, setting in ((Tower(1), "32 fp32"), (Tower(), "32 bf16")):
        with pytest.raises(ConfigError, match="frozen_features: expected features of this tower"):
            stored(tower, tmp_path, setting=setting)
    save_file({"x": torch.zeros(1)}, tmp_path / "rank-7.safetensors")
    with pytest.raises(ConfigError, match="in .*rank-7.safetensors, got others"):
        stored(Tower(), tmp_path, setting="32 fp32")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("weights") / "image.safetensors"
    save_file(timm.create_model("tf_efficientnet_lite0", num_classes=0).state_dict(), path)
    return path


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_a_run_learns_the_same(data, weights, tmp_path, monkeypatch, precision) -> None:
    """Two epochs and more; the second run of the same tower embeds no image."""
    more = (*SMALL, f"model.image_weights={weights}", f"train.precision={precision}")
    folder = f"model.frozen_features={tmp_path / 'features'}"
    plain = run_recipe("lit", data, tmp_path / "plain", *more)
    first = run_recipe("lit", data, tmp_path / "first", *more, folder)
    assert (tmp_path / "features" / "rank-0.safetensors").exists()
    monkeypatch.setattr(FrozenFeatures, "_computed", None)
    again = run_recipe("lit", data, tmp_path / "again", *more, folder)
    within = 1e-5 if precision == "fp32" else 2e-2
    for name in ("loss", "grad_norm"):
        expected = logged(tmp_path / "plain", name)
        assert len(expected) == 8
        assert logged(tmp_path / "first", name) == pytest.approx(expected, rel=within)
        assert logged(tmp_path / "again", name) == logged(tmp_path / "first", name)
    assert again.metrics == first.metrics
    assert first.metrics == pytest.approx(plain.metrics, abs=0.05)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model.freeze=text", "model.freeze: expected 'image' with model.frozen_features"),
        ("data.random_crop=0.8", "data.random_crop: expected 1.0 with model.frozen_features"),
        ("loss.name=late_interaction", "loss.name: expected clip or siglip with model.frozen"),
        (
            "distributed.strategy=fsdp",
            "distributed.strategy: expected 'ddp' with model.frozen_features",
        ),
    ],
)
def test_what_would_show_other_images_or_towers_is_refused(tmp_path, setting, message) -> None:
    folder = f"model.frozen_features={tmp_path}"
    with pytest.raises(ConfigError, match=message):
        load_config(recipe("lit"), shortened(tmp_path, tmp_path / "run", folder, setting))
