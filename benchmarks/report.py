"""Puts the figures of benchmarks/results into the documentation, and checks that they are there.

    python benchmarks/report.py           # writes docs/benchmarks.md and the marked blocks
    python benchmarks/report.py --check   # changes nothing; status 1 if a figure is not that of
                                          # the results, or stands outside of a marked block

A marked block of README.md or docs/*.md is what lies between `<!-- results: NAME -->` and
`<!-- end -->`; the names are those of `BLOCKS`. A block within a line must not begin it:
Markdown would take the whole line for HTML.

A benchmark is a script with `section(results)`, its part of docs/benchmarks.md, and `BLOCKS`, what
other pages quote of it. catalogue.py says how it is run, results.py reads and writes its rows, and
plots.py draws.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby, zip_longest
from pathlib import Path

import distributed
import engine
import gpu_losses
import gpu_plan
import integrations
import late_interaction
import loss_figures
import memory_predicted
import memory_vs_batch
import negatives
import objectives
import retrieval_losses
import scaling
from catalogue import BENCHMARKS, LATE_INTERACTION, PAIR_LOSSES, RETRIEVAL, find
from results import (
    FOLDER,
    ROOT,
    measured_words,
    origin_words,
    paragraph,
    parser,
    read_csv,
    read_json,
    table,
)

import recipes

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
    made = parser(__doc__)
    made.add_argument("--check", action="store_true", help="write nothing; 1 if stale")
    options = made.parse_args(arguments)
    if not options.check:
        for name, text in wanted(ROOT, options.results).items():
            (ROOT / name).write_text(text, encoding="utf-8")
    complaints = list(problems(ROOT, options.results))
    for complaint in complaints:
        print(complaint, file=sys.stderr)
    return 1 if complaints else 0


# Marked blocks


def _demo(results: Path) -> str:
    """The table of `make demo`."""
    from gradcache_clip.train.report import RunFigures, to_markdown

    record = read_json(results / NOT_YET["demo"])
    return to_markdown([RunFigures(**figures) for figures in record["figures"]]).strip()


def _measured(results: Path, names: Sequence[str]) -> str:
    return measured_words(_origins(names, results))


QUOTED = {
    "demo": ("demo.json",),
    "memory": ("memory_vs_batch.csv",),
    "negatives": ("negatives.csv",),
    "engine": ("engine.json",),
    "loss": PAIR_LOSSES,
    "objectives": (RETRIEVAL, LATE_INTERACTION),
}
"""Files whose commits pages name beside what they quote, as the blocks `measured-NAME`."""
BLOCKS: dict[str, Callable[[Path], str]] = {
    "demo": _demo,
    **memory_vs_batch.BLOCKS,
    **negatives.BLOCKS,
    **engine.BLOCKS,
    **loss_figures.BLOCKS,
    **scaling.BLOCKS,
    **recipes.BLOCKS,
    **objectives.BLOCKS,
    **integrations.BLOCKS,
    **{f"measured-{name}": partial(_measured, names=names) for name, names in QUOTED.items()},
}
NOT_YET = {"demo": "demo.json", "measured-demo": "demo.json"}
"""Blocks that stay as they are until their file is there."""


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


# docs/benchmarks.md: every result in full, with where it comes from and the command behind it

_HEAD = """# Benchmarks

{about}

    python benchmarks/run_all.py           # measures all of it again; hours
    python benchmarks/run_all.py --quick   # small versions, minutes
    python benchmarks/report.py            # writes the figures into all pages
