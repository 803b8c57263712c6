"""docs/benchmarks.md: every result in full, with where it comes from and the command behind it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import report_sections as sections
from catalogue import BENCHMARKS, find
from report_tables import origin_words, paragraph, read_csv, read_json

_HEAD = """# Benchmarks

{about}

    python benchmarks/run_all.py           # measures all of it again; hours
    python benchmarks/run_all.py --quick   # small versions, about five minutes
    python benchmarks/report.py            # writes the figures into this page and the others
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
    """What it reads; what the benchmark writes if empty."""

    def reads(self) -> tuple[str, ...]:
        return self.files or find(self.benchmark).writes


def page(results: Path) -> str:
    """The whole page; what has not been measured is listed at its end."""
    there = [each for each in SECTIONS if all((results / name).exists() for name in each.reads())]
    parts = [_HEAD.format(about=paragraph(_ABOUT)), *(_section(each, results) for each in there)]
    return "\n".join([*parts, *_not_measured(results)])


def _section(section: Section, results: Path) -> str:
    links = ", ".join(f"[{name}]({sections.FOLDER}/{name})" for name in section.reads())
    parts = [
        f"## {section.title}",
        *_picture(section, results),
        section.body(results),
        f"    {find(section.benchmark).command()}",
        paragraph(f"{origin_words(_origins(section, results))}. Data: {links}."),
    ]
    return "\n\n".join(parts) + "\n"


def _picture(section: Section, results: Path) -> list[str]:
    if not section.picture or not (results / section.picture).exists():
        return []
    return [f"![{section.title}]({sections.FOLDER}/{section.picture})"]


def _origins(section: Section, results: Path) -> list[Mapping[str, str]]:
    """Where each row of each file comes from."""
    found: list[Mapping[str, str]] = []
    for name in section.reads():
        if name.endswith(".json"):
            record = read_json(results, name)
            # A part that can be measured alone has an origin of its own.
            parts = [record, *(part for part in record.values() if isinstance(part, Mapping))]
            found += [part["origin"] for part in parts if "origin" in part]
        else:
            found += read_csv(results, name)
    return found


def _not_measured(results: Path) -> list[str]:
    """The benchmarks without results here, with their commands."""
    without = [
        f"- {one.name}: `{one.command()}`" + (", on an NVIDIA GPU" if one.needs_gpu else "")
        for one in BENCHMARKS
        if not all((results / name).exists() for name in one.writes)
    ]
    return ["## Not measured yet\n", *without, ""] if without else []


SECTIONS = (
    Section("Memory of a training step", "memory", sections.memory, "memory_vs_batch.png"),
    Section("Memory on named GPUs", "predicted", sections.predicted, "memory_predicted.png"),
    Section("The engine beside other ways", "engine", sections.engine, "engine_budget.png"),
    Section("The losses, on the CPU in fp32", "loss", sections.loss("cpu", "fp32")),
    Section(
        "The losses, on a GPU in bf16",
        "gpu",
        sections.loss("cuda", "bf16"),
        files=tuple(f"loss_cuda_bf16_{kind}.csv" for kind in ("times", "memory", "errors")),
    ),
    Section("What large batches buy", "negatives", sections.negatives, "negatives.png"),
    Section("One batch on several processes", "distributed", sections.distributed),
    Section("Drop-ins for other libraries", "integrations", sections.integrations),
    Section("From two processes to a thousand", "scaling", sections.scaling, "scaling.png"),
    Section("Resources of the kernels", "kernels", sections.kernels),
    Section("The suite on a GPU", "gpu", sections.gpu),
)
