"""All benchmarks with one command: what is run, what is kept, and what is told of failures."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import run_all
from catalogue import BENCHMARKS, Benchmark, find
from run_all import KEPT, MEASURED, STATE, Finished, State
from watched_process import run_watched

ROOT = Path(__file__).resolve().parent.parent

NOT_BENCHMARKS = {"fresh_process.py", "report.py", "run_all.py", "step_picture.py"}
# Trainings, on data that are fetched first; and a check of commits.
NOT_BENCHMARKS |= {"recipes.py", "objectives.py", "compare_commits.py", "code_size.py"}
# Sections of gpu_suite.py.
NOT_BENCHMARKS |= {f"gpu_{name}.py" for name in ("smoke", "losses", "engine", "plan")}
SCRIPT = """
import pathlib, sys
results = pathlib.Path(sys.argv[sys.argv.index("--results") + 1])
counter = pathlib.Path(__file__).with_suffix(".runs")
counter.write_text(str(int(counter.read_text()) + 1 if counter.exists() else 1))
(results / "{name}.csv").open("a").write("row\\n")
print("measured by", sys.argv[1:-2], flush=True)
{ending}
"""


class Bench:
    """Scripts of a second each in place of the benchmarks."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.scripts, self.results = folder / "scripts", folder / "results"
        self.scripts.mkdir()
        self.all: list[Benchmark] = []
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setattr("catalogue.BENCHMARKS", self.all)
        monkeypatch.setattr(run_all, "BENCHMARKS", self.all)

    def add(self, name: str, ending: str = "", writes: str = "", **more: object) -> Benchmark:
        script = self.scripts / f"{name}.py"
        script.write_text(SCRIPT.format(name=name, ending=ending))
        one = Benchmark(name, str(script), (writes or f"{name}.csv",), 1, 1, **more)
        self.all.append(one)
        return one

    def run(self, *arguments: str) -> int:
        return run_all.main([*arguments, "--results", str(self.results)])

    def runs(self, name: str) -> int:
        counter = self.scripts / f"{name}.runs"
        return int(counter.read_text()) if counter.exists() else 0

    def state(self) -> dict[str, dict]:
        return json.loads((self.results / STATE).read_text())


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(tmp_path, monkeypatch)


def test_every_script_is_there_and_knows_the_arguments_it_is_given():
    main = 'if __name__ == "__main__":'
    scripts = {path.name for path in (ROOT / "benchmarks").glob("*.py") if main in path.read_text()}
    assert {one.script for one in BENCHMARKS} | NOT_BENCHMARKS == scripts
    assert len({one.name for one in BENCHMARKS}) == len(BENCHMARKS)
    for one in BENCHMARKS:
        source = (ROOT / "benchmarks" / one.script).read_text()
        given = [*one.full, *one.quick, "--results", *(["--wordnet"] if one.needs_wordnet else [])]
        for word in given:
            shared = "section(__doc__" in source and word in ("--results", "--seconds")
            known = f'"{word}"' in source or (word == "--results" and "parser(__doc__)" in source)
            known |= shared
            assert known or not word.startswith("--"), (one.name, word)


def test_all_quick_versions_are_meant_to_take_less_than_ten_minutes_without_a_gpu():
    assert sum(one.quick_minutes for one in BENCHMARKS if not one.needs_gpu) <= 10
    assert all(one.quick_minutes <= one.minutes for one in BENCHMARKS)


def test_an_unknown_name_is_told_with_the_known_ones(capsys):
    with pytest.raises(ValueError, match="expected one of scaling, .* got nothing"):
        find("nothing")
    with pytest.raises(SystemExit):
        run_all.main(["--only", "nothing"])
    assert "--only: benchmark: expected one of" in capsys.readouterr().err


def test_a_quick_run_never_writes_beside_full_results(capsys):
    with pytest.raises(SystemExit):
        run_all.main(["--quick", "--results", str(run_all.RESULTS / ".." / "results")])
    assert "expected another folder" in capsys.readouterr().err


def test_listing_runs_nothing(bench: Bench, capsys):
    bench.add("first", peers=("no-such-distribution",))
    assert bench.run("--list") == 0
    printed = capsys.readouterr().out
    assert "first.csv" in printed and "no-such-distribution" in printed
    assert not bench.results.exists()


