"""Which shards a name stands for, which may be opened, and what hostile ones can do: nothing."""

from __future__ import annotations

import http.server
import io
import os
import pickle
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_shards import good, loader, options, picture, take, write, write_tar

from gradcache_clip.train.data import ImageCaptionLoader, read_all, read_captions, shard_files
from gradcache_clip.train.data.shard_urls import check_url, find_shards


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """67 samples in shards of 20."""
    return write(tmp_path_factory.mktemp("shards"), 67)


def names(source: str | Path) -> list[str]:
    return [Path(shard.url).name for shard in find_shards(source)]


def test_folders_globs_braces_and_files(folder: Path) -> None:
    listed = [f"shard-{i:06d}.tar" for i in range(4)]
    assert names(folder) == listed
    assert names(f"{folder}/*.tar") == listed
    assert names(f"{folder}/shard-{{000000..000003}}.tar") == listed
    assert names(f"{folder}/shard-000000.tar::{folder}/shard-000003.tar") == [listed[0], listed[3]]
    assert names(f"file://{folder}/shard-000002.tar") == [listed[2]]
    assert [shard.samples for shard in find_shards(folder)] == [20, 20, 20, 7]


def test_missing_shards_name_the_first_and_the_count(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"got 4: 3 missing, the first is .*-000004.tar"):
        find_shards(f"{folder}/shard-{{000000..000006}}.tar")
    write(tmp_path, 50)
    (tmp_path / "shard-000001.tar").unlink()
    with pytest.raises(FileNotFoundError, match="got 2: 1 missing, the first is .*-000001.tar"):
        ImageCaptionLoader(tmp_path, 4)
    with pytest.raises(FileNotFoundError, match="1 missing"):
        find_shards(tmp_path / "nowhere")


def test_an_empty_source_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected manifest.json or \*.tar in .*; make"):
        find_shards(tmp_path)
    with pytest.raises(FileNotFoundError, match="expected shards to match"):
        find_shards(tmp_path / "*.tar")
    write(tmp_path / "train", 3)
    with pytest.raises(FileNotFoundError, match=r"name one of its folders \['train'\]"):
        find_shards(tmp_path)
    write_tar(tmp_path / "none.tar", {})
    with pytest.raises(ValueError, match="expected at least one sample"):
        list(read_all(tmp_path / "none.tar"))
    with pytest.raises(ValueError, match="brace pattern, got"):
        find_shards("${UNSET}/a.tar")


@pytest.mark.parametrize(
    "url",
    [
        "pipe:touch {mark}",
        "PIPE:touch {mark}",
        "{folder}/shard-000000.tar::pipe:touch {mark}",
        "http://localhost/a.tar",
        "https://localhost/a.tar",
        "gs://bucket/a.tar",
        "hf://datasets/a/b.tar",
        "ais://bucket/a.tar",
        "sftp://host/a.tar",
        "ftp://host/a.tar",
        "data:,a",
    ],
)
def test_urls_are_refused_unless_named(folder: Path, tmp_path: Path, url: str) -> None:
    mark = tmp_path / "mark"
    for allowed in ((), ("s3",)):
        with pytest.raises(ValueError, match=r"^allow_url_schemes: expected '\w+' in it to open"):
            loader(url.format(folder=folder, mark=mark), allow_url_schemes=allowed)
    assert not mark.exists()


@pytest.mark.parametrize("bad", ["'", '"', "`", "$(x)", ";", "|", " ", "\n", "\\", "<", "\x00"])
def test_urls_with_shell_characters_are_refused(bad: str) -> None:
    with pytest.raises(ValueError, match="expected a plain URL"):
        check_url(f"http://localhost/a{bad}touch.tar", ["http"])


def test_a_pipe_runs_when_it_is_named(folder: Path) -> None:
    url = f"pipe:cat {folder}/shard-000000.tar"
    for name in ("pipe", "PIPE"):
        named = options(allow_url_schemes=("pipe",))
        assert len(list(read_all(url.replace("pipe", name, 1), options=named))) == 20


