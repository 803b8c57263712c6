"""The documentation quotes what the results say, and nothing else."""

from __future__ import annotations

import csv
import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import report
from results import UNMEASURED
from run_all import STATE

import recipes
from gradcache_clip.train.report import RunFigures

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

ORIGIN = {"machine": "a machine", "torch": "2.6", "commit": "abc", "date": "2026-01-01"}


@pytest.fixture
def pages(tmp_path: Path) -> Path:
    """A copy of the pages, to be changed."""
    shutil.copytree(ROOT / "docs", tmp_path / "docs", ignore=shutil.ignore_patterns("images"))
    shutil.copy(ROOT / "README.md", tmp_path)
    return tmp_path


def changed_digit(text: str) -> str:
    """With its last digit another one."""
    place = max(match.start() for match in re.finditer(r"\d", text))
    return text[:place] + str((int(text[place]) + 1) % 10) + text[place + 1 :]


def test_the_documentation_is_what_the_results_say():
    assert list(report.problems(ROOT, RESULTS)) == []


def test_a_number_altered_by_hand_is_found_in_every_block(pages: Path):
    waiting = {name for name, file in report.NOT_YET.items() if not (RESULTS / file).exists()}
    written = set(report.BLOCKS) - waiting
    waiting |= {name for name in written if report.BLOCKS[name](RESULTS) == UNMEASURED}
    tried = set()
    for name in report._pages(pages):
        original = (pages / name).read_text()
        for block in report._BLOCK.finditer(original):
            if block[1] in waiting:
                continue
            start, end = block.span(2)
            altered = original[:start] + changed_digit(block[2]) + original[end:]
            (pages / name).write_text(altered)
            found = list(report.problems(pages, RESULTS))
            assert len(found) == 1 and found[0].startswith(f"{name}: line "), block[1]
            tried.add(block[1])
        (pages / name).write_text(original)
    assert tried == set(report.BLOCKS) - waiting


def test_the_page_of_results_may_not_be_altered_or_missing(pages: Path):
    (pages / report.PAGE).write_text(changed_digit((pages / report.PAGE).read_text()))
    (found,) = report.problems(pages, RESULTS)
    assert found.startswith("docs/benchmarks.md: line ")
    (pages / report.PAGE).unlink()
    (found,) = report.problems(pages, RESULTS)
    assert "line 1: the results want '# Benchmarks', got '(nothing)'" in found


def test_writing_repairs_and_a_second_time_changes_nothing(pages: Path, monkeypatch, capsys):
    monkeypatch.setattr(report, "ROOT", pages)
    before = {path: path.read_text() for path in (pages / "README.md", pages / report.PAGE)}
    (pages / "README.md").write_text(changed_digit_in_memory(before[pages / "README.md"]))
    arguments = ["--results", str(RESULTS)]
    assert report.main([*arguments, "--check"]) == 1
    assert "run python benchmarks/report.py" in capsys.readouterr().err
    assert report.main(arguments) == 0 and report.main([*arguments, "--check"]) == 0
    assert {path: path.read_text() for path in before} == before


def changed_digit_in_memory(text: str) -> str:
    (block,) = [each for each in report._BLOCK.finditer(text) if each[1] == "memory"]
    return text[: block.start(2)] + changed_digit(block[2]) + text[block.end(2) :]


@pytest.mark.parametrize(
    "line", ["| a | 315 MiB |", "It takes 12.5 GB.", "1.3 x ours", "17 %", "R@1 is 1.5 ± 0.2"]
)
def test_a_figure_outside_of_a_block_is_found(pages: Path, line: str):
    text = (pages / "README.md").read_text().replace("## Memory\n", f"## Memory\n\n{line}\n")
    (pages / "README.md").write_text(text)
    number = text.splitlines().index(line) + 1
    (found,) = report.problems(pages, RESULTS)
    assert found.startswith(f"README.md, line {number}: expected") and found.endswith(line)


def test_only_tables_count_in_other_pages_and_no_code_does():
    text = "# T\n\nsays 3 MiB\n\n| a | 3 MiB |\n\n```\n| a | 4 MiB |\n```\n"
    assert list(report.unmarked("docs/engine.md", text)) == [(5, "| a | 3 MiB |")]
    assert [number for number, _ in report.unmarked("README.md", text)] == [3, 5]
    marked = "# T\n\n<!-- results: memory -->\n| a | 3 MiB |\n<!-- end -->\n| b | 5 % |\n"
    assert list(report.unmarked("README.md", marked)) == [(6, "| b | 5 % |")]


def test_the_exceptions_are_headings_that_need_one():
    for name, heading in report.SETTINGS:
        text = (ROOT / name).read_text()
        assert re.search(rf"^#+ {re.escape(heading)}$", text, re.MULTILINE), (name, heading)
        elsewhere = text.replace(f"# {heading}\n", f"# {heading}, once more\n")
        assert list(report.unmarked(name, elsewhere)), (name, heading)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- results: memory -->\n", "expected `<!-- end -->`"),
        ("<!-- results: memory -->\n<!-- results: loss -->\n<!-- end -->", "expected `<!-- end"),
        ("<!-- results: memry -->\n<!-- end -->", "expected one of demo, memory, .* got memry"),
        ("so\n<!-- results: engine-overhead -->4<!-- end --> a chunk", "must not begin it"),
    ],
)
def test_a_block_that_cannot_be_read_is_named(pages: Path, text: str, message: str):
    (pages / "README.md").write_text(text)
    with pytest.raises(report.MarkError, match=f"README.md: .*{message}"):
        report.wanted(pages, RESULTS)


def test_results_that_are_not_there_are_named(pages: Path, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"csv: expected the results .*/run_all.py --list"):
        report.wanted(pages, tmp_path)


def test_the_demo_stays_as_it_is_until_its_figures_are_there(pages: Path, tmp_path: Path):
    text = "a\n<!-- results: demo -->\n| a | 1 % |\n<!-- end -->\n"
    (pages / "README.md").write_text(text)
    results = tmp_path / "results"
    shutil.copytree(RESULTS, results)
    (results / "demo.json").unlink(missing_ok=True)
    assert report.wanted(pages, results)["README.md"] == text
    recall = {"image_to_text_recall_at_1": 0.5, "image_to_text_recall_at_1_chance": 0.01}
    figures = [asdict(RunFigures("cached", recall, 1024, 5000.0, 3 << 30))]
    (results / "demo.json").write_text(json.dumps({"origin": ORIGIN, "figures": figures}))
    assert "| R@1 image → text | 50.0 % | 1.0 % |" in report.wanted(pages, results)["README.md"]


def test_links_and_pictures_of_the_page_exist():
    targets = re.findall(r"\]\(([^)]+)\)", (ROOT / report.PAGE).read_text())
    assert len(targets) > 10
    for target in targets:
        assert (ROOT / "docs" / target).exists(), target


def test_every_result_says_where_it_is_from():
    names = ("machine", "python", "torch", "commit", "date")
    for path in RESULTS.glob("*.csv"):
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                assert all(row.get(name) for name in names), path.name
    for path in set(RESULTS.glob("*.json")) - {RESULTS / STATE}:
        record = json.loads(path.read_text())
        origins = record.values() if path.name == recipes.FILE else [record["origin"]]
        assert all(origin.get(name) for origin in origins for name in names), path.name
