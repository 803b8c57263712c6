"""Texts as training data, out of every kind of file: nothing is lost, repeated or trusted."""

from __future__ import annotations

import json
import logging
import resource
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
from text_files import make_texts, names, rows_of, write_lines

from gradcache_clip.train.config_errors import ConfigError
from gradcache_clip.train.data import (
    TextBatch,
    TextLoader,
    TextRows,
    find_text_files,
    join_states,
    read_all_texts,
    text_rows,
)
from gradcache_clip.train.data.broken import BrokenReport

PAIR = names(2)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_texts(tmp_path_factory.mktemp("texts"))


def loader(data: Path, rows: int = 10, **options) -> TextLoader:
    return TextLoader(data / "train", rows, fields=PAIR, **options)


def taken(loader: TextLoader, batches: int) -> list[tuple[str, ...]]:
    return [row for batch in islice(loader, batches) for row in batch.rows]


def everything(data: Path) -> Counter:
    return Counter(read_all_texts(data / "train", PAIR, max_broken_share=0))


def read(source, fields=PAIR, **options) -> list[tuple[str, ...] | BrokenReport]:
    rows = TextRows(source, fields, **options)
    return [*map(rows.read, range(len(rows)))]


def test_rows_stand_in_the_order_of_the_files(data):
    rows = TextRows(data / "train", names(4))
    expected = [tuple(row[name] for name in names(4)) for row in rows_of(160, seed=1)]
    assert read(data / "train", names(4)) == expected and len(rows) == 160
    assert rows.read(53) == expected[53] and rows.read(159) == expected[159]


def test_line_ends_of_all_kinds(tmp_path):
    rows = [{"anchor": f"q{i}", "positive": "é\u2028\x85 d" * i} for i in range(1, 6)]
    texts = [json.dumps(row, ensure_ascii=False) for row in rows]
    (tmp_path / "a.jsonl").write_bytes("\n\n".join(texts).encode())
    (tmp_path / "b.json").write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(texts).encode() + b"\r\n\r")
    (tmp_path / "b.jsonl").write_bytes((tmp_path / "b.json").read_bytes())
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "none.jsonl").write_bytes(b"\n\n\r\n\n")
    expected = [tuple(text.strip() for text in row.values()) for row in rows]
    assert read(tmp_path) == [*expected, *expected]
    assert read(tmp_path / "b.json") == expected


def made(folder, kind: str) -> Path:
    """The rows of a file of JSON lines in another kind of file."""
    from datasets import Dataset

    rows = rows_of(40, seed=1)
    rows[7]["anchor"] = "NA"
    rows[9]["anchor"] = "2012"
    rows[11]["positive"] = ""
    table = Dataset.from_list(rows)
    source = folder / kind / f"a.{kind}"
    source.parent.mkdir(parents=True)
    if kind == "saved":
        table.save_to_disk(source.parent, num_shards=3)
        return source.parent
    if kind == "jsonl":
        return write_lines(source, rows)
    getattr(table, f"to_{kind}")(source)
    return source


@pytest.mark.parametrize("kind", ["parquet", "csv", "saved"])
def test_other_files_give_the_same_rows_as_lines(tmp_path, kind):
    expected = read(made(tmp_path, "jsonl"), names(3))
    source = made(tmp_path, kind)
    found = read(source, names(3), prompts=("q: ", "d: "))
    assert [*map(type, found)] == [*map(type, expected)]
    assert found[11] == BrokenReport("empty positive", str(source), "row 12")
    for row, same in zip(found, expected, strict=True):
        if isinstance(row, tuple):
            assert row == (f"q: {same[0]}", f"d: {same[1]}", f"d: {same[2]}")
    batches = [TextLoader(each, 8, fields=PAIR, max_broken_share=0.5)
               for each in (source, tmp_path / "jsonl")]  # fmt: skip
    assert taken(batches[0], 12) == taken(batches[1], 12)
    with pytest.raises(ConfigError, match="text_fields: expected fields .* anchor, positive, neg"):
        TextRows(source, ("anchor", "answer"))


def test_what_is_no_text_is_a_broken_row(tmp_path):
    from datasets import Dataset

    path = tmp_path / "a.parquet"
    Dataset.from_dict({"anchor": ["q", None, "r"], "positive": [1, 2, 3]}).to_parquet(path)
    assert [row.reason for row in read(path)] == [
        "missing positive",
        "missing anchor",
        "missing positive",
    ]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.parquet", b"no parquet", "expected .parquet files .* got ArrowInvalid: Parquet magic"),
        ("a.arrow", b"no arrow", "expected .arrow files"),
        ("a.csv", b"anchor,positive\na,b\nc,d,e\n", "expected .csv files .* in line 3, saw 3"),
        ("a.csv", b"anchor,positive\na,\xff\n", "expected .csv files .* can't decode byte 0xff"),
    ],
)
def test_damaged_files_say_so_in_one_line(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=said) as raised:
        TextRows(tmp_path, PAIR)
    assert "\n" not in str(raised.value)


