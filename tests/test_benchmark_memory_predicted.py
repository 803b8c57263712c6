"""Memory on named GPUs: the planner's figures, and what the picture says of them."""

from __future__ import annotations

import csv
from pathlib import Path

import memory_predicted
import pytest


@pytest.fixture(scope="module")
def predicted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("predicted")
    memory_predicted.main(["--quick", "--results", str(folder)])
    return folder


def _lines(folder: Path, method: str) -> list[dict[str, str]]:
    with (folder / "memory_predicted.csv").open(newline="") as file:
        return [line for line in csv.DictReader(file) if line["method"] == method]


def test_predictions_are_those_of_the_planner(predicted):
    from gradcache_clip import PlanOptions, plan

    options = PlanOptions(batch_size=32768, chunk_size=64, image_size=32)
    found = plan("convnext_atto", "bert-tiny", "RTX 4090", options)
    cached = next(method for method in found.methods if method.name == "gradient caching")
    lines = _lines(predicted, "cached")
    got = [(int(line["batch_size"]), int(line["predicted_bytes"])) for line in lines]
    assert got == list(cached.curve) and got[-1][0] == 65536
    assert {int(line["largest_batch"]) for line in lines} == {cached.largest_batch}
    assert {line["card"] for line in lines} == {"RTX 4090"} and lines[0]["commit"]


def test_what_fits_is_what_lies_under_the_card(predicted):
    largest = {}
    for method in memory_predicted.METHODS:
        for line in _lines(predicted, method):
            if int(line["batch_size"]) <= int(line["largest_batch"]):
                assert int(line["predicted_bytes"]) <= int(line["card_bytes"])
        largest[method] = int(line["largest_batch"])
    plain, checkpointed, accumulated, on_card, on_host = largest.values()
    assert 0 < plain < checkpointed < on_card < on_host and accumulated < on_card


def test_losses_alone_grow_with_the_batch_or_with_its_square(predicted):
    matrix, tiles = (
        [int(x["predicted_bytes"]) for x in _lines(predicted, name)]
        for name in ("loss, B x B matrix", "loss, tiles")
    )
    assert matrix[-1] / matrix[-2] == pytest.approx(4, rel=0.05)
    assert matrix[-1] > 2 * 4 * 65536**2
    # Features and their gradients, of both sides in bf16, at least, and far from a matrix of pairs.
    assert 4 * 2 * 65536 * 512 < tiles[-1] < matrix[-1] / 10
    assert tiles[-1] / tiles[-2] < 2.05


def test_predicted_pictures_say_that_nothing_was_measured(predicted):
    svg = (predicted / "memory_predicted.svg").read_text()
    assert "Predicted, not measured: no GPU was used." in svg and "RTX 4090: 24.0 GiB" in svg
    assert (predicted / "memory_predicted.png").read_bytes().startswith(b"\x89PNG")
