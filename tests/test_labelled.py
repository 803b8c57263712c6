"""Classes of images by neighbours and by a linear probe, and what a run over views evaluates."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from recipe_runs import run_recipe
from tiny_run import make_data
from tiny_shards import picture
from torch import Tensor, nn

from gradcache_clip.cli import main
from gradcache_clip.train.config_errors import ConfigError
from gradcache_clip.train.data import DecodedSample
from gradcache_clip.train.evaluation.classify import knn_classify, linear_probe
from gradcache_clip.train.evaluation.embed import EmbedOptions
from gradcache_clip.train.evaluation.labelled import LabelledImages, embed_labelled
from gradcache_clip.train.sources.shards import Sample, write_shards

COLOURS = {"red": (230, 20, 20), "green": (20, 220, 20), "blue": (20, 20, 230)}


def votes_one_by_one(features: Tensor, bank: Tensor, labels: Tensor, k: int) -> list[int]:
    answers = []
    for query in features:
        cosines = [float(F.cosine_similarity(query, known, dim=0)) for known in bank]
        nearest = sorted(range(len(bank)), key=lambda i: -cosines[i])[:k]
        votes: dict[int, float] = {}
        for i in nearest:
            label = int(labels[i])
            votes[label] = votes.get(label, 0.0) + math.exp(cosines[i] / 0.07)
        answers.append(max(votes, key=votes.__getitem__))
    return answers


@pytest.mark.parametrize("k", [1, 5, 20, 100])
def test_votes_are_those_of_a_loop(k):
    bank, features = torch.randn(50, 6, dtype=torch.float64), torch.randn(23, 6).double()
    labels = torch.randint(0, 4, (50,))
    got = knn_classify(features, bank, labels, k=k)
    assert got.tolist() == votes_one_by_one(features, bank, labels, k)


def test_near_neighbours_outvote_many_far_ones():
    bank = torch.tensor([[1.0, 0.0], [1.0, 0.01], *([[0.6, 0.8]] * 5)])
    labels = torch.tensor([1, 1, 0, 0, 0, 0, 0])
    query = torch.tensor([[1.0, 0.0]])
    assert knn_classify(query, bank, labels, k=7).tolist() == [1]
    # A temperature without preference counts heads.
    assert knn_classify(query, bank, labels, k=7, temperature=1e6).tolist() == [0]


def names_by_gradient_descent(features: Tensor, bank: Tensor, labels: Tensor) -> list[int]:
    bank, features = (
        (each - bank.mean(0)) / bank.std(0, correction=0) for each in (bank, features)
    )
    weight = torch.zeros(3, bank.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    for _ in range(2000):
        loss = F.cross_entropy(F.linear(bank, weight, bias), labels) + 5e-4 * weight.square().sum()
        for each, grad in zip(
            (weight, bias), torch.autograd.grad(loss, (weight, bias)), strict=True
        ):
            each.data -= grad
    return F.linear(features, weight, bias).argmax(1).tolist()


def test_the_probe_minimises_its_loss():
    bank, labels = torch.randn(80, 5).double(), torch.randint(0, 3, (80,))
    features = torch.randn(200, 5).double()
    expected = names_by_gradient_descent(features, bank, labels)
    assert linear_probe(features, bank, labels).tolist() == expected
    assert len({*expected}) == 3


def test_one_class_is_always_right():
    labels = torch.full((4,), 2)
    for method in (linear_probe, knn_classify):
        assert method(torch.randn(3, 2), torch.randn(4, 2), labels).tolist() == [2, 2, 2]


def test_the_probe_finds_a_line_whatever_the_units():
    bank = torch.randn(300, 4)
    labels = (bank[:, 0] + bank[:, 1] > 0).long()
    held_out = torch.randn(200, 4)
    truth = (held_out[:, 0] + held_out[:, 1] > 0).long()
    scale, shift = torch.tensor([1e4, 1.0, 1e-3, 1.0]), 50.0
    before = torch.get_rng_state()
    named = linear_probe(held_out * scale + shift, bank * scale + shift, labels)
    assert (named == truth).double().mean() > 0.97
    assert torch.equal(torch.get_rng_state(), before)
    with torch.no_grad():
        assert torch.equal(
            linear_probe(held_out, bank, labels), linear_probe(held_out, bank, labels)
        )


@pytest.mark.parametrize("method", [knn_classify, linear_probe])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": torch.ones(2, 3)}, "bank: expected width 3"),
        ({"labels": torch.zeros(5)}, "labels: expected 4 integers"),
        ({"labels": torch.tensor([0, -1, 0, 1])}, "labels: expected indices from 0 to 1"),
        ({"features": torch.full((2, 4), math.nan)}, "features: expected finite numbers"),
        (
            {"bank": torch.ones(0, 4), "labels": torch.zeros(0).long()},
            "bank: expected at least one",
        ),
    ],
)
def test_inputs_that_do_not_fit(method, change, message):
    given = {"features": torch.ones(2, 4), "bank": torch.ones(4, 4)}
    given |= {"labels": torch.tensor([0, 1, 0, 1]), **change}
    with pytest.raises(ValueError, match=message):
        method(**given)


def coloured(folder: Path, count: int, *, labels: bool = True) -> Path:
    """Plain squares, whose class is their colour."""
    names = [*COLOURS]
    samples = [
        Sample(
            key=f"k{i:03d}",
            image=picture(tuple(max(0, min(255, c + i % 17 - 8)) for c in COLOURS[names[i % 3]])),
            extension="png",
            captions=("a square",),
            group=f"g{i}",
            label=names[i % 3] if labels else "",
        )
        for i in range(count)
    ]
    write_shards(samples, folder, source="test", license="CC0-1.0")
    return folder


def samples(count: int) -> list[DecodedSample]:
    """As `coloured`, decoded."""
    names = [*COLOURS]
    return [
        DecodedSample(
            (torch.tensor(COLOURS[names[i % 3]]) + i % 5)[:, None, None].expand(3, 8, 8).byte(),
            captions=(),
            key=f"k{i}",
            group=f"g{i}",
            label=names[i % 3] if i != 4 else "",
        )
        for i in range(count)
    ]


class Means(nn.Module):
    """Mean colours, as wrong while training as dropout makes them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, images: Tensor) -> Tensor:
        return self.weight * F.dropout(images.float().mean((2, 3)), training=self.training)