def test_a_folder_is_of_one_kind(tmp_path):
    write_lines(tmp_path / "a.jsonl", rows_of(3, seed=1))
    write_lines(tmp_path / "about.json", [{"license": "CC0"}])
    assert len(read(tmp_path)) == 3
    made(tmp_path, "csv").rename(tmp_path / "b.csv")
    with pytest.raises(ConfigError, match=r"one kind, got \.csv and \.jsonl; name some by"):
        TextRows(tmp_path, PAIR)
    assert len(read(f"{tmp_path}/*.jsonl")) == 3
    made(tmp_path / "several", "saved").rename(tmp_path / "several" / "train")
    (tmp_path / "several" / "dataset_dict.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"name one of its folders \['train'\]"):
        TextRows(tmp_path / "several", PAIR)


def test_a_saved_folder_names_no_file_elsewhere(tmp_path):
    """Of what `save_to_disk` wrote the Arrow files are read, whatever its state.json says."""
    secret = made(tmp_path / "secret", "saved")
    folder = made(tmp_path, "saved")
    state = json.loads((folder / "state.json").read_text())
    state["_data_files"] = [{"filename": str(next(secret.glob("*.arrow")))}] * 9
    (folder / "state.json").write_text(json.dumps(state))
    assert len(read(folder)) == 40


def test_nothing_is_asked_of_the_network(tmp_path, monkeypatch):
    def refuse(*_arguments):
        raise AssertionError("network")

    monkeypatch.setattr("socket.socket.connect", refuse)
    for kind in ("jsonl", "parquet", "csv", "saved"):
        assert len(read(made(tmp_path, kind))) == 40


def test_a_cache_that_cannot_be_written_is_no_matter(tmp_path, monkeypatch):
    import datasets

    (tmp_path / "file").touch()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file" / "cache")
    assert len(read(made(tmp_path, "jsonl"))) == 40


def test_a_file_that_changes_is_read_anew(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"anchor": "a", "positive": "b"}])
    rows = TextRows(path, PAIR)
    write_lines(path, [{"anchor": "c", "positive": "d"}])
    assert read(path) == [("c", "d")] and rows.read(0) == ("a", "b")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "bad json"),
        (b"[1]", "bad json"),
        (b"null", "bad json"),
        (b"  ", "bad json"),
        (b"[" * 100_000, "bad json"),
        (b'{"anchor": "\xff", "positive": "d"}', "bad utf-8"),
        (b'{"anchor": "\\ud800", "positive": "d"}', "bad utf-8"),
        (b'{"anchor": "q"}', "missing positive"),
        (b'{"anchor": ["q"], "positive": "d"}', "missing anchor"),
        (b'{"anchor": null, "positive": "d"}', "missing anchor"),
        (b'{"anchor": " \\n", "positive": "d"}', "empty anchor"),
        (b'{"anchor": "' + b"q" * 2000 + b'", "positive": "d"}', "line too long"),
    ],
)
def test_a_broken_line_says_what_and_where(tmp_path, monkeypatch, line, reason):
    monkeypatch.setattr(text_rows, "MAX_LINE_BYTES", 200_000 if reason == "bad json" else 1000)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"anchor": "q", "positive": "d"}\n\n' + line + b"\n")
    write_lines(tmp_path / "0.jsonl", rows_of(5, seed=1))
    *_, first, second = read(tmp_path)
    assert first == ("q", "d")
    assert second == BrokenReport(reason, str(path), "line 3")


def test_an_epoch_has_every_row_once_in_a_new_order(data):
    several = loader(data, rows=32)
    first, second = (taken(several, 5) for _ in range(2))
    assert Counter(first) == Counter(second) == everything(data)
    assert first != second and several.epoch == 1
    assert taken(loader(data, rows=32), 5) == first
    assert taken(loader(data, rows=32, seed=1), 5) != first


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(data, workers):
    assert taken(loader(data, workers=workers), 20) == taken(loader(data), 20)


