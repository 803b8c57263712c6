"""COCO captions in both formats: every caption kept, splits obeyed, broken entries counted."""

from __future__ import annotations

import json
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from coco_files import captions_of, changed, coco_file, split_file
from tiny_shards import picture

from gradcache_clip.cli import main
from gradcache_clip.train.data import DecodedSample, read_all
from gradcache_clip.train.sources import CocoSplits, make_coco

SPLITS = ["train", "restval", "val", "test", "train", "test", "val", "test", "restval", "test"]


def read(out: Path, split: str) -> list[DecodedSample]:
    return list(read_all(out / split))


def numbers(samples: list[DecodedSample]) -> list[int]:
    """Of the images, from the ends of their captions."""
    return [int(sample.captions[0].split()[-1]) for sample in samples]


class TestOwnFormat:
    def test_every_image_comes_with_all_its_captions(self, tmp_path: Path) -> None:
        annotations = coco_file(tmp_path)
        out = tmp_path / "out"
        summary = make_coco(annotations, tmp_path / "images", out, validation_share=0.2)
        assert (summary.train_samples, summary.validation_samples) == (8, 2)
        assert summary.skipped == {} and summary.test_samples == 0
        samples = read(out, "train") + read(out, "validation")
        assert sorted(numbers(samples)) == list(range(10))
        for sample, number in zip(samples, numbers(samples), strict=True):
            assert sample.captions == tuple(captions_of(number))
            assert sample.group == str(100 + number)

    def test_bytes_are_kept_and_an_output_is_made_once(self, tmp_path: Path) -> None:
        annotations = coco_file(tmp_path, 3)
        arguments = (annotations, tmp_path / "images", tmp_path / "out")
        make_coco(*arguments, validation_share=0)
        with tarfile.open(tmp_path / "out" / "train" / "shard-000000.tar") as archive:
            stored = {archive.extractfile(m).read() for m in archive if m.name.endswith("jpg")}
        assert stored == {path.read_bytes() for path in (tmp_path / "images").iterdir()}
        assert make_coco(*arguments, validation_share=0).reused
        (tmp_path / "images" / f"{1:012d}.jpg").write_bytes(picture(kind="JPEG", size=(9, 9)))
        with pytest.raises(ValueError, match="fingerprint.*choose another output folder"):
            make_coco(*arguments, validation_share=0)

    def test_broken_entries_are_counted_by_reason(self, tmp_path: Path) -> None:
        def damage(data: dict[str, Any]) -> None:
            data["annotations"] = [a for a in data["annotations"] if a["image_id"] != 101]
            data["annotations"] += [
                {"image_id": 999, "id": 900 + n, "caption": f"of nothing {n}"} for n in range(2)
            ]
            for note in data["annotations"]:
                if note["image_id"] == 102:
                    note["caption"] = "half \ud83d"
                if note["image_id"] == 103:
                    note["caption"] = " \n"
            data["images"][4]["file_name"] = "nowhere.jpg"
            data["images"][5]["file_name"] = "half \ud83d.jpg"

        annotations = changed(coco_file(tmp_path), damage)
        (tmp_path / "images" / f"{6:012d}.jpg").write_bytes(b"no image")
        out = tmp_path / "out"
        summary = make_coco(annotations, tmp_path / "images", out, validation_share=0)
        assert summary.skipped == {
            "missing caption": 2,
            "caption of no listed image": 2,
            "bad utf-8": 1,
            "missing image": 2,
            "undecodable image": 1,
        }
        assert sorted(numbers(read(out, "train"))) == [0, 7, 8, 9]
        manifest = json.loads((out / "train" / "manifest.json").read_text())
        assert manifest["skipped"] == summary.skipped

    def test_repeated_and_blank_captions_are_one_or_none(self, tmp_path: Path) -> None:
        texts = ["a cat", " a cat ", "", "a dog"]
        notes = [{"image_id": 100, "id": n, "caption": text} for n, text in enumerate(texts)]
        annotations = coco_file(tmp_path, 1, annotations=notes)
        make_coco(annotations, tmp_path / "images", tmp_path / "out", validation_share=0)
        assert [s.captions for s in read(tmp_path / "out", "train")] == [("a cat", "a dog")]

    def test_it_has_no_splits_to_name(self, tmp_path: Path) -> None:
        annotations = coco_file(tmp_path)
        with pytest.raises(ValueError, match="splits: expected none except for a file with splits"):
            make_coco(annotations, tmp_path / "images", tmp_path / "out", splits=CocoSplits())


