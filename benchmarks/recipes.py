"""Trains every recipe and keeps what came out: held-out figures, curves, memory and time.

    python benchmarks/recipes.py                  # those of recipes/ for which there is data
    python benchmarks/recipes.py --only clip lit

Run it where data/ and weights/ lie as the pages in docs/recipes say. A run that is finished is not
trained again, and one that was stopped goes on. Writes recipes.json into the folder of results, and
the curves of each run into docs/images.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from results import provenance
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from watched_process import run_watched

from gradcache_clip.train.config_file import load_config
from gradcache_clip.train.report.metrics_log import read_log

ROOT = Path(__file__).resolve().parents[1]
NAMES = (
    *("clip", "siglip", "filip", "beit3", "lit", "coco_drawn"),
    *("moco", "moco_image", "simclr", "text_embedding"),
)
# What the settings of the file are, and what the run came to.
_SETTINGS = ("batch_size", "chunk_size", "steps")


def main(arguments: Sequence[str] | None = None) -> int:
    """Train what is not finished; 1 if a run failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, metavar="NAME")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--images", type=Path, default=ROOT / "docs" / "images", help="for curves")
    options = parser.parse_args(arguments)
    options.results.mkdir(parents=True, exist_ok=True)
    options.images.mkdir(parents=True, exist_ok=True)
    file = options.results / "recipes.json"
    records: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    failed = [name for name in options.only if not _record(name, records, options)]
    Console().print(_table(records))
    for name in failed:
        print(f"{name}: no result; see {_log(name, options)}", file=sys.stderr)
    return int(bool(failed))


def _record(name: str, records: dict[str, Any], options: argparse.Namespace) -> bool:
    """Train one recipe unless its result is known; whether there is one now."""
    command, run, settings = _work(name)
    known = records.get(name)
    if known and all(known.get(key) == value for key, value in settings.items()):
        return True
    before = _cpu_seconds()
    if run_watched([sys.executable, *command], _log(name, options), ROOT, lambda: None):
        return False
    summary = json.loads((ROOT / run / "summary.json").read_text())
    records[name] = {
        **settings,
        "cpu_minutes": (_cpu_seconds() - before) / 60,
        "threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)),
        **{key: summary[key] for key in ("loss", "peak_memory_bytes")},
        "metrics": {**summary["metrics"], **_before(run)},
        **provenance(),
    }
    (options.results / "recipes.json").write_text(json.dumps(records, indent=2) + "\n")
    shutil.copy(ROOT / run / "pictures" / "curves.png", options.images / f"recipe_{name}.png")
    return True


def _work(name: str) -> tuple[list[str], Path, dict[str, Any]]:
    """What Python runs, the folder of the run, and the settings that its result must have."""
    config = load_config(ROOT / "recipes" / f"{name}.yaml")
    run = Path(config.train.output)
    resume = f"train.resume={str(run.exists()).lower()}"
    command = ["-m", "gradcache_clip.cli", "train", f"recipes/{name}.yaml", resume]
    settings = {key: getattr(config.train, key) for key in _SETTINGS}
    if config.data.text_fields:
        settings["rows"] = "pairs" if len(config.data.text_fields) == 2 else "triplets"
    if config.train.chunk_tokens:
        settings.update(chunk_size=config.train.chunk_tokens, chunk_of="tokens")
    return command, run, settings


def _before(run: Path) -> dict[str, float]:
    """Held-out shares before the first step, where the run has looked."""
    rows = [row for row in read_log(ROOT / run) if row["step"] == 0]
    shares = {key: share for row in rows for key, share in row.items() if "_recall_at_" in key}
    return {f"{key}_before": s for key, s in shares.items() if not key.endswith("_chance")}


def _log(name: str, options: argparse.Namespace) -> Path:
    folder: Path = options.results / "logs"
    folder.mkdir(exist_ok=True)
    return folder / f"recipe_{name}.log"


def _cpu_seconds() -> float:
    """Of all processes that were started from here and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _table(records: dict[str, Any]) -> Table:
    table = Table("recipe", "batch", "steps", "CPU minutes", "held-out figures", box=SIMPLE)
    for name, record in records.items():
        shown = {
            key: share
            for key, share in record["metrics"].items()
            if key.endswith(("_at_1", "accuracy")) or re.search(r"_at_1_of_\d+_numbers$", key)
        }
        figures = ", ".join(f"{key} {share:.1%}" for key, share in shown.items())
        counts = f"{record['batch_size']:,}", str(record["steps"])
        table.add_row(name, *counts, f"{record['cpu_minutes']:.0f}", figures)
    return table


if __name__ == "__main__":
    sys.exit(main())
