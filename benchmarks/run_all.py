"""All benchmarks with one command; what is already measured is not measured again.

    python benchmarks/run_all.py                     # everything; about three hours on two cores
    python benchmarks/run_all.py --quick             # small versions of all; minutes
    python benchmarks/run_all.py --only loss engine  # these
    python benchmarks/run_all.py --list              # what there is, and how long it takes

A benchmark is finished when its results are there for the present code, machine and libraries; an
interrupted run goes on with the next one, --fresh begins again. One that fails does not stop the
others. Full results go to benchmarks/results, quick ones to runs/benchmarks-quick; beside them lie
run_all.json, which says what was run, and logs/, with the output of each benchmark. Afterwards
`python benchmarks/report.py` puts the new figures into the documentation.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path

from catalogue import BENCHMARKS, WORDNET, Benchmark, find
from results import QUICK, RESULTS, ROOT, installed, parser, provenance, show, table, write_json
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from watched_process import run_watched

INTERRUPTED = 130
STATE = "run_all.json"
MEASURED, KEPT = "measured", "measured before"
_SOURCES = ("benchmarks", "gradcache_clip", "kernels")
_NO_GPU = "needs an NVIDIA GPU"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is not finished; 0 if all is there, 1 if something failed, 130 after Ctrl-C."""
    made = _parser()
    options = made.parse_args(arguments)
    try:
        chosen = [find(name) for name in options.only] if options.only else list(BENCHMARKS)
    except ValueError as error:
        made.error(f"--only: {error}")
    if options.list:
        show(_listing(chosen, options.wordnet))
        return 0
    options.results = (options.results or (QUICK if options.quick else RESULTS)).resolve()
    options.wordnet = options.wordnet.absolute()
    if options.quick and options.results == RESULTS:
        made.error(f"--results: expected another folder than {RESULTS} with --quick, got that one")
    options.results.joinpath("logs").mkdir(parents=True, exist_ok=True)
    try:
        state = State(options.results)
    except ValueError as error:
        made.error(str(error))
    return _run_all(chosen, state, options)


# The state: finished benchmarks of a folder of results


@dataclass(frozen=True)
class Finished:
    """Outcome of one benchmark."""

    status: str
    """"measured", or why not."""
    minutes: float = 0.0
    files: tuple[str, ...] = ()
    """Names of the files that it wrote."""
    origin: Mapping[str, str] = field(default_factory=dict)
    """Arguments, code, machine and versions."""


