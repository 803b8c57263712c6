"""What the pages of drop-ins quote: each beside the library's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from report_tables import read_csv, table
from results import bytes_text

FILE = "integrations.csv"
LIBRARIES = ("open_clip", "sentence_transformers", "transformers", "lightning")
_HEAD = (
    *("drop-in", "beside", "pairs", "loss differs by", "gradients differ by"),
    *("their time over ours", "memory", "theirs"),
)


def integrations(results: Path, library: str = "") -> str:
    """A line for each drop-in, or for those of one library."""
    rows = [row for row in read_csv(results, FILE) if row["drop_in"].startswith(library)]
    return table(_HEAD, map(_line, rows), "llrrrrrr")


def _line(row: Mapping[str, str]) -> list[str]:
    return [
        f"`{row['drop_in'].split('.', 1)[1]}`",
        row["beside"],
        f"{int(row['pairs']):,}",
        _power(float(row["loss_error"])),
        _power(float(row["gradient_error"])),
        f"{float(row['time_ratio']):.2f}",
        bytes_text(float(row["peak_growth_bytes"])),
        bytes_text(float(row["their_peak_growth_bytes"])),
    ]


def _power(error: float) -> str:
    return f"{error:.0e}" if error else "0"


BLOCKS: dict[str, Callable[[Path], str]] = {
    "integrations": integrations,
    **{f"integrations-{name}": partial(integrations, library=f"{name}.") for name in LIBRARIES},
}
