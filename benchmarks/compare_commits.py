"""Trains short runs of the recipes at two commits: are they equal, bit for bit?

    python benchmarks/compare_commits.py c3e3e84 HEAD
    python benchmarks/compare_commits.py HEAD .             # the working tree as it is
    python benchmarks/compare_commits.py A B --recipes clip moco --data data/emoji

Each side is checked out with `git worktree` and trains five steps of its own recipes through its
own command line, with one thread. Losses, the other figures and the weights after every step are
compared. Status 1: something differs, or a run failed.

A side's settings are those of its own benchmarks/short_runs.py, and of this one where it has none.
Keys that it does not know are left out and replaced by hand:

    python benchmarks/compare_commits.py A B \
        --without-b train.chunk_size --overrides-b train.rows_at_once=10
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import short_runs
from rich.console import Console
from rich.table import Table
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ("loss", "accuracy", "grad_norm", "logit_scale")


@dataclass(frozen=True)
class Side:
    """One of the two commits, checked out."""

    name: str
    checkout: Path
    overrides: tuple[str, ...] = ()
    without: tuple[str, ...] = ()

    def settings(self, recipe: str, data: Path, output: Path) -> list[str]:
        """Overrides that make its recipe a short run which keeps the weights of every step."""
        found = [
            *_short_runs_of(self.checkout).settings(recipe, data, output),
            *("train.checkpoint_every=1", f"train.keep_checkpoints={short_runs.STEPS}"),
        ]
        kept = [setting for setting in found if setting.split("=")[0] not in self.without]
        return [*kept, *self.overrides]


@dataclass(frozen=True)
class Run:
    """What a run left behind."""

    figures: dict[int, dict[str, float]] = field(default_factory=dict)
    """Step -> the figures of its training step."""
    held_out: dict[str, float] = field(default_factory=dict)
    """Metrics after the last step."""
    weights: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Step -> file and name of each tensor -> its values."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare; 1 if anything differs."""
    options = _parser().parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data = short_runs.make_data(folder / "data", options.recipes)
        if options.data:
            (data / "pairs").rename(data / "made")
            (data / "pairs").symlink_to(options.data.resolve(), target_is_directory=True)
        with _side("a", options, folder) as a, _side("b", options, folder) as b:
            equal = [_compare(recipe, a, b, data, folder) for recipe in options.recipes]
    print(f"{sum(equal)} of {len(equal)} recipes are equal bit for bit")
    return int(not all(equal))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for side in "ab":
        parser.add_argument(
            side, metavar=side.upper(), help="a commit, or a folder with a checkout"
        )
        parser.add_argument(
            f"--overrides-{side}", nargs="+", default=[], metavar="KEY=VALUE", help="added settings"
        )
        parser.add_argument(
            f"--without-{side}", nargs="+", default=[], metavar="KEY", help="settings left out"
        )
    names = tuple(short_runs.RECIPES)
    parser.add_argument("--recipes", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument(
        "--data", type=Path, help="train/ and validation/ of pairs, in the place of made ones"
    )
    return parser


@contextmanager
def _side(letter: str, options: argparse.Namespace, folder: Path) -> Iterator[Side]:
    """Check out what was asked for, for the time of the comparison."""
    asked = getattr(options, letter)
    more = {key: tuple(getattr(options, f"{key}_{letter}")) for key in ("overrides", "without")}
    if Path(asked).is_dir():
        yield Side(asked, Path(asked).resolve(), **more)
        return
    checkout = folder / letter
    _git("worktree", "add", "--quiet", "--detach", str(checkout), asked)
    try:
        yield Side(f"{asked} ({_git('rev-parse', '--short', asked)})", checkout, **more)
    finally:
        _git("worktree", "remove", "--force", str(checkout))


def _git(*words: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *words], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"git {' '.join(words)}: expected status 0, got {done.returncode}")
    return done.stdout.strip()