"""
_ABOUT = (
    "Every figure on this page is read from the files in `benchmarks/results` by "
    "`python benchmarks/report.py`; none is typed. A + behind a commit says that the code had "
    "changes not committed."
)


@dataclass(frozen=True)
class Section:
    """One benchmark, or one part of it."""

    title: str
    benchmark: str
    """Its name in catalogue.py."""
    body: Callable[[Path], str]
    picture: str = ""
    """File in the folder of results, shown if it is there."""
    files: tuple[str, ...] = ()
    """Files that it reads; all that the benchmark writes if empty."""

    def reads(self) -> tuple[str, ...]:
        return self.files or find(self.benchmark).writes


def page(results: Path) -> str:
    """The whole page; what has not been measured is listed at its end."""
    there = [each for each in SECTIONS if all((results / name).exists() for name in each.reads())]
    parts = [_HEAD.format(about=paragraph(_ABOUT)), *(_section(each, results) for each in there)]
    return "\n".join([*parts, *_not_measured(results)])


def _section(section: Section, results: Path) -> str:
    links = ", ".join(f"[{name}]({FOLDER}/{name})" for name in section.reads())
    parts = [
        f"## {section.title}",
        *_picture(section, results),
        section.body(results),
        f"    {find(section.benchmark).command()}",
        paragraph(f"{origin_words(_origins(section.reads(), results))}. Data: {links}."),
    ]
    return "\n\n".join(parts) + "\n"


def _picture(section: Section, results: Path) -> list[str]:
    if not section.picture or not (results / section.picture).exists():
        return []
    return [f"![{section.title}]({FOLDER}/{section.picture})"]


def _origins(names: Sequence[str], results: Path) -> list[Mapping[str, str]]:
    """Where each row of each file comes from."""
    found: list[Mapping[str, str]] = []
    for name in names:
        if name.endswith(".json"):
            record = read_json(results / name)
            # A part that can be measured alone has an origin of its own.
            parts = [record, *(part for part in record.values() if isinstance(part, Mapping))]
            found += [part["origin"] for part in parts if "origin" in part]
        else:
            found += read_csv(results / name)
    return found


def _not_measured(results: Path) -> list[str]:
    """The benchmarks without results here, with their commands."""
    without = [
        f"- {one.name}: `{one.command()}`" + (", on an NVIDIA GPU" if one.needs_gpu else "")
        for one in BENCHMARKS
        if not all((results / name).exists() for name in one.writes)
    ]
    return ["## Not measured yet\n", *without, ""] if without else []


def _kernels(results: Path) -> str:
    """The worst kernel of each architecture and dtype."""
    rows = read_csv(results / "kernel_resources.csv")
    rows.sort(key=_machine)
    lines = [_kernel_line(list(group)) for _, group in groupby(rows, key=_machine)]
    head = (
        *("sm", "dtype", "kernels", "most registers", "bytes spilled", "most shared memory"),
        "matrix units",
    )
    text = f"Compiled to machine code with Triton {rows[0]['triton']}, without a GPU."
    return f"{text}\n\n{table(head, lines, 'rlrrrrl')}\n\n{_predictions(results)}"


def _predictions(results: Path) -> str:
    """Times by the cycle model."""
    rows = read_csv(results / "kernel_predictions.csv")
    rows.sort(key=lambda row: row["loss"])
    names = "loss", "gpu", "width", "ms", "tflop_per_s", "convention", "tiles"
    lines = [[*(row[name] for name in names), row["products_tflop_per_s"]] for row in rows]
    head = "loss", "GPU", "D", "ms", "TFLOP/s", "as", "tile kernels: TFLOP/s (binding)", "products"
    text = (
        "Predicted, not measured: forward and backward in bf16 at B = 65,536 by a model that takes "
        "instruction\ncounts from this machine code and rates from NVIDIA's documents "
        "(`benchmarks/cycle_model.py`).\nIt knows no latencies, power limits or gaps between "
        "launches; the bandwidth of the L2, which binds the\ngradient on the H100, is near what "
        "others measured on an H200. A GPU will be slower. TFLOP/s count the products\nof the "
        "convention beside "
        'them; "products" is the rate assumed for the vendor\'s.'
    )
    return f"{text}\n\n{table(head, lines, 'llrrrllr')}"


def _machine(row: Mapping[str, str]) -> tuple[int, str]:
    return int(row["architecture"]), row["dtype"]


def _kernel_line(rows: Sequence[Mapping[str, str]]) -> list[str]:
    limit = int(rows[0]["shared_limit_bytes"]) // 1024
    units = sorted({unit for row in rows for unit in row["matrix_instructions"].split()})
    return [
        rows[0]["architecture"],
        rows[0]["dtype"],
        str(len(rows)),
        str(max(int(row["registers"]) for row in rows)),
        str(sum(int(row["spilled_bytes"]) for row in rows)),
        f"{max(int(row['shared_bytes']) for row in rows) // 1024} of {limit} KiB",
        " ".join(units),
    ]


def _gpu(results: Path) -> str:
    """Outcome of each section of the suite."""
    lines = [
        [each["name"], each["outcome"], f"{each['seconds']:.0f}"]
        for each in read_json(results / _suite("gpu_suite.json")[0])["sections"]
    ]
    return table(["section", "outcome", "seconds"], lines, "llr")


def _suite(*names: str) -> tuple[str, ...]:
    """Files in the folder of the suite on a GPU."""
    return tuple(f"gpu/{name}" for name in names)


def _of_suite(body: Callable[[Path], str]) -> Callable[[Path], str]:
    return lambda results: body(results / "gpu")


SECTIONS = (
    Section("Memory of a training step", "memory", memory_vs_batch.section, "memory_vs_batch.png"),
    Section("Memory on named GPUs", "predicted", memory_predicted.section, "memory_predicted.png"),
    Section("A training step beside other engines", "engine", engine.section, "engine_budget.png"),
    Section("The losses, on the CPU in fp32", "loss", loss_figures.section, files=PAIR_LOSSES),
    Section(
        "The losses, on a GPU", "gpu", _of_suite(gpu_losses.page), files=_suite(gpu_losses.FILE)
    ),
    Section(
        "A training step, on a GPU",
        "gpu",
        _of_suite(gpu_plan.page),
        files=_suite(gpu_plan.STEPS, gpu_plan.FILE),
    ),
    Section(
        "Objectives of retrieval, on the CPU", "loss", retrieval_losses.section, files=(RETRIEVAL,)
    ),
    Section(
        "Late interaction, on the CPU", "loss", late_interaction.section, files=(LATE_INTERACTION,)
    ),
    Section("What large batches buy", "negatives", negatives.section, "negatives.png"),
    Section("One batch on several processes", "distributed", distributed.section),
    Section("Drop-ins for other libraries", "integrations", integrations.section),
    Section("From two processes to a thousand", "scaling", scaling.section, "scaling.png"),
    Section("Resources of the kernels", "kernels", _kernels),
    Section("The suite on a GPU", "gpu", _gpu),
)


if __name__ == "__main__":
    sys.exit(main())
