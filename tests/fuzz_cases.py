"""Cases of the fuzzer: seeds with some bytes changed, and files built of hostile parts."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import struct
import tarfile
from typing import Any

import pyarrow
from fuzz_corpus import CONFIG, EDITS, LINES, NUMBERS, SEEDS, edited
from hypothesis import strategies as st
from pyarrow import parquet
from tiny_shards import picture

Case = tuple[str, bytes]
"""A kind of `fuzz_child.TARGETS`, and the bytes of its file."""

_texts = st.text(max_size=6) | st.sampled_from(["\r\n", "\ud800", "a" * 300])
_leaves = (
    st.none()
    | st.booleans()
    | st.sampled_from(NUMBERS)
    | st.floats()
    | _texts
    | st.sampled_from(["/dev/zero", "..", "", "0.png", "F32", "U8", "hf-hub:a/b", "${data.train}"])
)
VALUES = st.recursive(
    _leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_texts, inner, max_size=3),
    max_leaves=6,
)
_KEYS = [
    "program", "data", "data.train", "data.validation", "data.image_size", "data.vocab_size",
    "data.workers", "data.shuffle_buffer", "data.tokenizer", "data.max_broken_share",
    "data.allow_url_schemes", "data.random_crop", "data.context_length", "model", "model.image",
    "model.image_kwargs", "model.text", "model.text_kwargs", "model.feature_dim", "model.freeze",
    "loss", "loss.name", "loss.matryoshka", "loss.positives", "train", "train.batch_size",
    "train.chunk_size", "train.steps", "train.device", "train.precision", "train.ema_decay",
    "train.output", "train.compile", "optimizer", "optimizer.learning_rate", "optimizer.name",
    "distributed.strategy", "distributed.timeout_s", "evaluation.recall_at", "other.key",
]  # fmt: skip


@st.composite
def edits_of_seeds(draw: Any) -> Case:
    kind = draw(st.sampled_from(sorted(SEEDS)))
    content = edited(draw(st.sampled_from(SEEDS[kind])), draw(EDITS))
    name = {"checkpoint": content.partition(b"\n")[0]}.get(kind)
    return kind, content if name is None or name in _names() else SEEDS[kind][0]


def _names() -> set[bytes]:
    return {seed.partition(b"\n")[0] for seed in SEEDS["checkpoint"]}


def replaced(value: Any, path: list[int], new: Any) -> Any:
    """A copy of nested JSON with something else at a place."""
    if not path or not isinstance(value, dict | list) or not value:
        return new
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key = keys[path[0] % len(keys)]
    items = value.items() if isinstance(value, dict) else enumerate(value)
    made = {k: replaced(v, path[1:], new) if k == key else v for k, v in items}
    return made if isinstance(value, dict) else list(made.values())


_paths = st.lists(st.integers(0, 9), max_size=5)


@st.composite
def changed_json(draw: Any) -> Case:
    """Files that are JSON, or begin with it, with another value somewhere."""
    kind = draw(st.sampled_from(["manifest", "index", *["checkpoint"] * 4]))
    seed = draw(st.sampled_from(SEEDS[kind]))
    name, line, content = seed.rpartition(b"\n") if kind == "checkpoint" else (b"", b"", seed)
    if kind == "checkpoint":
        name, line, content = seed.partition(b"\n")
    if not name.endswith(b"safetensors") and kind != "index":
        return kind, name + line + _changed(draw, content)
    (size,) = struct.unpack("<Q", content[:8])
    header = _changed(draw, content[8 : 8 + size])
    return kind, name + line + struct.pack("<Q", len(header)) + header + content[8 + size :]


def _changed(draw: Any, content: bytes) -> bytes:
    return json.dumps(replaced(json.loads(content), draw(_paths), draw(VALUES))).encode()


@st.composite
def configs(draw: Any) -> Case:
    """YAML, of which JSON is a part, with other values of known keys."""
    import yaml

    found = yaml.safe_load(CONFIG)
    for key in draw(st.lists(st.sampled_from(_KEYS), min_size=1, max_size=3)):
        *sections, name = key.split(".")
        place = found
        for section in sections:
            if not isinstance(place.get(section), dict):
                place[section] = {}
            place = place[section]
        place[name] = draw(VALUES)
    return "config", json.dumps(found).encode("utf-8", "surrogatepass")


@st.composite
def rows(draw: Any) -> Case:
    kind = draw(st.sampled_from(["jsonl", "csv", "image csv", "image jsonl"]))
    names = ["image", "caption"] if "image" in kind else ["anchor", "positive"]
    listed = draw(
        st.lists(st.fixed_dictionaries({}, optional=dict.fromkeys(names, VALUES)), max_size=4)
    )
    if kind.endswith("jsonl"):
        return kind, LINES * ("image" not in kind) + b"".join(_line(row) for row in listed)
    cells = (",".join(str(row.get(name, "")) for name in names) for row in listed)
    return kind, "\n".join([",".join(names), *cells]).encode("utf-8", "surrogatepass")


def _line(row: Any) -> bytes:
    return json.dumps(row).encode() + b"\n"


TYPES = [
    tarfile.REGTYPE, tarfile.REGTYPE, tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE,
    tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.GNUTYPE_SPARSE, tarfile.XHDTYPE,
    tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, b"9", b"\0",
]  # fmt: skip
_names_in_tars = st.sampled_from(
    [
        "a.png",
        "a.txt",
        "a.json",
        "b.webp",
        "b.cls",
        "v1.2.png",
        "é.txt",
        "../c.png",
        ".png",
        "d",
        "/",
    ]
)
_contents = st.sampled_from(
    [picture(), b"a caption", b'{"captions": ["a"]}', b"[" * 2000, b"", b"x\0.png", b"\xff.txt"]
) | st.binary(max_size=40)
_records = st.tuples(
    st.sampled_from([b"path", b"size", b"hdrcharset", b"GNU.sparse.major", b"GNU.sparse.map",
                     b"GNU.sparse.size", b"GNU.sparse.name", b"linkpath", b"mtime", b""]),
    st.sampled_from([b"a.png", b"-5", b"9" * 30, b"0", b"1,2,3", b"BINARY", b"\xff", b"1.5", b""]),
    st.sampled_from([0, 0, 0, 0, -1, 5, 10**6]),
)  # fmt: skip


def pax(records: list[tuple[bytes, bytes, int]]) -> bytes:
    return b"".join(
        b"%d %s=%s\n" % (len(key) + len(value) + 5 + delta, key, value)
        for key, value, delta in records
    )


def block(name: str, size: int, kind: bytes) -> bytes:
    """A header with a right sum, also where a size is beyond what tarfile would write."""
    header = tarfile.TarInfo(name)
    made = bytearray(header.tobuf(tarfile.GNU_FORMAT))
    made[124:136] = (
        b"%011o\0" % size if 0 <= size < 8**11 else b"\x80" + (size % 2**88).to_bytes(11, "big")
    )
    made[156:157] = kind
    made[148:156] = b" " * 8
    made[148:156] = b"%06o\0 " % sum(made)
    return bytes(made)


@st.composite
def members(draw: Any) -> bytes:
    kind = draw(st.sampled_from(TYPES))
    content = draw(_contents)
    if kind in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE):
        content = pax(draw(st.lists(_records, max_size=4)))
    size = draw(st.sampled_from([len(content)] * 8 + [*NUMBERS]))
    made = block(draw(_names_in_tars), size, kind) + content + bytes(-len(content) % 512)
    return made * draw(st.sampled_from([1] * 9 + [40]))


@st.composite
def tars(draw: Any) -> Case:
    """Archives of members of all types, with sizes that are not theirs, compressed or not."""
    content = b"".join(draw(st.lists(members(), max_size=6))) + bytes(
        draw(st.sampled_from([1024, 0]))
    )
    pack = draw(st.sampled_from([None] * 5 + [gzip.compress, bz2.compress, lzma.compress]))
    if pack is not None:
        return "stream", pack(content)
    return draw(st.sampled_from(["shard", "stream"])), content


ARRAYS = [
    pyarrow.array(["a", None, "é"]),
    pyarrow.array(["", "b", "c"], pyarrow.large_string()),
    pyarrow.array(["a", "b", "c"], pyarrow.string_view()),
    pyarrow.array([b"\xff", b"", None]),
    pyarrow.array(["a", "b", "a"]).dictionary_encode(),
    pyarrow.array([1, None, -1]),
    pyarrow.array([1.5, float("nan"), None]),
    pyarrow.nulls(3),
    pyarrow.array([["a"], [], None]),
    pyarrow.array([{"a": "b"}, None, {"a": None}]),
    pyarrow.array([0, 1, 2], pyarrow.timestamp("ns")),
    pyarrow.array(["x" * 70_000] * 3),
]


@st.composite
def tables(draw: Any) -> Case:
    """Columns of all types, twice of one name or of none, in Parquet and Arrow files."""
    names = st.sampled_from(["anchor", "positive", "positive", "", "a.b", "é"])
    columns = draw(st.lists(st.tuples(names, st.sampled_from(ARRAYS)), max_size=4))
    if not any(name == "anchor" for name, _ in columns):
        columns += [("anchor", ARRAYS[0]), ("positive", draw(st.sampled_from(ARRAYS)))]
    table = pyarrow.table([array for _, array in columns], [name for name, _ in columns])
    kind, file = draw(st.sampled_from(["parquet", "arrow"])), io.BytesIO()
    if kind == "parquet":
        compression = draw(st.sampled_from(["none", "snappy", "gzip", "zstd"]))
        parquet.write_table(table, file, compression=compression)
    else:
        options = pyarrow.ipc.IpcWriteOptions(compression=draw(st.sampled_from([None, "lz4"])))
        with pyarrow.ipc.new_stream(file, table.schema, options=options) as writer:
            writer.write_table(table)
    return kind, edited(file.getvalue(), draw(EDITS))


CASES = st.one_of(
    edits_of_seeds(), edits_of_seeds(), changed_json(), configs(), rows(), tars(), tables()
)