def test_colours_are_told_apart_by_the_tower():
    tower = Means()
    held_out = embed_labelled(tower, samples(31), samples(90), EmbedOptions(batch_size=7))
    assert isinstance(held_out, LabelledImages) and tower.training
    expected = [sample for sample in samples(31) if sample.label]
    assert held_out.labels == [sample.label for sample in expected]
    assert torch.equal(held_out.thumbnails, torch.stack([sample.image for sample in expected]))
    colours = held_out.thumbnails.float().mean((2, 3))
    torch.testing.assert_close(held_out.features, F.normalize(colours, dim=1))
    assert held_out.scalars() == {
        "knn_accuracy": 1.0,
        "probe_accuracy": 1.0,
        # Of 90 images one green has no label, so reds come first; 11 of 30 held out are red.
        "label_chance": 11 / 30,
    }
    assert (held_out.accuracy.images, held_out.accuracy.classes) == (30, 3)


def test_shards_without_labels_are_refused_before_the_run(tmp_path):
    coloured(tmp_path / "train", 90, labels=False)
    coloured(tmp_path / "validation", 30)
    with pytest.raises(ConfigError, match=r"label: expected labelled .*train.* got none; write \{"):
        run_recipe("simclr", tmp_path, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    # Without evaluation nobody asks.
    assert run_recipe("simclr", tmp_path, tmp_path / "run", "data.validation=").finished


def test_evaluate_prints_what_the_run_has_logged(tmp_path, capsys):
    data = make_data(tmp_path / "glyphs")
    summary = run_recipe("simclr", data, tmp_path / "run", "train.steps=3")
    assert main(["evaluate", str(tmp_path / "run"), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    for name in ("knn_accuracy", "probe_accuracy", "label_chance"):
        assert f"{summary.metrics[name]:.1%}" in printed
    assert main(["evaluate", str(tmp_path / "run"), "--zero-shot", "a {}"]) == 2
    assert "and not on captioned images" in capsys.readouterr().err
