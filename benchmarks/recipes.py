"""Trains every recipe and keeps what came out: held-out figures, curves, memory and time.

    python benchmarks/recipes.py                  # those of recipes/ for which there is data
    python benchmarks/recipes.py --only clip lit

Run it where data/ and weights/ lie as the pages in docs/recipes say. A run that is finished is not
trained again, and one that was stopped goes on. Writes recipes.json into the folder of results, and
the curves of each run into docs/images.
"""

from __future__ import annotations

import os
import re
import resource
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from results import (
    ROOT,
    UNMEASURED,
    bytes_text,
    paragraph,
    parser,
    provenance,
    read_json,
    show,
    table,
    write_json,
)
from watched_process import run_watched

NAMES = (
    *("clip", "siglip", "filip", "beit3", "lit", "coco_drawn"),
    *("moco", "moco_image", "simclr", "text_embedding", "text_distillation"),
)
FILE = "recipes.json"
_SETTINGS = ("batch_size", "chunk_size", "steps")
_RECALL = re.compile(r"([a-z]+)_to_([a-z]+)_recall_at_(\d+)(?:_of_(\d+)_numbers)?")
_LABELS = {
    "knn_accuracy": "named by the 20 nearest training images",
    "probe_accuracy": "named by a linear classifier",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Train what is not finished; 1 if a run failed."""
    made = parser(__doc__)
    made.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, metavar="NAME")
    images = ROOT / "docs" / "images"
    made.add_argument("--images", type=Path, default=images, help="folder of the curves")
    options = made.parse_args(arguments)
    for folder in (options.results / "logs", options.images):
        folder.mkdir(parents=True, exist_ok=True)
    failed = [name for name in options.only if not _trained(name, options.results, options.images)]
    show(all_recipes(options.results))
    for name in failed:
        print(f"{name}: no result; see {_log(name, options.results)}", file=sys.stderr)
    return int(bool(failed))


def _trained(name: str, results: Path, images: Path) -> bool:
    """Train one recipe unless its result is known; whether there is one now."""
    command, run, settings = _work(name)
    records = _records(results)
    known = records.get(name)
    if known and all(known.get(key) == value for key, value in settings.items()):
        return True
    before = _cpu_seconds()
    if run_watched([sys.executable, *command], _log(name, results), ROOT, lambda: None):
        return False
    summary = read_json(ROOT / run / "summary.json")
    records[name] = {
        **settings,
        "cpu_minutes": (_cpu_seconds() - before) / 60,
        "threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)),
        **{key: summary[key] for key in ("loss", "peak_memory_bytes")},
        "metrics": {**summary["metrics"], **_before(run)},
        **provenance(),
    }
    write_json(records, results / FILE, indent=2)
    shutil.copy(ROOT / run / "pictures" / "curves.png", images / f"recipe_{name}.png")
    return True


def _work(name: str) -> tuple[list[str], Path, dict[str, Any]]:
    """Arguments of Python, the folder of the run, and the settings that its result must have."""
    from gradcache_clip.train.config_file import load_config

    config = load_config(ROOT / "recipes" / f"{name}.yaml")
    run = Path(config.train.output)
    resume = f"train.resume={str(run.exists()).lower()}"
    command = ["-m", "gradcache_clip.cli", "train", f"recipes/{name}.yaml", resume]
    settings = {key: getattr(config.train, key) for key in _SETTINGS}
    if config.program == "texts":
        settings["rows"] = "pairs" if len(config.data.text_fields) == 2 else "triplets"
    if getattr(config.train, "chunk_tokens", 0):
        settings.update(chunk_size=config.train.chunk_tokens, chunk_of="tokens")
    return command, run, settings


def _before(run: Path) -> dict[str, float]:
    """Held-out shares before the first step, where the run has looked."""
    from gradcache_clip.train.report.metrics_log import read_log

    rows = [row for row in read_log(ROOT / run) if row["step"] == 0]
    shares = {key: share for row in rows for key, share in row.items() if "_recall_at_" in key}
    return {f"{key}_before": s for key, s in shares.items() if not key.endswith("_chance")}


def _log(name: str, results: Path) -> Path:
    return results / "logs" / f"recipe_{name}.log"


def _cpu_seconds() -> float:
    """CPU time of all processes that were started from here and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


# The tables on the pages of recipes


def recipe(results: Path, name: str) -> str:
    """Held-out figures of a recipe, and the cost of its run."""
    record = _records(results).get(name)
    if record is None:
        return UNMEASURED
    metrics = record["metrics"]
    shares = [key for key in metrics if _label(key)]
    lines = [[_label(key), *_figures(metrics, key)] for key in shares]
    head = ["held out", *(["before"] if _has_before(metrics) else []), "right", "chance"]
    rows, unit = record.get("rows", "pairs"), record.get("chunk_of", "")
    took = (
        f"{record['steps']:,} steps of {record['batch_size']:,} {rows} in chunks of "
        f"{record['chunk_size']:,}{unit and f' {unit}'}; {_minutes(record)} CPU minutes, "
        f"peak memory of the process {bytes_text(record['peak_memory_bytes'])} "
        f"({record['machine']}; torch {record['torch']}, commit {record['commit']}, "
        f"{record['date']}; one seed)."
    )
    return f"{table(head, lines)}\n\n{paragraph(took)}"


def all_recipes(results: Path) -> str:
    """A line for each recipe that was trained."""
    records = _records(results)
    lines = [_line(name, record) for name, record in records.items()]
    head = ["recipe", "batch", "steps", "CPU minutes", "peak memory", "held out", "right", "chance"]
    return table(head, lines, "lrrrrlrr") if lines else UNMEASURED


def _line(name: str, record: Mapping[str, Any]) -> list[str]:
    """With the first of its shares at rank 1."""
    metrics = record["metrics"]
    first = next(key for key in metrics if _label(key))
    return [
        f"`{name}`",
        *(f"{record[key]:,}" for key in ("batch_size", "steps")),
        _minutes(record),
        bytes_text(record["peak_memory_bytes"]),
        *(_label(first), _percent(metrics[first]), _chance(metrics, first)),
    ]


def _minutes(record: Mapping[str, Any]) -> str:
    minutes = record["cpu_minutes"]
    return f"{minutes:.{0 if minutes >= 1.5 else 1}f}"


def _label(key: str) -> str:
    """A share in words; empty for any other figure.

    Example:
        >>> _label("image_to_text_recall_at_5"), _label("image_to_text_recall_at_5_chance")
        ('R@5 image → text', '')
    """
    if found := _RECALL.fullmatch(key):
        first, second, k, width = found.groups()
        return f"R@{k} {first} → {second}" + (f", {width} numbers" if width else "")
    return _LABELS.get(key, "")


def _figures(metrics: Mapping[str, float], key: str) -> list[str]:
    """After training and by chance, and before training if any share has that."""
    before = metrics.get(f"{key}_before")
    first = ([_percent(before)] if before is not None else [""]) if _has_before(metrics) else []
    return [*first, _percent(metrics[key]), _chance(metrics, key)]


def _has_before(metrics: Mapping[str, float]) -> bool:
    return any(key.endswith("_before") for key in metrics)


def _chance(metrics: Mapping[str, float], key: str) -> str:
    # That of all widths is the same.
    whole = key.split("_of_")[0]
    own = metrics.get(f"{whole}_chance", metrics.get("label_chance"))
    return "" if own is None else _percent(own)


def _percent(share: float) -> str:
    # With one decimal a chance among thousands would read 0.0.
    return f"{100 * share:.{2 if 0 < share < 1e-3 else 1}f} %"


def _records(results: Path) -> dict[str, Any]:
    return read_json(results / FILE) if (results / FILE).exists() else {}


BLOCKS: dict[str, Callable[[Path], str]] = {
    "recipes": all_recipes,
    **{
        f"recipe-{name}": partial(recipe, name=name)
        for name in sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))
    },
}


if __name__ == "__main__":
    sys.exit(main())