def test_a_failure_is_told_and_the_others_run(bench: Bench, capsys):
    bench.add("fails", "sys.exit('no luck')")
    bench.add("forgets", writes="elsewhere.csv")
    bench.add("passes", full=("--size", "7"))
    assert bench.run() == 1
    printed = capsys.readouterr().out
    assert "exit 1, see its log" in printed
    assert "did not write elsewhere.csv" in printed
    assert "no luck" in (bench.results / "logs" / "fails.log").read_text()
    passed = bench.state()["passes"]
    assert (passed["status"], passed["files"]) == (MEASURED, ["passes.csv"])
    assert passed["origin"]["arguments"] == "--size 7" and passed["origin"]["torch"]
    assert "['--size', '7']" in (bench.results / "logs" / "passes.log").read_text()


def test_what_is_finished_is_not_run_again_and_what_failed_is(bench: Bench, capsys):
    bench.add("fails", "sys.exit(3)")
    bench.add("passes")
    assert bench.run() == bench.run() == 1
    assert (bench.runs("fails"), bench.runs("passes")) == (2, 1)
    assert KEPT in capsys.readouterr().out
    assert bench.run("--only", "passes") == 0 and bench.runs("passes") == 1
    assert bench.run("--only", "passes", "--fresh") == 0 and bench.runs("passes") == 2
    (bench.results / "passes.csv").unlink()
    assert bench.run("--only", "passes") == 0 and bench.runs("passes") == 3


@pytest.mark.parametrize("changed", ["code", "machine", "torch", "arguments", "peers"])
def test_results_of_another_origin_do_not_count(bench: Bench, changed: str):
    bench.add("passes")
    assert bench.run() == bench.run() == 0 and bench.runs("passes") == 1
    state = bench.state()
    state["passes"]["origin"][changed] += " of yesterday"
    (bench.results / STATE).write_text(json.dumps(state))
    assert bench.run() == 0 and bench.runs("passes") == 2


def test_rows_are_kept_after_an_interruption_and_set_aside_for_another_origin(bench: Bench):
    one = bench.add("rows", keeps_rows=True)
    other = bench.add("one_file")
    bench.results.mkdir()
    (bench.results / "rows.csv").write_text("of who knows what\n")
    (bench.results / "one_file.csv").write_text("the script sees to it\n")
    assert bench.run() == 0
    assert (bench.results / "rows.csv").read_text() == "row\n"
    before = bench.results / "logs" / "rows.csv.before"
    assert before.read_text() == "of who knows what\n"
    assert (bench.results / "one_file.csv").read_text() == "the script sees to it\nrow\n"
    state = State(bench.results)
    state.save(one, Finished("interrupted", origin=state.last_origin(one)))
    assert bench.run() == 0 and bench.runs(other.name) == 1
    assert (bench.results / "rows.csv").read_text() == "row\nrow\n"
    assert bench.run("--only", "rows", "--fresh") == 0
    assert (bench.results / "rows.csv").read_text() == "row\n"


def test_without_a_gpu_what_needs_one_is_left_out(bench: Bench, monkeypatch, capsys):
    bench.add("on_gpu", needs_gpu=True)
    monkeypatch.setattr(run_all, "_has_gpu", lambda: False)
    assert bench.run() == 0 and bench.runs("on_gpu") == 0
    assert "needs an NVIDIA GPU" in capsys.readouterr().out
    monkeypatch.setattr(run_all, "_has_gpu", lambda: True)
    assert bench.run() == 0 and bench.runs("on_gpu") == 1


def test_another_place_of_wordnet_is_handed_on(bench: Bench, tmp_path: Path):
    bench.add("words", needs_wordnet=True)
    assert bench.run("--wordnet", str(tmp_path)) == 0
    assert f"--wordnet {tmp_path}" == bench.state()["words"]["origin"]["arguments"]


def test_ctrl_c_stops_with_a_table_and_keeps_what_there_is(bench: Bench, monkeypatch, capsys):
    bench.add("passes")
    bench.add("stopped")
    bench.add("later")
    real = run_all.run_watched

    def stopped(command: list[str], log: Path, *rest: object) -> int:
        if log.stem == "stopped":
            raise KeyboardInterrupt
        return real(command, log, *rest)

    monkeypatch.setattr(run_all, "run_watched", stopped)
    assert bench.run() == 130
    assert capsys.readouterr().out.count("not run") == 2
    assert {name: each["status"] for name, each in bench.state().items()} == {
        "passes": MEASURED,
        "stopped": "interrupted",
    }
    monkeypatch.setattr(run_all, "run_watched", real)
    assert bench.run() == 0
    assert [bench.runs(name) for name in ("passes", "stopped", "later")] == [1, 1, 1]


