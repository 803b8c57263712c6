"""Shards of a person's own images, from folders and tables."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
from tiny_shards import picture

from gradcache_clip.train.data import read_all
from gradcache_clip.train.sources import TableColumns, make_folder, make_table


def image_folder(folder: Path) -> Path:
    (folder / "sub").mkdir(parents=True)
    for i, kind in enumerate(("PNG", "JPEG", "WEBP")):
        name = folder / "sub" / f"im g.{i}.{'jpg' if kind == 'JPEG' else kind.lower()}"
        name.write_bytes(picture((10 * i, 0, 0), kind=kind))
        name.with_suffix(".txt").write_text(f"a picture {i}\n\n  second {i} \n")
    (folder / "bad.png").write_bytes(b"not an image")
    (folder / "bad.txt").write_text("bad")
    (folder / "silent.png").write_bytes(picture())
    (folder / "notes.md").write_text("no image")
    return folder


def test_a_folder_becomes_shards_of_the_same_bytes(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "in")
    summary = make_folder(folder, tmp_path / "out", validation_share=0)
    assert summary.train_samples == 3 and summary.validation_samples == 0
    assert summary.skipped == {"undecodable image": 1, "missing caption": 1}
    read = sorted(read_all(tmp_path / "out" / "train"), key=lambda s: s.captions)
    assert [s.captions for s in read] == [(f"a picture {i}", f"second {i}") for i in range(3)]
    with tarfile.open(tmp_path / "out" / "train" / "shard-000000.tar") as archive:
        stored = {archive.extractfile(m).read() for m in archive if m.name.endswith("jpg")}
    assert stored == {(folder / "sub" / "im g.1.jpg").read_bytes()}
    assert make_folder(folder, tmp_path / "out", validation_share=0).reused


def test_a_changed_folder_is_not_taken_for_the_old_one(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "in")
    make_folder(folder, tmp_path / "out", validation_share=0)
    (folder / "silent.txt").write_text("now it speaks")
    with pytest.raises(ValueError, match=r"fingerprint.*choose another output folder"):
        make_folder(folder, tmp_path / "out", validation_share=0)


def test_folders_without_images_are_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected a folder of images"):
        make_folder(tmp_path / "none", tmp_path / "out")
    (tmp_path / "in").mkdir()
    with pytest.raises(ValueError, match="expected images"):
        make_folder(tmp_path / "in", tmp_path / "out")
    (tmp_path / "in" / "a.png").write_bytes(b"bad")
    (tmp_path / "in" / "a.txt").write_text("a")
    with pytest.raises(ValueError, match="all 1 records for train were left out"):
        make_folder(tmp_path / "in", tmp_path / "out", validation_share=0)
    with pytest.raises(ValueError, match="pass validation_share=0"):
        make_folder(tmp_path / "in", tmp_path / "out")
    with pytest.raises(ValueError, match="from 0 up to 1, got 1"):
        make_folder(tmp_path / "in", tmp_path / "out", validation_share=1)


def test_equal_captions_stay_on_one_side(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for i in range(40):
        (tmp_path / "in" / f"{i}.png").write_bytes(picture((i, 0, 0)))
        (tmp_path / "in" / f"{i}.txt").write_text(f"Kind {i % 10}" if i % 2 else f" kind {i % 10}")
    summary = make_folder(tmp_path / "in", tmp_path / "out", validation_share=0.2)
    assert summary.validation_samples == 8
    sides = [{s.group for s in read_all(tmp_path / "out" / s)} for s in ("train", "validation")]
    assert len(sides[0]) == 8 and len(sides[1]) == 2 and not sides[0] & sides[1]


def table_rows() -> list[tuple[str, str]]:
    return [("a.png", "one"), ("b.jpg", "two"), ("a.png", "uno"), ("gone.png", "x"), ("c.png", "")]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_tables_of_every_kind(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "a.png").write_bytes(picture())
    (tmp_path / "b.jpg").write_bytes(picture(kind="JPEG"))
    (tmp_path / "c.png").write_bytes(picture())
    rows = [("filepath", "title"), *table_rows()]
    if suffix == ".jsonl":
        lines = [json.dumps({"filepath": name, "title": [text]}) for name, text in rows[1:]]
    else:
        lines = [("," if suffix == ".csv" else "\t").join(row) for row in rows]
    table = tmp_path / f"table{suffix}"
    table.write_text("\n".join(lines), encoding="utf-8-sig")
    summary = make_table(table, tmp_path / "out", validation_share=0)
    assert summary.skipped == {"missing image": 1, "missing caption": 1}
    read = {s.captions for s in read_all(tmp_path / "out" / "train")}
    assert read == {("one", "uno"), ("two",)}


def test_table_columns_may_be_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture())
    table = tmp_path / "t.csv"
    table.write_text("pic,english,french\na.png,cat,chat\n")
    columns = TableColumns("pic", ("english", "french"))
    make_table(table, tmp_path / "out", columns=columns, validation_share=0)
    assert [s.captions for s in read_all(tmp_path / "out" / "train")] == [("cat", "chat")]
    with pytest.raises(ValueError, match=r"captions: expected .*'frensh'.*nearest is 'french'"):
        make_table(table, tmp_path / "out", columns=TableColumns("pic", ("frensh",)))
    with pytest.raises(ValueError, match=r"image: expected a column named one of image, "):
        make_table(table, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("t.csv", b"", "expected rows"),
        ("t.csv", b"image,caption\n", "expected rows"),
        ("t.csv", b"image,caption\n\xff\xfe,a\n", "expected UTF-8"),
        ("t.jsonl", b'{"image": 1}\nnope\n', ":2: expected a JSON object"),
        ("t.jsonl", b"[1]\n", ":1: expected a JSON object"),
        ("t.xlsx", b"", "ending in .csv, .tsv or .jsonl"),
        ("t.csv", b"image,caption\nno.png,a\n", "all 1 records"),
    ],
)
def test_unfit_tables_are_errors(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        make_table(tmp_path / name, tmp_path / "out", validation_share=0)


def test_a_missing_table_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="table: expected a file"):
        make_table(tmp_path / "t.csv", tmp_path / "out")