class Server(http.server.BaseHTTPRequestHandler):
    """Serves one shard, and redirects."""

    data = b""
    over = threading.Event()

    def do_GET(self) -> None:
        if self.path in ("/none.tar", "/silent.tar"):
            if self.path == "/none.tar":
                self.send_error(404)
            else:
                self.over.wait(5)
            return
        if self.path in ("/empty.tar", "/slow.tar"):
            self.send_response(200)
            self.end_headers()
            while self.path == "/slow.tar" and not self.over.wait(0.05):
                self.wfile.write(b"x")
            return
        if self.path == "/a.tar":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(self.data)
            return
        self.send_response(302)
        self.send_header("Location", self.path[1:])
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(folder: Path) -> Iterator[str]:
    Server.data = (folder / "shard-000000.tar").read_bytes()
    Server.over.clear()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    Server.over.set()
    server.shutdown()
    thread.join()
    server.server_close()


def test_http_is_read_when_named_and_leads_nowhere_else(
    server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "*")
    allowed = options(allow_url_schemes=("http",))
    assert len(list(read_all(f"{server}/a.tar", options=allowed))) == 20
    for target in ("ftp://localhost/a.tar", "https://localhost/a.tar"):
        with pytest.raises(ValueError, match=r"expected '(ftp|https)' in it to open"):
            list(read_all(f"{server}/{target}", options=allowed))
    with pytest.raises(OSError, match="302"):
        list(read_all(f"{server}/file:///etc/hostname", options=allowed))


def test_servers_that_fail_are_named(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(shard_files, "HTTP_TIMEOUT_S", 0.3)
    for name, error in (("none", "HTTP Error 404"), ("silent", "timed out")):
        url = f"{server}/{name}.tar"
        with pytest.raises(OSError, match=f"{url}: expected a shard, got .*{error}.*; check the"):
            list(read_captions(url, allow_url_schemes=("http",)))
    with pytest.raises(OSError, match="nowhere.invalid/a.tar: expected a shard, got"):
        list(read_captions("http://nowhere.invalid/a.tar", allow_url_schemes=("http",)))
    for name in ("empty", "slow"):
        url, said = (
            f"{server}/{name}.tar",
            r"got none but broken samples \(\{'truncated tar': 1\}\)",
        )
        with pytest.raises(ValueError, match=f"{url}: expected samples with captions, {said}"):
            list(read_captions(url, allow_url_schemes=("http",)))
        with pytest.raises(
            ValueError, match=r"got 1 of 1 \(\{'truncated tar': 1\}; the first: .*http"
        ):
            list(read_all(url, options=options(allow_url_schemes=("http",))))


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("a-{0..999999999}.tar", "at most 1,048,576 shards, got braces for 1,000,000,000"),
        ("a-{0..9999}-{0..9999}.tar", "got braces for 100,000,000"),
        ("a" + "{a,b}" * 30, "got braces for 1,073,741,824"),
        ("a{0..1" + "0" * 5000 + "}.tar", "digits"),
        ("{" * 50_000 + "a,b" + "}" * 50_000, "more than 16 braces"),
        ("{{a,b}.tar", "Unbalanced braces"),
        ("*/" * 5000, "expected shards to match"),
        ("[" * 5000, "expected"),
        ("a" * 5000 + ".tar", "1 missing"),
    ],
)
def test_patterns_of_nonsense_end_at_once(source: str, said: str) -> None:
    with pytest.raises((ValueError, OSError), match=said) as raised:
        find_shards(source)
    assert len(str(raised.value)) < 1000


class Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.mark}",)


def test_nothing_in_a_shard_is_unpickled(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    bomb = pickle.dumps(Bomb(mark))
    members = good("a")
    for name in ("pkl", "pickle", "pyd", "pth", "pt", "ten", "npy", "npz", "cbor", "mp", "py"):
        members[f"a.{name}"] = bomb
    members |= {"b.png": bomb, "b.txt": b"not an image"}
    members |= {"c.png": picture(), "c.json": bomb}
    write_tar(tmp_path / "a.tar", members)
    read = list(read_all(tmp_path, options=options(max_broken_share=1.0)))
    assert [sample.key for sample in read] == ["a"]
    take(loader(tmp_path, 1, max_broken_share=1.0), 3)
    assert not mark.exists()
    pickle.loads(bomb)
    assert mark.exists()


def test_links_and_sparse_files_are_not_followed(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, kind in (("a.txt", tarfile.SYMTYPE), ("b.txt", tarfile.LNKTYPE)):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, "/etc/hostname"
            archive.addfile(link)
        for name, data in good("c").items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            archive.addfile(header, io.BytesIO(data))
    assert [s.key for s in read_all(tmp_path, options=options())] == ["c"]
