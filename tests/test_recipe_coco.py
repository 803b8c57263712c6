"""recipes/coco.yaml: five captions an image, from a file of splits to recall over five folds."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
from recipe_runs import assert_trains_and_resumes, recipe, shortened
from tiny_shards import picture
from torch import Tensor, nn
from trainer_step import assert_step_equals, same_group, trainer_of, unit

from gradcache_clip.cli import main
from gradcache_clip.train.evaluate import evaluate_run
from gradcache_clip.train.peers import Peers
from gradcache_clip.train.programs import program_of
from gradcache_clip.train.run_folder import existing_run
from gradcache_clip.train.sources import Sample, write_shards
from gradcache_clip.train.state import load_trained

EXAMPLE = Path(__file__).parent.parent / "examples" / "drawn_coco.py"
# Of its towers the weights are on a hub, and this machine need not reach it.
SMALL = (
    "data.image_size=32",
    "data.context_length=24",
    "data.tokenizer=train",
    "model.image=vit_tiny_patch16_224",
    "model.image_kwargs={patch_size: 16, embed_dim: 16, depth: 1, num_heads: 2}",
    "model.image_pretrained=false",
    "model.text=bert",
    "model.text_kwargs={hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2,"
    " intermediate_size: 32, hidden_dropout_prob: 0, attention_probs_dropout_prob: 0}",
    "model.text_pretrained=false",
    "model.feature_dim=8",
    "train.precision=fp32",
)


def drawn_coco() -> ModuleType:
    spec = importlib.util.spec_from_file_location("drawn_coco", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawn")
    drawn_coco().write_drawn_coco(folder, images=500)
    return folder


@pytest.fixture(scope="module")
def data(drawn: Path) -> Path:
    file, images, out = drawn / "dataset_coco.json", drawn / "images", drawn / "shards"
    assert main(["data", "coco", str(file), str(images), str(out)]) == 0
    return out


def test_the_drawn_set_shows_nothing_twice(drawn: Path) -> None:
    images = json.loads((drawn / "dataset_coco.json").read_text())["images"]
    firsts = {image["sentences"][0]["raw"] for image in images}
    for image in images:
        assert (drawn / "images" / image["filepath"] / image["filename"]).is_file()
        assert len({sentence["raw"] for sentence in image["sentences"]}) == 5
    assert len(firsts) == len(images) == 500


def positives_of_one_image(
    images: Tensor, texts: Tensor, loss: nn.Module, groups: list[str]
) -> Tensor:
    """Each of the captions of an image is its target with the same probability."""
    S = loss.log_logit_scale.exp() * unit(images) @ unit(texts).T
    same = same_group(groups).double()
    target = same / same.sum(1, keepdim=True)
    rows, columns = -(target * S.log_softmax(1)).sum(1), -(target * S.T.log_softmax(1)).sum(1)
    return (rows.mean() + columns.mean()) / 2


def test_captions_of_one_image_are_positives_of_each_other(tmp_path: Path) -> None:
    samples = [
        Sample(f"k{n}", picture((9 * n, n, 80), size=(40, 40)), "png", (f"text {n}",), str(n // 3))
        for n in range(30)
    ]
    write_shards(samples, tmp_path / "train", source="test", license="CC0-1.0")
    settings = shortened(tmp_path, tmp_path / "run", *SMALL, "data.validation=")
    trainer = trainer_of(recipe("coco"), settings, tmp_path / "run")
    assert_step_equals(trainer, positives_of_one_image)


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    summary = assert_trains_and_resumes("coco", data, folder, *SMALL)
    # Five folds of the 50 validation images.
    assert summary.metrics["text_to_image_recall_at_1_chance"] == pytest.approx(1 / 10)
    return folder / "whole"


def test_the_test_set_is_ranked_whole_and_in_folds(
    run: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    test = str(data / "test")
    whole = evaluate_run(run, data=test, device="cpu", folds=1)
    folded = evaluate_run(run, data=test, device="cpu", folds=5)
    assert (whole.image_to_text.queries, whole.image_to_text.candidates) == (50, 250)
    assert (folded.image_to_text.queries, folded.image_to_text.candidates) == (50, 50)
    assert (folded.text_to_image.queries, folded.text_to_image.candidates) == (250, 10)
    assert folded.text_to_image.recall[5] > whole.text_to_image.recall[5]
    assert main(["evaluate", str(run), "--data", test, "--folds", "5", "--device", "cpu"]) == 0
    assert "mean of 5 folds" in capsys.readouterr().out


def test_folds_follow_the_order_of_the_file(run: Path, data: Path, drawn: Path) -> None:
    folder, config = existing_run(run)
    changes = {"data.validation": str(data / "test"), "train.device": "cpu"}
    program = program_of(config.updated(changes))
    encoder, tokenizer, _ = load_trained(program, folder)
    held_out = program.evaluate(encoder, tokenizer, Peers())
    images = json.loads((drawn / "dataset_coco.json").read_text())["images"]
    of_file = [i["sentences"][0]["raw"] for i in images if i["split"] == "test"]
    assert held_out.image_captions == of_file
    assert len(held_out.texts) == 5 * len(of_file)
