"""Five steps of every recipe give the figures of golden.json, whatever is rebuilt around them.

    python tests/test_golden.py --write

writes the file anew, for changes that are meant to move figures; the commit says why. Whether two
commits agree to the last bit on one machine is told by benchmarks/compare_commits.py.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version
from recipe_runs import RECIPES, run_recipe
from tiny_run import logged

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import short_runs

from gradcache_clip.cli import main

FILE = Path(__file__).parent / "golden.json"
FIGURES = ("loss", "accuracy", "grad_norm", "logit_scale")
# Processors (SSE, AVX2, AVX-512) and numbers of threads moved losses by up to 3e-6, norms of
# gradients by up to 1.3e-5, and a mean rank by one place of one query.
TOLERANCES = {"grad_norm": 1e-4, "metrics": 1e-3}
# Batch norm amplifies rounding: another instruction set of MKL moved norms by 8e-3.
ROUGH = {"moco_image": 2e-2}
LIBRARIES = ("torch", "timm", "transformers", "tokenizers")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return short_runs.make_data(tmp_path_factory.mktemp("golden"))


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    return json.loads(FILE.read_text())


@pytest.fixture(scope="module")
def as_written(golden: dict[str, Any]) -> None:
    """Skip beside other libraries: their initial weights and kernels give other figures."""
    here, written = libraries(), golden["libraries"]
    if here != written:
        pytest.skip(f"golden.json was written beside {written}, here are {here}")


def libraries() -> dict[str, str]:
    """Name -> version, in which all builds of a release are one."""
    return {name: Version(version(name)).public for name in LIBRARIES}


def figures_of(recipe: str, data: Path, output: Path) -> dict[str, Any]:
    """Figure -> its value after each step; and the held-out metrics at the end."""
    settings = short_runs.settings(recipe, data, output)
    summary = run_recipe(recipe, data, output, *settings, "train.checkpoint_every=0")
    figures = {name: [*logged(output, name).values()] for name in FIGURES}
    return {**figures, "metrics": summary.metrics}


@pytest.mark.usefixtures("as_written")
@pytest.mark.parametrize("recipe", short_runs.RECIPES)
def test_five_steps_are_those_of_the_golden_file(recipe, data, tmp_path, golden):
    found, expected = figures_of(recipe, data, tmp_path / "run"), golden["recipes"][recipe]
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        tolerance = ROUGH.get(recipe, TOLERANCES.get(name, 1e-5))
        assert found[name] == pytest.approx(values, rel=tolerance, abs=tolerance), (
            f"{name} of {recipe}"
        )


@pytest.mark.parametrize("recipe", short_runs.RECIPES)
def test_verify_says_that_it_is_exact(recipe, data, tmp_path, capsys):
    settings = short_runs.settings(recipe, data, tmp_path / "run")
    assert main(["verify", str(RECIPES / f"{recipe}.yaml"), *settings, "--rows", "12"]) == 0
    assert "exact: all " in capsys.readouterr().out


def test_every_recipe_is_in_the_golden_file(golden):
    names = {path.stem for path in RECIPES.glob("*.yaml")}
    assert names == {*short_runs.RECIPES} == {*golden["recipes"]}
    for figures in golden["recipes"].values():
        assert all(len(figures[name]) == short_runs.STEPS for name in FIGURES)


def write() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data = short_runs.make_data(folder / "data")
        recipes = {name: figures_of(name, data, folder / name) for name in short_runs.RECIPES}
    runs = ",\n".join(f'"{name}": {_lines(figures)}' for name, figures in recipes.items())
    FILE.write_text(f'{{"libraries": {json.dumps(libraries())},\n"recipes": {{\n{runs}\n}}}}\n')


def _lines(figures: dict[str, Any]) -> str:
    """JSON with one figure a line, which a diff shows well."""
    return "{\n" + ",\n".join(f' "{k}": {json.dumps(v)}' for k, v in figures.items()) + "\n}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", required=True, help="write golden.json")
    parser.parse_args()
    write()
