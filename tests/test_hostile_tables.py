"""Tables that list what is no image, and captions without end."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from tiny_shards import picture

from gradcache_clip.cli import main
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
