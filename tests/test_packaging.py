"""What goes into an archive of the sources, and what a wheel made from it holds."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import pytest
from packaging.metadata import Metadata
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

pytest.importorskip("setuptools", reason="archives are built with setuptools")
ROOT = Path(__file__).parent.parent
SOURCES = (
    "gradcache_clip", "kernels", "tests", "docs", "examples", "benchmarks", ".ci", "setup.py",
    "pyproject.toml", "MANIFEST.in", "Makefile", "README.md", "CONTRIBUTING.md", "CHANGELOG.md",
    "LICENSE", ".pre-commit-config.yaml", "constraints.txt",
)  # fmt: skip
DATA = "gradcache_clip/memory/cards.json"


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An sdist of a copy of the tree, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    tree = folder / "tree"
    tree.mkdir()
    ignored = shutil.ignore_patterns("__pycache__", "results")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(ROOT / name, tree / name)
    setup(tree, "sdist", "--dist-dir", str(folder))
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def metadata(unpacked: Path) -> Metadata:
    return Metadata.from_email((unpacked / "PKG-INFO").read_bytes(), validate=False)


def asked(metadata: Metadata, extra: str) -> dict[str, Requirement]:
    """Name -> requirement, of the library with an extra on Linux."""
    place = {"extra": extra, "platform_system": "Linux"}
    found = [r for r in metadata.requires_dist or () if not r.marker or r.marker.evaluate(place)]
    return {canonicalize_name(requirement.name): requirement for requirement in found}


def setup(tree: Path, *arguments: str) -> None:
    command = [sys.executable, "setup.py", "-q", *arguments]
    subprocess.run(command, cwd=tree, check=True, capture_output=True)


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*.py")}


def test_an_archive_holds_each_kernel_once(unpacked: Path) -> None:
    found = Counter(p.name for p in unpacked.rglob("*.py") if p.parent.name == "kernels")
    assert found == Counter(names(ROOT / "kernels"))
    assert not (unpacked / "gradcache_clip" / "kernels").exists()


def test_an_archive_holds_what_its_makefile_needs(unpacked: Path) -> None:
    for folder in ("tests", "examples", "benchmarks"):
        assert names(unpacked / folder) == names(ROOT / folder)
    assert names(unpacked / "gradcache_clip") == {
        name for name in names(ROOT / "gradcache_clip") if not name.startswith("kernels/")
    }
    assert all((unpacked / name).exists() for name in SOURCES)
    assert (unpacked / DATA).exists()


def test_an_installed_archive_has_the_kernels(unpacked: Path, tmp_path: Path) -> None:
    setup(unpacked, "build", "--build-lib", str(tmp_path / "lib"))
    code = "import gradcache_clip.kernels.contrast_gradient as it; print(it.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path / "lib",
        check=True,
        capture_output=True,
        text=True,
    )
    expected = tmp_path / "lib" / "gradcache_clip" / "kernels" / "contrast_gradient.py"
    assert Path(found.stdout.strip()) == expected
    assert (tmp_path / "lib" / DATA).exists()
    assert {path.name for path in (tmp_path / "lib").iterdir()} == {"gradcache_clip"}
    makers = {path.name for path in (ROOT / "examples" / "data").glob("*.py")}
    assert "emoji.py" in makers
    assert not makers & {path.name for path in (tmp_path / "lib").rglob("*.py")}


@pytest.mark.parametrize("extra", ["train", "deepspeed", "test", "docs"])
@pytest.mark.parametrize("python", ["3.10", "3.13"])
def test_constraints_pin_one_admitted_release_of_what_is_asked(metadata, extra, python):
    lines = (line.split("#")[0] for line in (ROOT / "constraints.txt").read_text().splitlines())
    pins = [Requirement(line) for line in lines if line.strip()]
    place = {"python_full_version": f"{python}.0", "sys_platform": "linux"}
    pinned = {
        canonicalize_name(pin.name): str(pin.specifier).removeprefix("==")
        for pin in pins
        if not pin.marker or pin.marker.evaluate(place)
    }
    # A local build, such as +cpu, lies in no index.
    assert not [version for version in pinned.values() if "+" in version]
    for name, requirement in asked(metadata, extra).items():
        assert requirement.specifier.contains(pinned[name]), f"make constraints: {requirement}"


def test_no_extra_asks_for_libraries_that_exclude_each_other(metadata):
    for extra in metadata.provides_extra or ():
        assert not {"pylate", "sentence-transformers"} <= asked(metadata, extra).keys(), extra


def test_the_library_alone_needs_torch_alone(metadata):
    assert asked(metadata, "").keys() == {"torch"}
