"""Tables that list what is no image, and captions without end."""

from __future__ import annotations

import gzip
import io
import json
import os
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet
from tiny_shards import picture

from gradcache_clip.cli import main
from gradcache_clip.train.config_errors import ConfigError
from gradcache_clip.train.data import TextRows, text_batches, text_rows
from gradcache_clip.train.data.broken import BrokenReport
from gradcache_clip.train.data.decode import BrokenSample, decode_image
from gradcache_clip.train.sources.shards import read_manifest
from gradcache_clip.train.tokenizer import train_tokenizer


def rows(folder: Path, *more: dict[str, object]) -> Path:
    """A table of eight images of its own, and other rows."""
    for number in range(8):
        (folder / f"{number}.png").write_bytes(picture(number))
    good = [{"image": f"{number}.png", "caption": f"number {number}"} for number in range(8)]
    table = folder / "table.jsonl"
    table.write_text("".join(f"{json.dumps(row)}\n" for row in (*good, *more)))
    return table


def test_what_is_no_file_is_skipped_and_counted(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    names = ["/dev/zero", "pipe.png", "folder.png", "none.png", "a\0b.png", "."]
    bad = [{"image": name, "caption": "bad"} for name in names]
    long = {"image": "7.png", "caption": "x" * 100_000}
    table = rows(tmp_path, *bad, long)
    assert main(["data", "csv", str(table), str(tmp_path / "out")]) == 0
    skipped: dict[str, int] = {}
    for split in ("train", "validation"):
        for reason, count in read_manifest(tmp_path / "out" / split).skipped.items():
            skipped[reason] = skipped.get(reason, 0) + count
    assert skipped["not a plain file"] == 4
    assert skipped["missing image"] == 2
    assert skipped["caption too long"] == 1


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "t.csv",
            "image,caption\n0.png," + "x" * 2**25 + "\n",
            "near line 2: expected a row",
        ),
        ("t.csv", 'image,caption\n"0.png,a\n', "no usable"),
        ("t.jsonl", "[" * 100_000, "t.jsonl:1: expected a JSON object"),
    ],
)
def test_tables_end_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, text: str, message: str
) -> None:
    (tmp_path / name).write_text(text)
    assert main(["data", "csv", str(tmp_path / name), str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert len(line) < 1000
    if message != "no usable":
        assert message in line


def test_one_word_without_end_costs_no_time() -> None:
    """Merging would take the square of its length."""
    assert train_tokenizer(["a red heart", "x" * 5_000_000], vocab_size=300).vocab_size <= 300


PAIR = ("anchor", "positive")
ROW = b'{"anchor": "q", "positive": "d"}\n'


def test_long_texts_are_counted_by_reason(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    long = {"anchor": "q", "positive": "d" * 2**16 + "d"}
    path.write_bytes(ROW + json.dumps(long).encode() + b"\n" + ROW)
    first, second, third = map(TextRows(path, PAIR).read, range(3))
    assert first == third == ("q", "d")
    assert second == BrokenReport("positive too long", str(path), "line 2")


def test_a_line_without_end_is_one_broken_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place, name in ((text_batches, "_CHUNK_BYTES"), (text_batches, "MAX_LINE_BYTES")):
        monkeypatch.setattr(place, name, 2**12)
    monkeypatch.setattr(text_rows, "MAX_LINE_BYTES", 2**12)
    path = tmp_path / "a.jsonl"
    path.write_bytes(ROW + b"x" * 2**22 + b"\n" + ROW)
    tracemalloc.start()
    lengths = [len(line) for part in batches(path) for line in part["text"].to_pylist()]
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
    assert len(lengths) == 3 and 2**12 < lengths[1] < 2**14
    found = [*map(TextRows(path, PAIR).read, range(3))]
    assert found == [("q", "d"), BrokenReport("line too long", str(path), "line 2"), ("q", "d")]


def batches(path: Path) -> Iterator[Any]:
    return text_batches.batches_of(path.suffix, [str(path)])


@pytest.mark.parametrize("kind", ["string", "large_string", "large_binary"])
def test_a_few_bytes_do_not_become_gigabytes(tmp_path: Path, kind: str) -> None:
    """Half a million equal texts of 256 KiB, 130 GB, in a file of some KB."""
    text = pyarrow.array(["x" * 2**18], getattr(pyarrow, kind)())
    column = pyarrow.DictionaryArray.from_arrays(np.zeros(500_000, np.int32), text)
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"anchor": column, "positive": column}), path)
    assert path.stat().st_size < 2**20
    before = pyarrow.total_allocated_bytes()
    with pytest.raises(ValueError, match=r"rows of more than 100 times the bytes of .*a\.parquet"):
        for _ in batches(path):
            assert pyarrow.total_allocated_bytes() - before < 2**28
    with pytest.raises(
        ConfigError, match=r"a\.parquet: expected \.parquet files .* got ValueError"
    ):
        TextRows(path, PAIR)


