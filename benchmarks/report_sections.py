"""The sections of docs/benchmarks.md: for each benchmark its results in full, as Markdown.

Each function takes the folder of the results.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from engine import section as engine  # noqa: F401
from loss_figures import section as loss  # noqa: F401
from memory_predicted import section as predicted  # noqa: F401
from memory_vs_batch import section as memory  # noqa: F401
from report_blocks import scaling_setting
from report_tables import paragraph, read_csv, read_json, table
from results import bytes_text

if TYPE_CHECKING:
    from negatives_rows import Summary

FOLDER = "../benchmarks/results"
"""Of the results, from the page."""


def negatives(results: Path) -> str:
    """Recall by the number of pairs that compete, a table a data set."""
    from negatives_rows import read_rows, summaries

    found = summaries(read_rows(results / "negatives.csv"))
    groups = groupby(found, key=lambda each: each.first.data)
    return "\n\n".join(_negatives_of(name, list(group)) for name, group in groups)


def _negatives_of(name: str, found: Sequence[Summary]) -> str:
    from negatives_experiments import EXPERIMENTS

    experiment, one = EXPERIMENTS[name], found[0].first
    first, second = experiment.sides
    head = (
        *("pairs that compete", "learning rate", f"R@1, %, {first} → {second}"),
        *(f"R@1, %, {second} → {first}", "seeds", "tensors of this step"),
        "of a plain step over as many pairs",
    )
    words = (
        f"Held out: {experiment.held_out}. Towers: {one.towers}. {one.steps:,} steps of "
        f"{one.batch_size:,} pairs. Mean and standard deviation over the seeds; chance "
        f"{100 * one.forward_chance:.2g} % and {100 * one.backward_chance:.2g} %."
    )
    lines = table(head, map(_negatives_line, found), "r" * len(head))
    return f"### {experiment.title}\n\n{paragraph(words)}\n\n{lines}"


def _negatives_line(each: Summary) -> list[str]:
    recalls = [
        f"{100 * each.mean(way):.1f} ± {100 * each.deviation(way):.1f}"
        for way in ("forward", "backward")
    ]
    held = bytes_text(each.first.cached_step_bytes), bytes_text(each.first.plain_step_bytes)
    setting = f"{each.first.block_size:,}", f"{each.first.learning_rate:g}"
    return [*setting, *recalls, str(len(each.rows)), *held]


def integrations(results: Path) -> str:
    """Each drop-in beside what the library itself offers."""
    from report_integrations import integrations as drop_ins

    text = (
        "Both sides of a case have equal weights and inputs. Time: median ratio of steps that take "
        "turns in one process. Memory: growth of the peak of a fresh process."
    )
    return f"{paragraph(text)}\n\n{drop_ins(results)}"


def distributed(results: Path) -> str:
    """What is exchanged, how long it takes, and how exact it is."""
    head = ("", "", "processes", "collectives", "received", "time", "gradient error")
    text = (
        "Collectives and bytes are counted in one step. Times are median ratios to the first way "
        "of a part, over gloo on cores that all processes share: they tell of work, not of a "
        "network. Gradients are compared with one process that has the whole batch."
    )
    lines = map(_distributed_line, read_csv(results, "distributed.csv"))
    return f"{paragraph(text)}\n\n{table(head, lines, 'llrrrrr')}"


def _distributed_line(row: Mapping[str, str]) -> list[str]:
    return [
        *(row[name] for name in ("part", "contestant", "world", "collectives")),
        bytes_text(float(row["bytes_received"])),
        f"{float(row['time_ratio']):.2f}",
        f"{float(row['error']):.0e}" if float(row["error"]) else "0",
    ]


def scaling(results: Path) -> str:
    """Every number of processes, exchange and ZeRO stage."""
    head = (
        *("processes", "exchange", "ZeRO", "features received", "parameters received"),
        *("held for the loss", "held of the model", "exchange, share of a step at most"),
    )
    text = f"Counted for each process, not measured. {scaling_setting(results)}"
    lines = map(_scaling_line, read_csv(results, "scaling.csv"))
    return f"{paragraph(text)}\n\n{table(head, lines, 'rlrrrrrr')}"


def _scaling_line(row: Mapping[str, str]) -> list[str]:
    received = ("feature_bytes_received", "parameter_bytes_received")
    held = ("loss_memory_bytes", "state_memory_bytes")
    return [
        f"{int(row['world']):,}",
        row["exchange"],
        row["zero"],
        *(bytes_text(float(row[name])) for name in (*received, *held)),
        f"{100 * float(row['exchange_share']):.1f} %",
    ]


def kernels(results: Path) -> str:
    """The worst kernel of each architecture and dtype."""
    rows = read_csv(results, "kernel_resources.csv")
    rows.sort(key=_machine)
    lines = [_kernel_line(list(group)) for _, group in groupby(rows, key=_machine)]
    head = (
        *("sm", "dtype", "kernels", "most registers", "bytes spilled", "most shared memory"),
        "matrix units",
    )
    text = f"Compiled to machine code with Triton {rows[0]['triton']}, without a GPU."
    return f"{text}\n\n{table(head, lines, 'rlrrrrl')}"


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


def gpu(results: Path) -> str:
    """What became of each section of the suite."""
    lines = [
        [each["name"], each["outcome"], f"{each['seconds']:.0f}"]
        for each in read_json(results, "gpu_suite.json")["sections"]
    ]
    return table(["section", "outcome", "seconds"], lines, "llr")
