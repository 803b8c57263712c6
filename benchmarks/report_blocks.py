"""What the README and the other pages quote: a function for each marked block, from results alone.

Each takes the folder of the results and returns Markdown; `BLOCKS` gives them their names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from engine import BLOCKS as ENGINE
from loss_figures import BLOCKS as LOSS
from memory_vs_batch import BLOCKS as MEMORY
from negatives import BLOCKS as NEGATIVES
from report_integrations import BLOCKS as INTEGRATIONS
from report_integrations import FILE as INTEGRATIONS_FILE
from report_recipes import BLOCKS as RECIPES
from report_tables import UNMEASURED, paragraph, read_csv, read_json, table
from results import bytes_text

_FROM_DOCS = "../benchmarks/results"
_TABLE_HEAD = 2
_SCALING_WORLDS = (8, 128, 1024)


def demo(results: Path) -> str:
    """The table of `make demo`."""
    from gradcache_clip.train.report import RunFigures, to_markdown

    record = read_json(results, "demo.json")
    return to_markdown([RunFigures(**figures) for figures in record["figures"]]).strip()


def distributed(results: Path) -> str:
    """A cached step under each engine, by the number of processes."""
    rows = [row for row in read_csv(results, "distributed.csv") if row["part"] == "engine"]
    worlds = list(dict.fromkeys(row["world"] for row in rows))
    head = [
        "engine",
        *(f"time, {world} processes" for world in worlds),
        "collectives",
        *(f"received, {world} processes" for world in worlds),
        "gradient error at most",
    ]
    names = dict.fromkeys(row["contestant"] for row in rows)
    own = {name: [row for row in rows if row["contestant"] == name] for name in names}
    return table(head, [_distributed_line(name, own[name]) for name in names])


def _distributed_line(name: str, rows: Sequence[Mapping[str, str]]) -> list[str]:
    """One engine, its rows by the number of processes."""
    return [
        f"`{name}`" if "Strategy" in name and "," not in name else name,
        *(f"{float(row['time_ratio']):.2f}" for row in rows),
        " / ".join(dict.fromkeys(row["collectives"] for row in rows)),
        *(bytes_text(float(row["bytes_received"])) for row in rows),
        f"{max(float(row['error']) for row in rows):.0e}".replace("e-0", "e-"),
    ]


def scaling(results: Path) -> str:
    """What a process receives and holds for the loss, by the number of processes."""
    head = (
        *("processes", "global batch", "exchange", "features received", "held for the loss"),
        *("loss, share of operations", "exchange, share of a step at most"),
    )
    rows = read_csv(results, "scaling.csv")
    shown = [row for row in rows if row["zero"] == "0" and int(row["world"]) in _SCALING_WORLDS]
    return table(head, map(_scaling_line, shown), align="rrlrrrr")


def _scaling_line(row: Mapping[str, str]) -> list[str]:
    world, sizes = int(row["world"]), ("feature_bytes_received", "loss_memory_bytes")
    return [
        f"{world:,}",
        f"{world * int(row['local_batch']):,}",
        row["exchange"],
        *(bytes_text(float(row[name])) for name in sizes),
        *(f"{100 * float(row[name]):.1f} %" for name in ("loss_share", "exchange_share")),
    ]


def scaling_setting(results: Path) -> str:
    """The models, the rate and the bandwidth that the table assumes."""
    row = read_csv(results, "scaling.csv")[0]
    return paragraph(
        f"ViT-B/16 and BERT-base ({float(row['parameters']) / 1e6:.0f} M parameters, "
        f"{float(row['encoder_gflops']):.0f} GFLOP a pair in all passes), D = {row['width']}, "
        f"{row['chunks']} chunks, {float(row['tflops']):.0f} TFLOP/s and "
        f"{float(row['gigabytes_per_s']):.0f} GB/s a process:"
    )


def scaling_gather(results: Path) -> str:
    """What a gather holds of features at the largest batch."""
    return bytes_text(_gathered_bytes(_largest_gather(results)))


def scaling_loss_share(results: Path) -> str:
    """Share of the loss in the operations at the largest batch."""
    return f"{100 * float(_largest_gather(results)['loss_share']):.0f} %"


def scaling_statistics(results: Path) -> str:
    """What the statistics of all pairs take at the largest batch."""
    row = _largest_gather(results)
    held = int(row["loss_memory_bytes"]) - _gathered_bytes(row)
    pairs = int(row["world"]) * int(row["local_batch"])
    return f"{held // pairs} bytes a pair, {held / 1e6:.0f} MB"


def _largest_gather(results: Path) -> dict[str, str]:
    rows = [row for row in read_csv(results, "scaling.csv") if row["exchange"] == "gather"]
    return max(rows, key=lambda row: int(row["world"]))


def _gathered_bytes(row: Mapping[str, str]) -> int:
    """2 W b D numbers."""
    return 2 * math.prod(int(row[n]) for n in ("world", "local_batch", "width", "feature_bytes"))


def _once_measured(block: Callable[[Path], str]) -> Callable[[Path], str]:
    """A block of drop-ins that says so until one of its own was measured."""

    def text(results: Path) -> str:
        found = block(results) if (results / INTEGRATIONS_FILE).exists() else ""
        return found if len(found.splitlines()) > _TABLE_HEAD else UNMEASURED

    return text


BLOCKS: dict[str, Callable[[Path], str]] = {
    "demo": demo,
    **MEMORY,
    **NEGATIVES,
    **ENGINE,
    **LOSS,
    "distributed": distributed,
    "scaling": scaling,
    "scaling-setting": scaling_setting,
    "scaling-gather": scaling_gather,
    "scaling-loss-share": scaling_loss_share,
    "scaling-statistics": scaling_statistics,
    **RECIPES,
    **{name: _once_measured(block) for name, block in INTEGRATIONS.items()},
}
NOT_YET = {"demo": "demo.json"}
"""Blocks that stay as they are until their file is there."""
