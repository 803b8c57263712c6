"""The sections of docs/benchmarks.md: for each benchmark its results in full, as Markdown.

Each function takes the folder of the results.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path

from engine import section as engine  # noqa: F401
from loss_figures import section as loss  # noqa: F401
from memory_predicted import section as predicted  # noqa: F401
from memory_vs_batch import section as memory  # noqa: F401
from negatives import section as negatives  # noqa: F401
from report_blocks import scaling_setting
from report_tables import paragraph, read_csv, read_json, table
from results import bytes_text

FOLDER = "../benchmarks/results"
"""Of the results, from the page."""


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