@pytest.mark.parametrize("received", [0, 1, 7, 15, 16, 20])
def test_a_stream_goes_on_with_the_next_batch(data, received):
    whole = taken(loader(data), received + 20)
    begun = loader(data)
    taken(begun, received)
    resumed = loader(data)
    resumed.load_state_dict(json.loads(json.dumps(begun.state_dict())))
    assert taken(resumed, 20) == whole[10 * received :]


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 3), (3, 2), (4, 1)])
def test_other_ranks_go_on_with_the_same_rows(data, before, after):
    ranks = [loader(data, 12 // before, rank=r, world_size=before) for r in range(before)]
    seen = [taken(each, 9) for each in ranks]
    state = join_states([each.state_dict() for each in ranks])
    resumed = [loader(data, 12 // after, rank=r, world_size=after) for r in range(after)]
    for each in resumed:
        each.load_state_dict(json.loads(json.dumps(state)))
    rest = [taken(each, 9) for each in resumed]
    whole = taken(loader(data, 12), 18)
    assert Counter(row for part in (*seen, *rest) for row in part) == Counter(whole)
    assert rest[0] == whole[12 * 9 :][: 12 // after] + rest[0][12 // after :]


def test_ranks_share_a_batch(data):
    ranks = [loader(data, 16, rank=r, world_size=2) for r in range(2)]
    rows = [taken(each, 5) for each in ranks]
    together = taken(loader(data, 32), 5)
    for step in range(5):
        mine = slice(16 * step, 16 * (step + 1))
        assert together[32 * step : 32 * (step + 1)] == rows[0][mine] + rows[1][mine]


def test_broken_rows_are_counted_and_too_many_stop(tmp_path, caplog):
    good = [{"anchor": f"q{i}", "positive": f"d{i}"} for i in range(300)]
    rows = [*good, *({"anchor": f"q{i}"} for i in range(12))]
    write_lines(tmp_path / "a.jsonl", rows)
    several = TextLoader(tmp_path, 100, fields=PAIR)
    with caplog.at_level(logging.WARNING):
        batches = [batch.rows for batch in islice(several, 12)]
    assert {row for rows in batches for row in rows} == {(r["anchor"], r["positive"]) for r in good}
    assert all(len({*rows}) == 100 for rows in batches)
    assert several.broken.counts.keys() == {"missing positive"}
    assert several.broken.seen == 1200 + several.broken.total
    assert "line 3" in caplog.text
    assert len([*read_all_texts(tmp_path, PAIR, max_broken_share=0.05)]) == 300
    with pytest.raises(ValueError, match="max_broken_share: expected at most 1.0% broken samples"):
        taken(TextLoader(tmp_path, 100, fields=PAIR, max_broken_share=0.01), 4)
    with pytest.raises(ValueError, match="max_broken_share"):
        [*read_all_texts(tmp_path, PAIR, max_broken_share=0.01)]


def test_what_is_no_such_data_is_refused(data, tmp_path):
    for source in (tmp_path / "none.jsonl", tmp_path, f"{tmp_path}/*.jsonl"):
        with pytest.raises(FileNotFoundError, match=r"expected a local \.jsonl, .* file"):
            find_text_files(source)
    with pytest.raises(ValueError, match="batch_size: expected a data set of one batch or more"):
        loader(data, rows=161)
    with pytest.raises(ValueError, match="batch_size: expected a positive integer, got 0"):
        loader(data, rows=0)
    with pytest.raises(ValueError, match="rank: expected 0 <= rank < world_size"):
        loader(data, rank=2, world_size=2)
    write_lines(tmp_path / "empty.jsonl", [])
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(FileNotFoundError, match=r"expected a local \.jsonl, .* file"):
        find_text_files(f"{tmp_path}/folder*")
    with pytest.raises(ValueError, match="expected at least one line, got empty files; write"):
        [*read_all_texts(tmp_path / "empty.jsonl", PAIR, max_broken_share=0)]


def test_globs_and_single_files(data):
    assert find_text_files(f"{data}/train/*.jsonl") == find_text_files(data / "train")
    assert find_text_files(data / "train" / "b.jsonl") == [data / "train" / "b.jsonl"]


def test_the_state_of_other_data_is_refused(data, tmp_path):
    state = loader(data).state_dict()
    moved = make_texts(tmp_path / "moved")
    loader(moved).load_state_dict(state)
    rows = rows_of(53, seed=1)
    write_lines(moved / "train" / "a.jsonl", [{**rows[0], "anchor": "another"}, *rows[1:]])
    for other in (
        loader(moved),
        loader(data, seed=3),
        TextLoader(data / "train", 10, fields=("anchor", "negative")),
    ):
        with pytest.raises(ValueError, match="as in the saved state"):
            other.load_state_dict(state)


def test_many_files_need_few_handles(tmp_path):
    row = {"anchor": "q", "positive": "d"}
    for number in range(60):
        write_lines(tmp_path / f"{number:02}.jsonl", [row])
    few, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    rows = TextRows(tmp_path, PAIR)
    used = len([*Path("/proc/self/fd").iterdir()]) if Path("/proc/self/fd").exists() else 64
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 16, most))
    try:
        assert [*map(rows.read, range(60))] == [("q", "d")] * 60
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (few, most))


def test_columns_of_a_batch():
    batch = TextBatch([("q", "d", "n", "m"), ("r", "e", "o", "p")])
    assert batch.texts == [["q", "r"], ["d", "e"], ["n", "m", "o", "p"]]
    assert batch.groups == ["d", "e", "n", "m", "o", "p"]
    assert TextBatch([("q", "d")]).texts == [["q"], ["d"]]
