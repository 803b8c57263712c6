"""Reads hostile files one after another under a limit on memory; each gets one line of an answer.

A case is a kind and the bytes of its file. The answer is "accepted", "refused" with the message, or
what must not be: "traceback", "memory" or "unclear".
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import resource
import shutil
import struct
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from gradcache_clip.train.checkpoint import CheckpointError, load_checkpoint
from gradcache_clip.train.config_file import load_config
from gradcache_clip.train.data import LoaderOptions, read_all, read_all_texts
from gradcache_clip.train.data.broken import BrokenReport
from gradcache_clip.train.data.decode import BrokenSample, ImageTransform, decode_image
from gradcache_clip.train.data.samples import decode_sample
from gradcache_clip.train.data.shard_urls import Shard, find_shards
from gradcache_clip.train.data.streamed import read_shard
from gradcache_clip.train.programs import program_of
from gradcache_clip.train.sources import make_table

MOST_BYTES = 2**30
OPTIONS = LoaderOptions(image_size=8, max_broken_share=1.0)


def image(path: Path) -> None:
    with contextlib.suppress(BrokenSample):
        decode_image(path.read_bytes(), smallest_side=8)


def shard(path: Path) -> None:
    """Twice: the second time from the index that the first has written."""
    for _ in range(2):
        for _ in read_all(path, options=OPTIONS):
            pass


def stream(path: Path) -> None:
    transform, draw = ImageTransform(8), random.Random(0)
    for sample in read_shard(Shard(str(path)), ()):
        if not isinstance(sample, BrokenReport):
            decode_sample(sample, transform, draw)


def index(path: Path) -> None:
    shutil.copy(path.parent.parent / "seed.tar", tar := path.parent / "a.tar")
    os.utime(tar, ns=(1, 1))
    path.rename(path.parent / "a.tar.index")
    shard(tar)


def manifest(path: Path) -> None:
    shutil.copy(path.parent.parent / "seed.tar", path.parent / "shard-000000.tar")
    shard(path.parent)


def source(path: Path) -> None:
    find_shards(path.read_bytes().decode("utf-8", "replace"))


def config(path: Path) -> None:
    program_of(load_config(path))


def texts(path: Path) -> None:
    for _ in read_all_texts(path, ("anchor", "positive"), max_broken_share=1.0):
        pass


def table(path: Path) -> None:
    (path.parent / "0.png").write_bytes((path.parent.parent / "seed.png").read_bytes())
    make_table(path, path.parent / "out", validation_share=0)


def checkpoint(path: Path) -> None:
    """The file takes the place of one of a checkpoint, whose sizes and digests then agree."""
    name, _, content = path.read_bytes().partition(b"\n")
    folder = path.parent / "step-00000003"
    shutil.copytree(path.parent.parent / "checkpoints" / folder.name, folder)
    (folder / name.decode()).write_bytes(content)
    if name != b"index.json":
        index = json.loads((folder / "index.json").read_text())
        digest = hashlib.sha256(content).hexdigest()
        index["files"][name.decode()] = {"bytes": len(content), "sha256": digest}
        (folder / "index.json").write_text(json.dumps(index))
    load_checkpoint(folder)


TARGETS: dict[str, tuple[Callable[[Path], None], str]] = {
    "image": (image, "a.png"),
    "shard": (shard, "a.tar"),
    "stream": (stream, "a.tar"),
    "index": (index, "index"),
    "manifest": (manifest, "manifest.json"),
    "source": (source, "source"),
    "config": (config, "a.yaml"),
    "jsonl": (texts, "a.jsonl"),
    "csv": (texts, "a.csv"),
    "parquet": (texts, "a.parquet"),
    "arrow": (texts, "a.arrow"),
    "image csv": (table, "a.csv"),
    "image jsonl": (table, "a.jsonl"),
    "checkpoint": (checkpoint, "file"),
}


def answer(kind: str, content: bytes, folder: Path) -> str:
    target, name = TARGETS[kind]
    (folder / name).write_bytes(content)
    try:
        target(folder / name)
    except (ValueError, OSError, CheckpointError) as error:
        return said(error)
    except MemoryError:
        return "memory: " + traceback.format_exc()
    except BaseException:
        return "traceback: " + traceback.format_exc()
    return "accepted"


def said(error: BaseException) -> str:
    """A message says what was expected, or names the file; see `run_command`."""
    text = str(error)
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"refused: {text}"
    says = ("expected", "damaged", "no such key", "not a readable")
    is_clear = any(word in text for word in says) and len(text) < 2000
    return f"refused: {text}" if is_clear else "unclear: " + traceback.format_exc()


def limit_memory() -> None:
    status = Path("/proc/self/status")
    if not status.exists():
        return
    (used,) = (line for line in status.read_text().splitlines() if line.startswith("VmData:"))
    most = int(used.split()[1]) * 1024 + MOST_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def prepare(folder: Path) -> None:
    """Write the seeds that cases share, and read one of each kind, so that all is loaded."""
    from fuzz_corpus import SEEDS, seed_files

    seed_files(folder)
    for kind, seeds in SEEDS.items():
        with tempfile.TemporaryDirectory(dir=folder) as place:
            answer(kind, seeds[0], Path(place))


def serve(requests: BinaryIO, answers: BinaryIO, folder: Path) -> None:
    send(answers, "ready")
    while head := requests.read(8):
        name, size = struct.unpack("<II", head)
        kind, content = requests.read(name).decode(), requests.read(size)
        with tempfile.TemporaryDirectory(dir=folder) as place:
            send(answers, answer(kind, content, Path(place)))


def send(answers: BinaryIO, text: str) -> None:
    data = text.encode("utf-8", "replace")
    answers.write(struct.pack("<I", len(data)) + data)
    answers.flush()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    own = os.fdopen(os.dup(1), "wb")
    # What libraries print is no answer.
    os.dup2(2, 1)
    with tempfile.TemporaryDirectory() as place:
        os.environ["HF_DATASETS_CACHE"] = f"{place}/cache"
        prepare(Path(place))
        limit_memory()
        serve(sys.stdin.buffer, own, Path(place))