class State:
    """The finished benchmarks of a folder.

    Args:
        folder: of the results; it must exist.

    Raises:
        ValueError: the state file there is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._all = self._read()

    def of(self, one: Benchmark, origin: Mapping[str, str]) -> Finished | None:
        """The outcome, if it came from the same origin and its files are still there."""
        found = self._all.get(one.name)
        if found is None or found.status != MEASURED or dict(found.origin) != dict(origin):
            return None
        return found if all((self.folder / name).exists() for name in one.writes) else None

    def last_origin(self, one: Benchmark) -> dict[str, str] | None:
        """Origin of the last run, whatever its outcome."""
        return dict(self._all[one.name].origin) if one.name in self._all else None

    def save(self, one: Benchmark, finished: Finished) -> None:
        """Add one; the file is whole at every moment."""
        self._all[one.name] = finished
        record = {name: asdict(each) for name, each in self._all.items()}
        beside = self.folder / f"{STATE}.new"
        write_json(record, beside)
        beside.replace(self.folder / STATE)

    def _read(self) -> dict[str, Finished]:
        path = self.folder / STATE
        if not path.exists():
            return {}
        try:
            record = json.loads(path.read_text())
            return {
                name: Finished(**{**each, "files": tuple(each["files"])})
                for name, each in record.items()
            }
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{path}: expected what run_all.py wrote, got something else ({error}); "
                "remove it, and everything is measured again"
            ) from error


# Running


def _run_all(chosen: Sequence[Benchmark], state: State, options: argparse.Namespace) -> int:
    """Run one after the other, save after each, and print what came of them."""
    done, status = dict[str, Finished](), 0
    try:
        with _progress() as progress:
            bar = _Bar(progress, chosen, options.quick)
            for one in chosen:
                done[one.name] = _finished(one, state, bar, options)
                bar.next(one)
    except KeyboardInterrupt:
        status = INTERRUPTED
    show(_outcomes(chosen, done, options.wordnet))
    failed = [one for one in done.values() if one.status not in (MEASURED, KEPT, _NO_GPU)]
    return status or int(bool(failed))


def _finished(one: Benchmark, state: State, bar: _Bar, options: argparse.Namespace) -> Finished:
    """The known outcome if it is up to date, else that of a run."""
    wanted = origin(one.arguments(quick=options.quick, wordnet=options.wordnet), one.peers)
    if one.needs_gpu and not _has_gpu():
        return Finished(_NO_GPU)
    before = state.of(one, wanted)
    if before and not options.fresh:
        return replace(before, status=KEPT)
    if one.keeps_rows and (options.fresh or state.last_origin(one) != wanted):
        _set_aside(one, options.results)
    state.save(one, Finished("interrupted", origin=wanted))
    finished = _run(one, bar, options, wanted)
    state.save(one, finished)
    return finished


def _set_aside(one: Benchmark, results: Path) -> None:
    """Rows that another origin left behind must not pass for those of this run."""
    for path in (results / name for name in one.writes):
        if path.exists():
            path.replace(results / "logs" / f"{path.name}.before")


def _run(
    one: Benchmark, bar: _Bar, options: argparse.Namespace, wanted: dict[str, str]
) -> Finished:
    """Run the script; its output goes to its log."""
    arguments = one.arguments(quick=options.quick, wordnet=options.wordnet)
    script = ROOT / "benchmarks" / one.script
    command = [sys.executable, str(script), *arguments, "--results", str(options.results)]
    log, start = options.results / "logs" / f"{one.name}.log", time.monotonic()
    before = _files(options.results)
    code = run_watched(command, log, ROOT, lambda: bar.show(one, time.monotonic() - start))
    changed = _files(options.results).items() - before.items()
    files = tuple(sorted(name for name, _ in changed))
    status = _status(code, [name for name in one.writes if not (options.results / name).exists()])
    return Finished(status, (time.monotonic() - start) / 60, files, wanted)


def _status(code: int, missing: Sequence[str]) -> str:
    if code:
        return f"exit {code}, see its log"
    return f"did not write {', '.join(missing)}" if missing else MEASURED


def origin(arguments: Sequence[str], peers: Sequence[str] = ()) -> dict[str, str]:
    """All that a result depends on: arguments, code, machine and versions; not the day."""
    installed = " ".join(f"{name}={installed(name)}" for name in peers)
    own = {"arguments": " ".join(arguments), "code": fingerprint(), "peers": installed}
    where = {name: text for name, text in provenance().items() if name not in ("commit", "date")}
    return {**own, **where}


@cache
def fingerprint() -> str:
    """Hash of the sources, so that a commit of text or figures repeats nothing."""
    digest = hashlib.sha256()
    for path in sorted(path for room in _SOURCES for path in (ROOT / room).rglob("*")):
        name = path.relative_to(ROOT).as_posix()
        if path.suffix in (".py", ".json") and not name.startswith("benchmarks/results/"):
            digest.update(name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _files(folder: Path) -> dict[str, int]:
    """Names, and times of the last change."""
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.is_file()}


@cache
def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


class _Bar:
    """Which benchmark runs, and about how long the rest takes."""

    def __init__(self, progress: Progress, chosen: Sequence[Benchmark], quick: bool) -> None:
        self.expected = {
            each.name: each.quick_minutes if quick else each.minutes for each in chosen
        }
        self.names, self.behind, self.progress = list(self.expected), 0.0, progress
        self.task = progress.add_task("", total=sum(self.expected.values()), left="")

    def show(self, one: Benchmark, seconds: float) -> None:
        place = f"{self.names.index(one.name) + 1} of {len(self.names)}"
        # One that takes longer than expected holds the bar where it should have ended.
        now = self.behind + min(seconds / 60, self.expected[one.name])
        left = f"about {sum(self.expected.values()) - now:.0f} min left"
        description = f"{one.name} ({place}), {seconds / 60:.1f} min"
        self.progress.update(self.task, completed=now, description=description, left=left)

    def next(self, one: Benchmark) -> None:
        self.behind += self.expected[one.name]
        self.progress.update(self.task, completed=self.behind)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description:<32}"),
        BarColumn(),
        TextColumn("{task.fields[left]}"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    )


# Tables


def _outcomes(chosen: Sequence[Benchmark], done: Mapping[str, Finished], wordnet: Path) -> str:
    lines = []
    for one in chosen:
        each = done.get(one.name, Finished("not run"))
        minutes = f"{each.minutes:.1f}" if each.minutes else ""
        files = " ".join(each.files)
        lines.append([one.name, each.status, minutes, files, _remark(one, wordnet)])
    return table(["benchmark", "status", "minutes", "files", "remark"], lines, "llrll")


def _listing(chosen: Sequence[Benchmark], wordnet: Path) -> str:
    lines = []
    for one in chosen:
        minutes = f"{one.minutes:g}", f"{one.quick_minutes:g}"
        needs = _NO_GPU if one.needs_gpu else _remark(one, wordnet)
        lines.append([one.name, *minutes, one.command(), " ".join(one.writes), needs])
    head = ["benchmark", "minutes", "quick", "command", "writes", "needs"]
    return table(head, lines, "lrrlll")


def _remark(one: Benchmark, wordnet: Path) -> str:
    """Optional parts that this machine lacks."""
    absent = [name for name in one.peers if not installed(name)]
    absent += ["WordNet (--wordnet)"] if one.needs_wordnet and not wordnet.exists() else []
    return f"without {', '.join(absent)}" if absent else ""


def _parser() -> argparse.ArgumentParser:
    made = parser(__doc__)
    made.set_defaults(results=None)
    add = made.add_argument
    add("--quick", action="store_true", help="small versions, which take minutes")
    add("--only", nargs="+", metavar="NAME", help="these alone, in this order; see --list")
    add("--list", action="store_true", help="show what there is and run nothing")
    add("--fresh", action="store_true", help="run again what is finished, too")
    add("--wordnet", type=Path, default=WORDNET, help="WordNet 3.0's files (%(default)s)")
    return made


if __name__ == "__main__":
    # So that a process that is told to end takes its benchmark along.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