def test_a_text_of_parquet_that_is_no_utf8_is_one_broken_row(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"anchor": ["one", "two"], "positive": ["d", "d"]})
    parquet.write_table(table, path, compression="none", use_dictionary=False)
    path.write_bytes(path.read_bytes().replace(b"two", b"\xfftw"))
    found = [*map(TextRows(path, PAIR).read, range(2))]
    assert found == [("one", "d"), BrokenReport("bad utf-8", str(path), "row 2")]


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet", "a.arrow"])
def test_compressed_tables_are_not_unpacked(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(gzip.compress(b"anchor,positive\n" + b"q,d\n" * 10**6))
    if name == "a.jsonl":
        rows = TextRows(tmp_path, PAIR)
        reasons = {rows.read(number).reason for number in range(len(rows))}
        assert len(rows) < 1000 and reasons <= {"bad json", "bad utf-8"}
        return
    with pytest.raises(ConfigError, match=f"expected \\.{name[2:]} files"):
        TextRows(tmp_path, PAIR)


def test_an_arrow_file_leads_nowhere_but_into_itself(tmp_path: Path) -> None:
    table = pyarrow.table({"anchor": ["a", "b"], "positive": ["a", "b"]})
    with pyarrow.ipc.new_stream(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    content = (tmp_path / "a.arrow").read_bytes()
    ends, forged = np.array([[0, 1, 2], [0, 2**30, 2]], np.int32)
    assert content.count(ends.tobytes()) == 2
    (tmp_path / "a.arrow").write_bytes(content.replace(ends.tobytes(), forged.tobytes()))
    with pytest.raises(ConfigError, match=r"a\.arrow: expected \.arrow files .* ArrowInvalid"):
        TextRows(tmp_path, PAIR)


def test_one_bad_record_stops_no_other(tmp_path: Path) -> None:
    """Names and captions that are no UTF-8, in a folder, a table and COCO's format."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name in (b"a", b"b", b"caf\xe9", b"latin"):
        stem = folder / os.fsdecode(name)
        stem.with_suffix(".png").write_bytes(picture(len(name)))
        stem.with_suffix(".txt").write_bytes(b"caption of " + name[:3])
    (folder / "latin.txt").write_bytes(b"\xe9")
    listed = [
        {"id": 1, "file_name": "a.png"},
        {"id": 2, "file_name": "b.png"},
        {"id": 3, "file_name": "\ud800.png"},
    ]
    captions = ["a", "\ud800", "c"]
    notes = [{"image_id": n, "caption": text} for n, text in enumerate(captions, 1)]
    (tmp_path / "c.json").write_text(json.dumps({"images": listed, "annotations": notes}))
    table = [
        {"image": f"images/{name}", "caption": text}
        for name, text in (("a.png", "a"), ("b.png", "\ud800"), ("\ud800.png", "c"))
    ]
    (tmp_path / "t.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in table))
    share = ("--validation-share", "0")
    skipped = {}
    for kind, *places in (
        ("folder", folder),
        ("csv", tmp_path / "t.jsonl"),
        ("coco", tmp_path / "c.json", folder),
    ):
        out = tmp_path / f"out-{kind}"
        assert main(["data", kind, *map(str, places), str(out), *share]) == 0
        manifest = read_manifest(out / "train")
        skipped[kind] = (manifest.samples, *sorted(manifest.skipped))
    assert skipped == {
        "folder": (3, "bad utf-8"),
        "csv": (1, "bad utf-8", "missing image"),
        "coco": (1, "bad utf-8", "missing image"),
    }


def test_manifests_of_nonsense_are_refused(tmp_path: Path) -> None:
    assert main(["data", "csv", str(rows(tmp_path)), str(tmp_path / "out")]) == 0
    path = tmp_path / "out" / "train" / "manifest.json"
    for name, value in (("samples", "many"), ("samples", -5), ("skipped", {"x": None})):
        fields = json.loads(path.read_text())
        fields["shards"][0]["samples"] = 1
        if name == "samples":
            fields["shards"][0][name] = value
        fields[name] = value
        path.write_text(json.dumps(fields))
        with pytest.raises(ValueError, match=r"manifest\.json: expected a manif.* a count that"):
            read_manifest(path.parent)


def test_a_jpeg_of_endless_scans_is_a_broken_sample() -> None:
    file = io.BytesIO()
    Image.new("L", (64, 64), 128).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    scan = data[data.rindex(b"\xff\xda") : -2]
    decode_image(data[:-2] + scan * 20 + data[-2:])
    with pytest.raises(BrokenSample, match="too many scans"):
        decode_image(data[:-2] + scan * 200 + data[-2:])