class TestSplits:
    def test_restval_is_trained_on_and_held_out_images_keep_their_order(
        self, tmp_path: Path
    ) -> None:
        annotations, out = split_file(tmp_path, SPLITS), tmp_path / "out"
        summary = make_coco(annotations, tmp_path / "images", out)
        assert (summary.train_samples, summary.validation_samples) == (4, 2)
        assert summary.test_samples == 4 and summary.skipped == {}
        assert sorted(numbers(read(out, "train"))) == [0, 1, 4, 8]
        assert numbers(read(out, "validation")) == [2, 6]
        assert numbers(read(out, "test")) == [3, 5, 7, 9]
        assert [s.group for s in read(out, "test")] == ["1003", "1005", "1007", "1009"]
        assert all(len(s.captions) == 5 for s in read(out, "test"))
        assert make_coco(annotations, tmp_path / "images", out) == summary.__class__(
            **{**vars(summary), "reused": True}
        )

    def test_training_images_are_shuffled_by_the_seed(self, tmp_path: Path) -> None:
        annotations = split_file(tmp_path, ["train"] * 30)
        orders = []
        for seed in (0, 0, 1):
            out = tmp_path / f"out{len(orders)}"
            make_coco(annotations, tmp_path / "images", out, seed=seed)
            orders.append(numbers(read(out, "train")))
        assert orders[0] == orders[1] != orders[2]
        assert orders[0] != sorted(orders[0]) == sorted(orders[2])

    def test_which_split_goes_where_may_be_said(self, tmp_path: Path) -> None:
        annotations, out = split_file(tmp_path, SPLITS), tmp_path / "out"
        splits = CocoSplits(train=("train",), validation=("val", "restval"), test=())
        summary = make_coco(annotations, tmp_path / "images", out, splits=splits)
        assert summary.train_samples == 2 and not (out / "test").exists()
        assert numbers(read(out, "validation")) == [1, 2, 6, 8]
        # The same files, sorted otherwise.
        with pytest.raises(ValueError, match="choose another output folder"):
            make_coco(annotations, tmp_path / "images", out)

    def test_flickr_has_neither_paths_nor_coco_ids(self, tmp_path: Path) -> None:
        def as_flickr(data: dict[str, Any]) -> None:
            for image in data["images"]:
                image["filename"] = f"{image.pop('filepath')}/{image['filename']}"
                del image["cocoid"]

        annotations = changed(split_file(tmp_path, ["train", "val", "test"]), as_flickr)
        make_coco(annotations, tmp_path / "images", tmp_path / "out")
        assert [s.group for s in read(tmp_path / "out", "test")] == ["2"]

    @pytest.mark.parametrize(
        ("splits", "message"),
        [
            (CocoSplits(train=("trian",)), r"has \(restval, test, train, val\).*got 'trian'"),
            (CocoSplits(test=("test2",)), "got 'test2'; name them with CocoSplits, or --train"),
            (CocoSplits(train=(), validation=("val",)), "images to train on, got none"),
        ],
    )
    def test_names_that_the_file_does_not_have(
        self, tmp_path: Path, splits: CocoSplits, message: str
    ) -> None:
        annotations = split_file(tmp_path, SPLITS)
        with pytest.raises(ValueError, match=message):
            make_coco(annotations, tmp_path / "images", tmp_path / "out", splits=splits)
        assert not (tmp_path / "out").exists()

    def test_a_name_stands_in_one_place(self) -> None:
        with pytest.raises(ValueError, match="got 'val' in several; held-out images must not"):
            CocoSplits(train=("train", "val"))

    def test_a_share_is_for_the_other_format(self, tmp_path: Path) -> None:
        annotations = split_file(tmp_path, SPLITS)
        with pytest.raises(
            ValueError, match="validation_share: expected none except for a file of"
        ):
            make_coco(annotations, tmp_path / "images", tmp_path / "out", validation_share=0.1)


OUTSIDE = ["../secret.jpg", "a/../../secret.jpg", "/etc/secret.jpg", "..\\secret.jpg", "C:\\s.jpg",
           "..", "", "."]  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("field", ["file_name", "filename", "filepath"])