def _short_runs_of(checkout: Path) -> Any:
    path = checkout / "benchmarks" / "short_runs.py"
    if not path.is_file():
        return short_runs
    spec = importlib.util.spec_from_file_location("short_runs_of_a_commit", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _compare(recipe: str, a: Side, b: Side, data: Path, folder: Path) -> bool:
    """Train on both sides and print a table; whether all is equal."""
    outputs = [folder / f"{recipe}-{letter}" for letter in "ab"]
    if not all(
        _train(side, recipe, data, output) for side, output in zip((a, b), outputs, strict=True)
    ):
        return False
    runs = [read_run(output) for output in outputs]
    table = Table(title=f"{recipe}: {a.name} and {b.name}", title_justify="left")
    for column in ("step", *FIGURES, "weights", "SHA-256 of the weights"):
        table.add_column(column)
    for cells in step_rows(*runs):
        table.add_row(*cells)
    Console(width=140).print(table)
    for line in [*names_alone(*runs), *(differences := other_differences(*runs))]:
        print(line)
    return not differences and all(equal_step(*runs, step) for step in runs[0].figures)


def _train(side: Side, recipe: str, data: Path, output: Path) -> bool:
    """Run the side's own command line; print the end of what it said if it failed."""
    environment = os.environ | {"PYTHONPATH": str(side.checkout), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "gradcache_clip.cli", "train", f"recipes/{recipe}.yaml"]
    done = subprocess.run(
        [*command, *side.settings(recipe, data, output)],
        cwd=side.checkout,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        print(f"{recipe}: failed at {side.name}:\n{done.stdout[-2000:]}")
    return not done.returncode


def read_run(output: Path) -> Run:
    """Read what a run wrote."""
    run = Run()
    for line in (output / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if "loss" in row:
            run.figures[row["step"]] = {name: row[name] for name in FIGURES}
    run.held_out.update(json.loads((output / "summary.json").read_text())["metrics"])
    for file in sorted(output.rglob("*.safetensors")):
        found = re.search(r"\d+", file.parent.name)
        assert found is not None, f"{file}: expected a folder with the number of a step"
        weights = run.weights.setdefault(int(found.group()), {})
        weights |= {f"{file.stem}: {name}": value for name, value in load_file(file).items()}
    return run


def equal_step(a: Run, b: Run, step: int) -> bool:
    """Whether figures and weights after a step are the same, bit for bit."""
    figures = a.figures[step] == b.figures[step]
    return figures and _hash(a.weights[step]) == _hash(b.weights[step])


def step_rows(a: Run, b: Run) -> Iterator[list[str]]:
    """Cells of the table, for each step that both sides took."""
    for step in sorted(a.figures.keys() & b.figures.keys()):
        ours, theirs = a.weights[step], b.weights[step]
        differences = [abs(a.figures[step][name] - b.figures[step][name]) for name in FIGURES]
        hashes = list(dict.fromkeys((_hash(ours), _hash(theirs))))
        weights = "equal" if len(hashes) == 1 else _largest_difference(ours, theirs)
        yield [str(step), *map(_said, differences), weights, " and ".join(hashes)]


def _said(difference: float) -> str:
    return f"differs by {difference:.1e}" if difference else "equal"


def _hash(weights: dict[str, Any]) -> str:
    """The first digits of one SHA-256 over all tensors, whose names and files may change."""
    digests = sorted(
        hashlib.sha256(f"{value.dtype}{value.shape}".encode() + value.tobytes()).digest()
        for value in weights.values()
    )
    return hashlib.sha256(b"".join(digests)).hexdigest()[:12]


def _largest_difference(a: dict[str, Any], b: dict[str, Any]) -> str:
    """Of the tensors that have the same name and shape."""
    common = [name for name in a.keys() & b.keys() if a[name].shape == b[name].shape]
    if not common:
        return "no name in common"
    moved = {name: abs(a[name].astype(float) - b[name].astype(float)).max() for name in common}
    worst = max(moved, key=moved.__getitem__)
    return f"differ by {moved[worst]:.1e}, most in {worst}"


def other_differences(a: Run, b: Run) -> list[str]:
    """A line for each held-out metric that differs, and for steps that one side has alone."""
    lines = [
        f"held out: {name}: {a.held_out.get(name)} and {b.held_out.get(name)}"
        for name in sorted(a.held_out.keys() | b.held_out.keys())
        if a.held_out.get(name) != b.held_out.get(name)
    ]
    if a.figures.keys() != b.figures.keys() or not a.figures:
        lines.append(f"steps: {sorted(a.figures)} and {sorted(b.figures)}")
    return lines


def names_alone(a: Run, b: Run) -> Iterator[str]:
    """A line for each side that has names of tensors which the other lacks: no difference yet."""
    names = [{name for step in run.weights.values() for name in step} for run in (a, b)]
    for side, alone in zip("AB", (names[0] - names[1], names[1] - names[0]), strict=True):
        if alone:
            yield f"tensors named in {side} alone: {len(alone)}, such as {min(alone)}"


if __name__ == "__main__":
    sys.exit(main())
