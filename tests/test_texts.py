"""Lines of JSON as training data: nothing is lost, repeated or trusted."""

from __future__ import annotations

import json
import logging
import resource
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
from text_files import make_texts, names, rows_of, write_lines

from gradcache_clip.train.data import text_lines
from gradcache_clip.train.data.broken import BrokenReport
from gradcache_clip.train.data.resumable import join_states
from gradcache_clip.train.data.text_lines import TextLines, find_text_files, read_all_texts
from gradcache_clip.train.data.text_loader import TextBatch, TextLoader, order_of

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


def test_rows_stand_in_the_order_of_the_files(data):
    lines = TextLines(data / "train", names(4))
    expected = [tuple(row[name] for name in names(4)) for row in rows_of(160, seed=1)]
    assert [*lines] == expected and len(lines) == 160 and lines.counts == [53, 107]
    assert lines[53] == expected[53] and lines[159] == expected[159]


@pytest.mark.parametrize("block", [1, 3, 7, 4096])
def test_line_ends_are_found_whatever_the_block(tmp_path, monkeypatch, block):
    monkeypatch.setattr(text_lines, "_BLOCK_BYTES", block)
    rows = [{"anchor": f"q{i}", "positive": "é\u2028\x85 d" * i} for i in range(1, 6)]
    texts = [json.dumps(row, ensure_ascii=False) for row in rows]
    (tmp_path / "a.jsonl").write_bytes("\n\n".join(texts).encode())
    (tmp_path / "b.jsonl").write_bytes("\r\n\r\n".join(texts).encode() + b"\r\n\r\n\r")
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "none.jsonl").write_bytes(b"\n\n\r\n\n")
    expected = [tuple(text.strip() for text in row.values()) for row in rows]
    assert [*TextLines(tmp_path, PAIR)] == [*expected, *expected]
    assert TextLines(tmp_path, PAIR).counts == [5, 5, 0, 0]


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
    monkeypatch.setattr(text_lines, "MAX_LINE_BYTES", 200_000 if reason == "bad json" else 1000)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"anchor": "q", "positive": "d"}\n' + line + b"\n")
    first, second = TextLines(path, PAIR)
    assert first == ("q", "d")
    assert second == BrokenReport(reason, str(path), "line 2")


def test_an_epoch_has_every_row_once_in_a_new_order(data):
    several = loader(data, rows=32)
    first, second = (taken(several, 5) for _ in range(2))
    assert Counter(first) == Counter(second) == everything(data)
    assert first != second and several.epoch == 1
    assert taken(loader(data, rows=32), 5) == first
    assert taken(loader(data, rows=32, seed=1), 5) != first
    assert sorted(order_of(1000, 0, 0).tolist()) == [*range(1000)]


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


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 3), (3, 2)])
def test_what_is_left_of_an_epoch_goes_once_to_other_ranks(data, before, after):
    ranks = [loader(data, 4, rank=r, world_size=before) for r in range(before)]
    seen = [row for each in ranks for row in taken(each, 3)]
    state = join_states([each.state_dict() for each in ranks])
    resumed = [loader(data, 1, rank=r, world_size=after) for r in range(after)]
    for each in resumed:
        each.load_state_dict(state)
        # Of batches of one row nothing is dropped; the next epoch begins after them.
        for batch in each:
            if each.epoch > state["epoch"]["number"]:
                break
            seen += batch.rows
    assert Counter(seen) == everything(data)


def test_ranks_share_an_epoch(data):
    ranks = [loader(data, 16, rank=r, world_size=2) for r in range(2)]
    rows = [taken(each, 4) for each in ranks]
    assert Counter(rows[0] + rows[1]) == Counter(taken(loader(data, 32), 4))
    assert len(rows[0]) == len(rows[1]) == 64


def test_broken_rows_are_counted_and_too_many_stop(tmp_path, caplog):
    good = [{"anchor": f"q{i}", "positive": f"d{i}"} for i in range(300)]
    rows = [*good, *({"anchor": f"q{i}"} for i in range(12))]
    write_lines(tmp_path / "a.jsonl", rows)
    several = TextLoader(tmp_path, 100, fields=PAIR)
    with caplog.at_level(logging.WARNING):
        texts = taken(several, 3)
    assert Counter(texts) == Counter((row["anchor"], row["positive"]) for row in good)
    assert several.broken.counts == {"missing positive": 12} and several.broken.seen == 312
    assert "line 3" in caplog.text
    assert len([*read_all_texts(tmp_path, PAIR, max_broken_share=0.05)]) == 300
    with pytest.raises(ValueError, match="max_broken_share: expected at most 1.0% broken samples"):
        taken(TextLoader(tmp_path, 100, fields=PAIR, max_broken_share=0.01), 3)
    with pytest.raises(ValueError, match="max_broken_share"):
        [*read_all_texts(tmp_path, PAIR, max_broken_share=0.01)]


def test_what_is_no_such_data_is_refused(data, tmp_path):
    for source in (tmp_path / "none.jsonl", tmp_path, f"{tmp_path}/*.jsonl"):
        with pytest.raises(FileNotFoundError, match=r"expected a local \.jsonl file"):
            find_text_files(source)
    with pytest.raises(ValueError, match="batch_size: expected a data set of one batch or more"):
        loader(data, rows=161)
    with pytest.raises(ValueError, match="batch_size: expected a positive integer, got 0"):
        loader(data, rows=0)
    with pytest.raises(ValueError, match="rank: expected 0 <= rank < world_size"):
        loader(data, rank=2, world_size=2)
    write_lines(tmp_path / "empty.jsonl", [])
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(FileNotFoundError, match=r"expected a local \.jsonl file"):
        find_text_files(f"{tmp_path}/folder*")
    with pytest.raises(IndexError):
        TextLines(data / "train", PAIR)[160]
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
    lines = TextLines(tmp_path, PAIR)
    used = len([*Path("/proc/self/fd").iterdir()]) if Path("/proc/self/fd").exists() else 64
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 16, most))
    try:
        assert [*lines] == [("q", "d")] * 60
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (few, most))


def test_a_file_that_was_cut_is_no_crash(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"anchor": "q" * 9000, "positive": "d"}] * 3)
    lines = TextLines(path, PAIR)
    path.write_bytes(b"")
    assert all(isinstance(row, BrokenReport) for row in lines)


@pytest.mark.parametrize(("world", "rows"), [(2, 33), (3, 33)])
def test_a_set_too_small_for_the_poorest_rank_is_refused_on_all(tmp_path, world, rows):
    """Groups of 32 rows are dealt out: of 96, two ranks get 64 and 32."""
    write_lines(tmp_path / "a.jsonl", rows_of(96, seed=1))
    for rank in range(world):
        with pytest.raises(ValueError, match=f"got 32 samples for each of {world} ranks"):
            TextLoader(tmp_path, rows, fields=PAIR, rank=rank, world_size=world)
        fitting = TextLoader(tmp_path, 32, fields=PAIR, rank=rank, world_size=world)
        assert len(taken(fitting, 1)) == 32


def test_columns_of_a_batch():
    batch = TextBatch([("q", "d", "n", "m"), ("r", "e", "o", "p")])
    assert batch.texts == [["q", "r"], ["d", "e"], ["n", "o", "m", "p"]]
    assert batch.groups == ["d", "e", "n", "o", "m", "p"]
    assert TextBatch([("q", "d")]).texts == [["q"], ["d"]]
