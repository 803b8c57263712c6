"""Files of a folder that cannot be used are counted by reason, never mangled."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_shards import picture

from gradcache_clip.train.data import read_all
from gradcache_clip.train.sources import make_folder


def test_captions_that_are_no_utf8_are_counted(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name, text in (
        ("good", "ein Kätzchen".encode()),
        ("bad", "ein Kätzchen".encode("latin-1")),
    ):
        (folder / f"{name}.png").write_bytes(picture())
        (folder / f"{name}.txt").write_bytes(text)
    summary = make_folder(folder, tmp_path / "out", validation_share=0)
    assert summary.train_samples == 1 and summary.skipped == {"bad utf-8": 1}
    assert [s.captions for s in read_all(tmp_path / "out" / "train")] == [("ein Kätzchen",)]


def test_images_of_other_formats_are_counted_when_they_have_a_text(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a.png", "b.gif", "c.BMP", "d.tiff", "e.gif"):
        (folder / name).write_bytes(picture())
        (folder / name).with_suffix(".txt").write_text(f"the picture {name}")
    (folder / "no-text.gif").write_bytes(picture())
    summary = make_folder(folder, tmp_path / "out", validation_share=0)
    assert summary.train_samples == 1
    assert summary.skipped == {
        "unsupported format .gif": 2,
        "unsupported format .bmp": 1,
        "unsupported format .tiff": 1,
    }
    (folder / "a.png").unlink()
    with pytest.raises(ValueError, match=r"all 4 records .*unsupported format .gif"):
        make_folder(folder, tmp_path / "again", validation_share=0)
