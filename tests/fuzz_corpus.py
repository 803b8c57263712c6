"""Seeds of the fuzzer, small and valid, and how they are changed and built anew."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import struct
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pyarrow
import torch
from hypothesis import strategies as st
from pyarrow import parquet
from safetensors.numpy import save
from tiny_shards import good, picture

from gradcache_clip.train.checkpoint import save_checkpoint

NUMBERS = (-1, 0, 1, 2, 7, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63)
WORDS = (
    b"\0", b"\n", b"\r\n", b"\xff\xfe", b'"', b"'", b"{", b"[" * 50, b"]", b"}", b",", b":", b"&a ",
    b"*a", b"!!python/object:os.system", b"${", b"..", b"\\ud800", b"NaN", b"-1", b"1e999", b"null",
    b"../../etc/passwd", b"/dev/zero", b"{0..99999999}", b"%s", b"pipe:true", b"\xc3\x28",
)  # fmt: skip


def tar_bytes(form: int, members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as archive:
        for name, data in members.items():
            header = tarfile.TarInfo(name)
            header.size, header.uname = len(data), "ü"
            archive.addfile(header, io.BytesIO(data))
    return file.getvalue()


NOTES = json.dumps({"captions": ["a", "b"], "group": "g"}).encode()
TARS = [
    tar_bytes(form, good("a") | {"a.json": NOTES} | good(name))
    for form, name in ((tarfile.GNU_FORMAT, "é" * 150), (tarfile.PAX_FORMAT, "é" * 150), (0, "b"))
]
ROWS = [{"anchor": f"q {i}", "positive": f"d é {i}", "more": [i, None]} for i in range(5)]
LINES = "".join(f"{json.dumps(row)}\n" for row in ROWS).encode()
CSV = b'anchor,positive\nq,"d\nd"\nr,"a ""b"""\n\xc3\xa9,NA\n'
CONFIG = b"""program: pairs
data: {train: data/train, validation: '', image_size: 16, workers: 0}
model:
  image: vit_tiny_patch16_224
  image_kwargs: &kwargs {depth: 1, embed_dim: 16}
  text_kwargs: *kwargs
  feature_dim: 8
loss: {name: clip, matryoshka: [4, 8]}
train:
  batch_size: 24
  chunk_size: ${train.batch_size}
  device: cpu
  output: runs/${program}
optimizer: {learning_rate: 1.0e-3}
"""


def tables() -> dict[str, bytes]:
    table = pyarrow.Table.from_pylist(ROWS)
    places = {"parquet": io.BytesIO(), "plain": io.BytesIO(), "arrow": io.BytesIO()}
    parquet.write_table(table, places["parquet"])
    parquet.write_table(table, places["plain"], compression="NONE", use_dictionary=False)
    with pyarrow.ipc.new_stream(places["arrow"], table.schema) as writer:
        writer.write_table(table)
    return {name: file.getvalue() for name, file in places.items()}


def write_checkpoint(folder: Path) -> Path:
    weights = {"weight": torch.ones(3, 2), "bias": torch.zeros(2)}
    modules = {"encoder": {**weights, "tied": weights["bias"]}}
    state = {"rng": torch.arange(8), "names": ["a", None, 1.5], "step": 3}
    return save_checkpoint(folder, 3, modules=modules, state=state)


def checkpoint_files() -> list[bytes]:
    """Name and content of each file."""
    with tempfile.TemporaryDirectory() as place:
        files = sorted(write_checkpoint(Path(place)).iterdir())
        return [path.name.encode() + b"\n" + path.read_bytes() for path in files]


def manifest() -> bytes:
    shard = {"name": "shard-000000.tar", "samples": 2, "bytes": 1, "sha256": ""}
    about = {"source": "s", "license": "l", "settings": {}, "skipped": {"x": 1}}
    return json.dumps({"format": 1, "samples": 2, "shards": [shard], **about}).encode()


def index_bytes() -> bytes:
    columns = {
        "offset": np.array([512, 1536]), "size": np.array([9, 9], np.uint32),
        "extension": np.array([0, 4], np.uint8), "members": np.array([2]),
        "names": np.frombuffer(b"a", np.uint8), "names_end": np.array([1]),
    }  # fmt: skip
    stamp = {"format": "2", "bytes": str(len(TARS[0])), "modified_ns": "1"}
    return save(columns, {**stamp, "reports": '[["bad", "k", 1]]'})


def seeds() -> dict[str, list[bytes]]:
    found = tables()
    images = [picture(kind=kind, size=(9, 7)) for kind in ("PNG", "JPEG", "WEBP")]
    return {
        "image": [*images, picture((1, 2), mode="LA"), picture(3, mode="P")],
        "shard": TARS,
        "stream": [
            *TARS, gzip.compress(TARS[0]), bz2.compress(TARS[1]), lzma.compress(TARS[2])
        ],
        "index": [index_bytes()],
        "manifest": [manifest()],
        "source": [b"a/{0..9}.tar::b/*.tar", b"https://x/{a,b{1..3}}.tar", b"data/**/[a-c].tar"],
        "config": [CONFIG],
        "jsonl": [LINES],
        "csv": [CSV],
        "parquet": [found["parquet"], found["plain"]],
        "arrow": [found["arrow"]],
        "image csv": [b"image,caption\n0.png,a\n/dev/zero,b\n"],
        "image jsonl": [b'{"image": "0.png", "caption": ["a", "b"]}\n{"image": "x.png"}\n'],
        "checkpoint": checkpoint_files(),
    }  # fmt: skip


SEEDS = seeds()


def seed_files(folder: Path) -> None:
    write_checkpoint(folder / "checkpoints")
    (folder / "seed.tar").write_bytes(TARS[0])
    (folder / "seed.png").write_bytes(picture())


_places = st.integers(0, 2**12)
_spans = st.sampled_from([1, 2, 8, 64, 512, 1024])
EDITS = st.lists(
    st.one_of(
        st.tuples(st.just("set"), _places, st.binary(min_size=1, max_size=4)),
        st.tuples(st.just("set"), _places, st.sampled_from(WORDS)),
        st.tuples(
            st.just("set"), _places,
            st.builds(
                lambda number, form: struct.pack(form, number % 2 ** (8 * struct.calcsize(form))),
                st.sampled_from(NUMBERS), st.sampled_from(["<B", "<H", "<I", "<Q", ">I", ">Q"]),
            ),
        ),
        st.tuples(st.just("insert"), _places, st.sampled_from(WORDS)),
        st.tuples(st.just("cut"), _places, st.just(b"")),
        st.tuples(st.just("drop"), _places, _spans.map(bytes)),
        st.tuples(st.just("repeat"), _places, _spans.map(bytes)),
    ),
    max_size=5,
)  # fmt: skip


def edited(content: bytes, edits: list[tuple[str, int, bytes]]) -> bytes:
    for how, place, piece in edits:
        place %= len(content) + 1
        before, after = content[:place], content[place:]
        if how == "set":
            content = before + piece + after[len(piece) :]
        elif how == "insert":
            content = before + piece + after
        elif how == "cut":
            content = before
        elif how == "drop":
            content = before + after[len(piece) :]
        else:
            content = before + after[: len(piece)] * 40 + after
    return content
