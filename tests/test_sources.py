"""Writing shards: bytes, manifests, and what is refused."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
from tiny_shards import picture

from gradcache_clip.train.sources import Sample, read_manifest, verify_manifest, write_shards


def samples(count: int) -> list[Sample]:
    return [
        Sample(f"k{i}", picture((i, 2 * i, 3)), "png", (f"caption {i}", f"other {i}"), f"g{i}")
        for i in range(count)
    ]


def write(out: Path, count: int = 5, shard_size: int = 2) -> None:
    write_shards(samples(count), out, shard_size=shard_size, source="test", license="CC0-1.0")


def test_shards_hold_image_text_and_json_and_a_manifest_that_fits(tmp_path: Path) -> None:
    write(tmp_path)
    manifest = read_manifest(tmp_path)
    assert [s.samples for s in manifest.shards] == [2, 2, 1]
    assert (manifest.samples, manifest.source, manifest.license) == (5, "test", "CC0-1.0")
    assert json.loads((tmp_path / "manifest.json").read_text())["format"] == 1
    with tarfile.open(tmp_path / "shard-000001.tar") as archive:
        assert archive.getnames() == [
            f"k{i}.{end}" for i in (2, 3) for end in ("png", "txt", "json")
        ]
        assert archive.extractfile("k2.png").read() == picture((2, 4, 3))
        assert archive.extractfile("k2.txt").read() == b"caption 2"
        notes = json.load(archive.extractfile("k2.json"))
    assert notes == {"captions": ["caption 2", "other 2"], "group": "g2"}
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "manifest.json",
        *(f"shard-{i:06d}.tar" for i in range(3)),
    ]


def test_equal_samples_give_equal_bytes(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write(tmp_path / folder)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_webdataset_itself_reads_the_shards(tmp_path: Path) -> None:
    from webdataset.tariterators import group_by_keys, tar_file_expander

    write(tmp_path)
    with (tmp_path / "shard-000001.tar").open("rb") as file:
        read = list(group_by_keys(tar_file_expander([{"url": "shard", "stream": file}])))
    assert [row["__key__"] for row in read] == ["k2", "k3"]
    assert read[0]["txt"] == b"caption 2" and read[0]["png"] == picture((2, 4, 3))


def test_verification_finds_missing_short_and_altered_shards(tmp_path: Path) -> None:
    write(tmp_path)
    assert verify_manifest(tmp_path, hashes=True) == []
    altered = tmp_path / "shard-000000.tar"
    data = bytearray(altered.read_bytes())
    data[600] ^= 1
    altered.write_bytes(bytes(data))
    assert verify_manifest(tmp_path) == []
    assert "sha256" in verify_manifest(tmp_path, hashes=True)[0]
    (tmp_path / "shard-000001.tar").unlink()
    (tmp_path / "shard-000002.tar").write_bytes(b"short")
    problems = verify_manifest(tmp_path)
    assert "missing" in problems[0] and "got 5" in problems[1]


@pytest.mark.parametrize("name", ["../../etc/passwd.tar", "pipe:ls.tar", "/tmp/a.tar", "a", 3])
def test_a_manifest_cannot_lead_elsewhere(tmp_path: Path, name: object) -> None:
    write(tmp_path)
    text = json.loads((tmp_path / "manifest.json").read_text())
    text["shards"][0]["name"] = name
    (tmp_path / "manifest.json").write_text(json.dumps(text))
    with pytest.raises(ValueError, match="expected file names such as"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 2, "shards": []}', '{"format": 1}'])
def test_an_unfit_manifest_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match="expected a manifest of format 1"):
        read_manifest(tmp_path)


def test_a_failed_write_leaves_neither_manifest_nor_partial_file(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(ValueError, match="'k0' twice"):
        write_shards([*samples(3), *samples(1)], tmp_path, source="test", license="CC0-1.0")
    assert not (tmp_path / "manifest.json").exists()
    assert not list(tmp_path.glob("*.partial"))


def test_no_samples_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected at least one"):
        write(tmp_path, count=0)
    with pytest.raises(ValueError, match="shard_size: expected a positive integer, got 0"):
        write(tmp_path, shard_size=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key": "a.b"}, "key"),
        ({"key": "../a"}, "key"),
        ({"key": "__meta__"}, "key"),
        ({"key": ""}, "key"),
        ({"extension": "pkl"}, "extension"),
        ({"captions": ()}, "captions"),
        ({"captions": ("a", " \n")}, "captions"),
    ],
)
def test_unfit_samples_are_refused(changes: dict[str, object], message: str) -> None:
    fields = {"key": "k", "image": b"", "extension": "png", "captions": ("a",), "group": "g"}
    with pytest.raises(ValueError, match=f"^{message}: expected"):
        Sample(**{**fields, **changes})  # type: ignore[arg-type]
