"""The emoji, from tarballs in the layout of the real ones, and their download."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import subprocess
import tarfile
from collections.abc import Sequence
from pathlib import Path

import emoji
import npm
import pytest
from emoji import FLUENT, GOOGLE, NAMES, PACKAGES, TWITTER, make_emoji
from npm import NpmPackage, fetch_packages, read_members
from tiny_shards import picture

from gradcache_clip.train.data import read_all
from gradcache_clip.train.data.samples import LoaderOptions
from gradcache_clip.train.sources import DataSummary


def tarball(path: Path, members: dict[str, bytes]) -> str:
    with tarfile.open(path, "w:gz") as archive:
        for name, data in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            archive.addfile(header, io.BytesIO(data))
    return base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()


def emoji_rows(bases: int) -> list[dict[str, object]]:
    rows = []
    for i in range(bases):
        code = f"1F6{i:02X}"
        skins = [{"label": f"face {i}: {t} skin tone", "hexcode": f"{code}-1F3F{t}"} for t in "BC"]
        row = {"label": f"face {i}", "hexcode": code, "tags": ["a", "b"], "skins": skins}
        rows.append({**row, "subgroup": i % 2})
    rows[0]["hexcode"] = "1F600-FE0F"
    del rows[1]["tags"]
    del rows[2]["subgroup"]
    return rows


def emoji_packages(cache: Path, bases: int = 8) -> list[NpmPackage]:
    cache.mkdir(exist_ok=True)
    rows = emoji_rows(bases)
    codes = [str(v["hexcode"]).lower() for r in rows for v in (r, *r["skins"])]  # type: ignore[misc]
    clear = picture((255, 0, 0, 0), mode="RGBA")
    png = {f"{code}.png": clear for code in codes}
    webp = {f"{c.replace('-', '_')}.webp": picture((1, 2, 3), kind="WEBP") for c in codes[:4]}
    members = {
        NAMES: {
            "package/en/data.json": json.dumps(rows).encode(),
            "package/meta/groups.json": b'{"subgroups": {"0": "face-smiling", "1": "cat-face"}}',
        },
        GOOGLE: {f"package/img/google/64/{name}": data for name, data in png.items()},
        TWITTER: {f"package/img/twitter/64/{name}": data for name, data in png.items()},
        FLUENT: {f"package/assets/{name}": data for name, data in webp.items()},
    }
    # Twice the same emoji, an unknown one, and a name that leads out of the folder.
    members[GOOGLE]["package/img/google/64/1f600.png"] = clear
    members[GOOGLE]["package/img/google/64/ffff.png"] = clear
    members[TWITTER]["package/img/twitter/64/../../../../evil.png"] = clear
    packages = []
    for package, files in members.items():
        digest = tarball(cache / package.file_name, files)
        packages.append(NpmPackage(package.name, package.version, digest))
    return packages


def made(tmp_path: Path, packages: Sequence[NpmPackage] | None = None) -> DataSummary:
    packages = packages or emoji_packages(tmp_path / "cache")
    return make_emoji(
        tmp_path / "out",
        cache_dir=tmp_path / "cache",
        validation_share=0.25,
        packages=packages,
    )


def test_emoji_join_vendors_with_names(tmp_path: Path) -> None:
    summary = made(tmp_path)
    assert summary.train_samples + summary.validation_samples == 24 + 24 + 4
    parts = ("train", "validation")
    train, held_out = (list(read_all(tmp_path / "out" / part)) for part in parts)
    assert len(train) == summary.train_samples
    assert len({s.key for s in train + held_out}) == 52
    by_key = {sample.key: sample for sample in train + held_out}
    assert by_key["google-1F600"].captions[0] == "face 0"
    assert by_key["fluent-1F600-1F3FB"].captions[0] == "face 0: B skin tone"
    unlabelled = {sample.label for sample in train + held_out}
    assert unlabelled == {""}, "labels are for sets read without captions"
    options = LoaderOptions(captions=False)
    classed = (s for part in parts for s in read_all(tmp_path / "out" / part, options=options))
    labels = {sample.group: sample.label for sample in classed}
    assert labels["1F600"] == labels["1F600-1F3FB"] == labels["1F604"] == "face-smiling"
    assert labels["1F601"] == "cat-face" and labels["1F602"] == ""
    assert {s.group for s in train if s.captions[0] == "face 1"} <= {"1F601"}
    for sample in train:
        tags = () if sample.group.startswith("1F601") else (f"{sample.captions[0]}: a, b",)
        assert sample.captions[1:] == tags
    assert all(len(sample.captions) == 1 for sample in held_out)
    # Fully transparent red shows as white.
    assert int(by_key["google-1F602"].image.min()) == 255
    assert "CC-BY" in (tmp_path / "out" / "LICENSES.txt").read_text()
    assert not list(tmp_path.rglob("evil.png"))


def test_emoji_split_keeps_variants_and_vendors_together(tmp_path: Path) -> None:
    made(tmp_path)
    sides = [
        {sample.group.split("-")[0] for sample in read_all(tmp_path / "out" / split)}
        for split in ("train", "validation")
    ]
    assert len(sides[1]) == 2 and len(sides[0]) == 6
    assert not sides[0] & sides[1]


def test_a_second_emoji_run_returns_at_once(tmp_path: Path) -> None:
    packages = emoji_packages(tmp_path / "cache")
    first = made(tmp_path, packages)
    for file in (tmp_path / "cache").iterdir():
        file.unlink()
    second = made(tmp_path, packages)
    assert second.reused and not first.reused
    assert (second.train_samples, second.bytes) == (first.train_samples, first.bytes)


def test_a_damaged_output_is_made_again_and_another_one_is_kept(tmp_path: Path) -> None:
    packages = emoji_packages(tmp_path / "cache")
    made(tmp_path, packages)
    shard = tmp_path / "out" / "train" / "shard-000000.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:1000])
    assert not made(tmp_path, packages).reused
    assert shard.read_bytes() == whole
    with pytest.raises(ValueError, match=r"\{'seed': 1\}, got shards of \{'seed': 0\}; choose"):
        make_emoji(
            tmp_path / "out",
            cache_dir=tmp_path / "cache",
            validation_share=0.25,
            seed=1,
            packages=packages,
        )
    assert shard.read_bytes() == whole


def test_without_npm_the_error_says_what_needs_no_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(npm.shutil, "which", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"make demo DATA=glyphs.*data/glyphs.py OUT"):
        make_emoji(tmp_path / "out", cache_dir=tmp_path / "cache")


def fake_npm(monkeypatch: pytest.MonkeyPatch, data: bytes | Exception) -> list[list[str]]:
    commands: list[list[str]] = []

    def run(command: list[str], *, cwd: Path, **options: object) -> None:
        assert "shell" not in options and options["timeout"]
        commands.append(command)
        if isinstance(data, Exception):
            raise data
        (cwd / NAMES.file_name).write_bytes(data)

    monkeypatch.setattr(npm.shutil, "which", lambda name: "/usr/bin/npm")
    monkeypatch.setattr(npm.subprocess, "run", run)
    return commands


def test_a_download_is_checked_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = base64.b64encode(hashlib.sha512(b"good").digest()).decode()
    package = NpmPackage(NAMES.name, NAMES.version, digest)
    commands = fake_npm(monkeypatch, b"good")
    (tmp_path / NAMES.file_name).write_bytes(b"damaged")
    for _ in range(2):
        path = fetch_packages([package], tmp_path)[NAMES.name]
        assert path.read_bytes() == b"good"
    assert commands == [
        ["/usr/bin/npm", "pack", "emojibase-data@17.0.0", "--ignore-scripts", "--silent"]
    ]
    assert [p.name for p in tmp_path.iterdir()] == [NAMES.file_name]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"other", "expected sha512 .* got "),
        (subprocess.CalledProcessError(1, "npm", stderr="E404\nno network"), "E404 no network"),
        (subprocess.TimeoutExpired("npm", 900), "expected an end within 900 s"),
    ],
)
def test_a_failed_download_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes | Exception, message: str
) -> None:
    fake_npm(monkeypatch, data)
    with pytest.raises(RuntimeError, match=message):
        fetch_packages([NAMES], tmp_path)
    assert not list(tmp_path.iterdir())


def test_pinned_digests_are_sha512() -> None:
    assert all(len(base64.b64decode(package.sha512)) == 64 for package in PACKAGES)
    assert FLUENT.file_name == "lobehub-fluent-emoji-3d-1.1.0.tgz"


def test_links_in_a_tarball_are_not_followed(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tgz", "w:gz") as archive:
        link = tarfile.TarInfo("package/secret.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        archive.addfile(link)
    assert list(read_members(tmp_path / "a.tgz", r"package/.*\.png")) == []


def test_npm_that_fails_ends_the_script_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    fake_npm(monkeypatch, subprocess.CalledProcessError(1, "npm", stderr="E404"))
    assert emoji.main([str(tmp_path / "out"), "--cache-dir", str(tmp_path / "cache")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "npm pack emojibase-data@17.0.0: expected a tarball, got exit code 1 (E404)" in line
