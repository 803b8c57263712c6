"""Puts the figures of benchmarks/results into the documentation, and checks that they are there.

    python benchmarks/report.py           # writes docs/benchmarks.md and the marked blocks
    python benchmarks/report.py --check   # changes nothing; status 1 if a figure is not that of
                                          # the results, or stands outside of a marked block

A marked block of README.md or docs/*.md is what lies between `<!-- results: NAME -->` and
`<!-- end -->`; the names are those of report_blocks.py. A block within a line must not begin it:
Markdown would take the whole line for HTML.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path

from report_blocks import BLOCKS, NOT_YET
from report_page import page

ROOT = Path(__file__).resolve().parents[1]
PAGE = "docs/benchmarks.md"
SETTINGS = {
    ("README.md", "Two commands"): "the size of a download and the share that is held out",
    ("docs/losses.md", "Implementations"): "sizes that the code sets",
    ("docs/planning.md", "Will it fit?"): "arguments of a command",
}
"""Headings under which numbers with units are no results, and what they are."""
_BLOCK = re.compile(r"<!-- results: ([\w-]+) -->(.*?)<!-- end -->", re.DOTALL)
_START = "<!-- results:"
_FIGURE = re.compile(
    r"\d\s?(%|[KMGT]i?B\b|x ours|x \(|times as|microseconds|milliseconds|ms\b)|\d(\.\d+)? ± \d"
)


class MarkError(ValueError):
    """A marked block that cannot be read."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the pages, or with --check compare them; 1 if one is not as it should be."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if stale")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args(arguments)
    if not options.check:
        for name, text in wanted(ROOT, options.results).items():
            (ROOT / name).write_text(text, encoding="utf-8")
    complaints = list(problems(ROOT, options.results))
    for complaint in complaints:
        print(complaint, file=sys.stderr)
    return 1 if complaints else 0


def wanted(root: Path, results: Path) -> dict[str, str]:
    """Every page under `root` that shows results, by its name, as the results want it.

    Raises:
        MarkError: a page has a block without end, inside another, or of an unknown name.
        FileNotFoundError: a block needs results that are not there.
    """
    found = {name: _rewritten(name, _text(root, name), results) for name in _pages(root)}
    return {**found, PAGE: page(results)}


def problems(root: Path, results: Path) -> Iterator[str]:
    """One line for each page that is not as the results want it, and for each figure unmarked."""
    for name, text in wanted(root, results).items():
        now = _text(root, name) if (root / name).exists() else ""
        if now != text:
            yield f"{name}: {_first_difference(now, text)}; run python benchmarks/report.py"
    for name in _pages(root):
        for number, line in unmarked(name, _text(root, name)):
            yield (
                f"{name}, line {number}: expected figures of results in a marked block, got one "
                f"outside: {line.strip()}"
            )


def unmarked(name: str, text: str) -> Iterator[tuple[int, str]]:
    """Lines with a figure outside of any block: all of README.md, the tables of other pages."""
    heading, is_code = "", False
    for number, line in enumerate(_blanked(text).splitlines(), 1):
        is_code ^= line.startswith("```")
        if line.startswith("#") and not is_code:
            heading = line.lstrip("# ")
        told = name == "README.md" or line.startswith("|")
        if told and not is_code and (name, heading) not in SETTINGS and _FIGURE.search(line):
            yield number, line


def _pages(root: Path) -> list[str]:
    """Those that people write."""
    written = sorted((root / "docs").rglob("*.md"))
    pages = ["README.md", *(path.relative_to(root).as_posix() for path in written)]
    return [name for name in pages if name != PAGE]


def _text(root: Path, name: str) -> str:
    return (root / name).read_text(encoding="utf-8")


def _rewritten(name: str, text: str, results: Path) -> str:
    """The page with every block as the results want it."""
    blocks = list(_BLOCK.finditer(text))
    inner = [block[2] for block in blocks if _START in block[2]]
    if inner or text.count(_START) != len(blocks):
        raise MarkError(f"{name}: expected `<!-- end -->` behind each `{_START} ... -->`, got none")
    for block in blocks:
        if block[1] not in BLOCKS:
            names = ", ".join(BLOCKS)
            raise MarkError(f"{name}: results: expected one of {names}, got {block[1]}")
        if "\n" not in block[2] and text[: block.start()].endswith("\n"):
            raise MarkError(f"{name}: {block[1]}: a block within a line must not begin it")
    return _BLOCK.sub(lambda block: _filled(block, results), text)


def _filled(block: re.Match[str], results: Path) -> str:
    name, old = block.groups()
    if name in NOT_YET and not (results / NOT_YET[name]).exists():
        return block[0]
    edge = "\n" if old.startswith("\n") else ""
    return f"{_START} {name} -->{edge}{BLOCKS[name](results)}{edge}<!-- end -->"


def _blanked(text: str) -> str:
    """The text without what is in blocks, line for line."""
    return _BLOCK.sub(lambda block: "\n" * block[2].count("\n"), text)


def _first_difference(now: str, text: str) -> str:
    pairs = zip_longest(now.splitlines(), text.splitlines(), fillvalue="(nothing)")
    found = next(
        ((number, *pair) for number, pair in enumerate(pairs, 1) if pair[0] != pair[1]),
        (1, "another end of the file", "a line break"),
    )
    return f"line {found[0]}: the results want {found[2]!r}, got {found[1]!r}"


if __name__ == "__main__":
    sys.exit(main())
