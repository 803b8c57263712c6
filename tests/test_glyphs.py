"""Drawn characters, and the command line that the makers of demo data share."""

from __future__ import annotations

from pathlib import Path

import glyphs
import pytest

from gradcache_clip.cli import main
from gradcache_clip.train.data import read_all


def test_glyphs_are_drawn_named_and_split_by_character(tmp_path: Path) -> None:
    summary = glyphs.make_glyphs(tmp_path, characters=60, validation_share=0.2)
    train, held_out = (list(read_all(tmp_path / s)) for s in ("train", "validation"))
    assert summary.train_samples == len(train) and summary.validation_samples == len(held_out)
    assert not {s.group for s in train} & {s.group for s in held_out}
    assert len({s.group for s in train}) == 48 and len({s.group for s in held_out}) == 12
    assert len(train) > 100
    for sample in train:
        assert int(sample.image.min()) < 128 < int(sample.image.max())
        assert sample.captions[0] == sample.captions[0].lower()
    assert glyphs.make_glyphs(tmp_path, characters=60, validation_share=0.2).reused


def test_the_script_makes_shards_once(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for done in ("written", "already there"):
        assert glyphs.main([str(tmp_path), "--characters", "30", "--seed", "3"]) == 0
        line = capsys.readouterr().out
        assert "held-out pairs in 2 shards" in line and line.endswith(f", {done}\n")


def test_a_wrong_setting_ends_the_script_with_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert glyphs.main([str(tmp_path), "--characters", "0"]) == 2
    assert "characters: expected a positive integer, got 0" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["emoji", "glyphs", "wordnet"])
def test_the_package_names_the_script_of_a_demo_set(
    kind: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["data", kind, "out"])
    error = capsys.readouterr().err
    assert f"in a checkout, run `python examples/data/{kind}.py OUT`" in error
    assert (Path(glyphs.__file__).parent / f"{kind}.py").exists()