def test_an_interrupted_command_takes_its_children_along(tmp_path: Path):
    """The child ignores Ctrl-C, as a library's worker may."""
    child = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    code = (
        "import subprocess, sys, time; "
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}]);"
        "print(child.pid, flush=True); time.sleep(60)"
    )
    log = tmp_path / "log"

    def interrupt_once_started() -> None:
        if log.read_text().strip():
            raise KeyboardInterrupt

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_watched([sys.executable, "-c", code], log, tmp_path, interrupt_once_started)
    assert time.monotonic() - start < 30
    assert not _is_alive(int(log.read_text().split()[0]))


def _is_alive(process: int) -> bool:
    for _ in range(50):
        try:
            os.kill(process, 0)
            stat = Path(f"/proc/{process}/stat")
            if stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return False
        except ProcessLookupError:
            return False
        time.sleep(0.1)
    return True


def test_sigint_to_the_command_itself_ends_it_with_130(tmp_path: Path):
    code = (
        "import signal, sys, run_all, catalogue; "
        "signal.signal(signal.SIGINT, signal.default_int_handler); "
        "one = catalogue.Benchmark('slow', sys.argv[1], ('x',), 1, 1); "
        "run_all.find = lambda name: one; "
        "sys.exit(run_all.main(['--only', 'slow', '--results', sys.argv[2]]))"
    )
    script, results = tmp_path / "slow.py", tmp_path / "results"
    script.write_text("import time; print('started', flush=True); time.sleep(60)")
    paths = [str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-c", code, str(script), str(results)]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    log = results / "logs" / "slow.log"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (log.exists() and log.read_text()):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=30)
    assert process.returncode == 130 and "not run" in printed


def test_the_checkout_is_what_is_measured(tmp_path: Path):
    """Whatever else is installed under the same name."""
    checkout, log = tmp_path / "checkout", tmp_path / "log"
    (checkout / "gradcache_clip").mkdir(parents=True)
    (checkout / "gradcache_clip" / "__init__.py").write_text("print('this one')")
    code = "import gradcache_clip"
    assert run_watched([sys.executable, "-c", code], log, checkout, lambda: None) == 0
    assert log.read_text() == "this one\n"


def test_a_damaged_state_is_told_and_nothing_is_run(bench: Bench, capsys):
    bench.add("passes")
    bench.results.mkdir()
    (bench.results / STATE).write_text('{"passes": 3}')
    with pytest.raises(SystemExit):
        bench.run()
    assert "remove it, and everything is measured again" in capsys.readouterr().err.replace(
        "\n", ""
    )
    assert bench.runs("passes") == 0


def test_a_state_is_whole_and_survives(tmp_path: Path):
    one = replace(find("scaling"), writes=("a.csv",))
    State(tmp_path).save(one, Finished(MEASURED, 1.5, ("a.csv",), {"code": "abc"}))
    assert [path.name for path in tmp_path.iterdir()] == [STATE]
    assert State(tmp_path).of(one, {"code": "abc"}) is None, "its file is not there"
    (tmp_path / "a.csv").touch()
    assert State(tmp_path).of(one, {"code": "abc"}).minutes == 1.5
    assert State(tmp_path).of(one, {"code": "abd"}) is None


def test_the_fingerprint_follows_the_sources_alone(tmp_path: Path, monkeypatch):
    for room in ("benchmarks/results", "gradcache_clip", "kernels"):
        (tmp_path / room).mkdir(parents=True)
    source = tmp_path / "kernels" / "one.py"
    source.write_text("1")
    monkeypatch.setattr(run_all, "ROOT", tmp_path)
    found = [run_all.fingerprint.__wrapped__()]
    (tmp_path / "benchmarks" / "results" / "engine.json").write_text("{}")
    (tmp_path / "README.md").write_text("text")
    assert run_all.fingerprint.__wrapped__() == found[0]
    for change in (lambda: source.write_text("2"), lambda: source.rename(source.with_name("b.py"))):
        change()
        found.append(run_all.fingerprint.__wrapped__())
    assert len(set(found)) == 3


def test_wordnet_is_missed_only_where_it_is_not(capsys, tmp_path: Path):
    for folder, missed in ((tmp_path, False), (tmp_path / "none", True)):
        assert run_all.main(["--list", "--only", "engine", "--wordnet", str(folder)]) == 0
        assert ("WordNet" in " ".join(capsys.readouterr().out.split())) is missed