def test_no_name_leads_out_of_the_folder(tmp_path: Path, name: str, field: str) -> None:
    (tmp_path / "secret.jpg").write_bytes(picture(kind="JPEG"))
    own = field == "file_name"
    made = coco_file(tmp_path / "set") if own else split_file(tmp_path / "set", SPLITS)
    changes = {field: name} if own else {"filepath": "", "filename": "secret.jpg", field: name}
    annotations = changed(made, lambda data: data["images"][1].update(changes))
    if field == "filepath" and not Path(name).name:
        # The folder itself, in which there is no such file.
        summary = make_coco(annotations, tmp_path / "set" / "images", tmp_path / "out")
        assert summary.skipped == {"missing image": 1}
        return
    with pytest.raises(ValueError, match=r"images\[1\]: expected the name of a file below"):
        make_coco(annotations, tmp_path / "set" / "images", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["images"].append(d["images"][0]), "each image once, got '0.*whose id another"),
        (lambda d: d["images"].append({**d["images"][0], "id": 7}), "whose file another has"),
        (lambda d: d["images"][2].pop("id"), r"images\[2\].id: expected int or str, got none"),
        (lambda d: d["images"][2].update(id=True), r"images\[2\].id: .* got bool"),
        (lambda d: d["images"][2].update(file_name=3), r"file_name: expected str, got int"),
        (lambda d: d["images"].insert(0, "x"), r"images\[0\]: expected an object, got 'x'"),
        (lambda d: d["annotations"][3].pop("caption"), r"annotations\[3\].caption: expected str"),
        (lambda d: d.update(annotations={}), "annotations: expected a list of objects, got dict"),
        (lambda d: d.update(images=None), "an object with a list 'images'"),
        (lambda d: d["images"].clear() or d["annotations"].clear(), "expected at least one record"),
    ],
)
def test_another_shape_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    annotations = changed(coco_file(tmp_path), change)
    with pytest.raises(ValueError, match=message):
        make_coco(annotations, tmp_path / "images", tmp_path / "out")
    assert not (tmp_path / "out" / "train").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["images"][1].pop("split"), r"images\[1\].split: expected str, got none"),
        (lambda d: d["images"][1].update(sentences="a"), r"sentences: expected list, got str"),
        (
            lambda d: d["images"][1]["sentences"][2].pop("raw"),
            r"images\[1\].sentences\[2\].raw: expected str",
        ),
    ],
)
def test_another_shape_of_splits_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    annotations = changed(split_file(tmp_path, SPLITS), change)
    with pytest.raises(ValueError, match=message):
        make_coco(annotations, tmp_path / "images", tmp_path / "out")


@pytest.mark.parametrize("text", ["", "[]", "{", "3", '{"images": 3}', "[" * 100_000])
def test_another_kind_of_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"annotations: expected (JSON in|an object with a list)"):
        make_coco(tmp_path / "a.json", tmp_path, tmp_path / "out")


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="annotations: expected a file"):
        make_coco(tmp_path / "a.json", tmp_path, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="images: expected a folder"):
        make_coco(coco_file(tmp_path), tmp_path / "none", tmp_path / "out")


def test_the_command_makes_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    coco, splits = coco_file(tmp_path / "a"), split_file(tmp_path / "b", SPLITS)
    images = [str(tmp_path / folder / "images") for folder in "ab"]
    made = [str(tmp_path / "out" / folder) for folder in "abc"]
    assert main(["data", "coco", str(coco), images[0], made[0], "--validation-share", "0.3"]) == 0
    assert main(["data", "coco", str(splits), images[1], made[1]]) == 0
    more = ["--train-split", "train", "--train-split", "val", "--validation-split", "test"]
    more += ["--test-split", "restval"]
    assert main(["data", "coco", str(splits), images[1], made[2], *more]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"{made[0]}: 7 training and 3 held-out pairs in 2 shards")
    assert said[1].startswith(f"{made[1]}: 4 training, 4 test and 2 held-out pairs in 3 shards")
    assert said[2].startswith(f"{made[2]}: 4 training, 2 test and 4 held-out pairs")
    assert main(["data", "coco", str(splits), images[1], made[1], "--test-split", "tset"]) == 2
    assert "got 'tset'" in capsys.readouterr().err


def test_the_usual_split_of_coco_has_its_numbers() -> None:
    """82,783 + 30,504 images are trained on, 5,000 validate, 5,000 test."""
    counts = Counter({"train": 82_783, "restval": 30_504, "val": 5_000, "test": 5_000})
    of = {folder: sum(counts[name] for name in names) for folder, names in CocoSplits().folders()}
    assert of == {"validation": 5_000, "test": 5_000, "train": 113_287}
