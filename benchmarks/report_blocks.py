"""What the README and the other pages quote: a function for each marked block, from results alone.

Each takes the folder of the results and returns Markdown; `BLOCKS` gives them their names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loss_figures import BLOCKS as LOSS
from report_integrations import BLOCKS as INTEGRATIONS
from report_integrations import FILE as INTEGRATIONS_FILE
from report_recipes import BLOCKS as RECIPES
from report_tables import UNMEASURED, bold, paragraph, read_csv, read_json, table
from results import bytes_text

if TYPE_CHECKING:
    from negatives_rows import Summary

_FROM_DOCS = "../benchmarks/results"
METHODS = {
    "plain": "plain",
    "checkpointed": "checkpointed",
    "accumulated": "open_clip's accumulation",
    "published": "gradient cache as published",
    "cached": "gradient caching, chunk {chunk_size}",
}
"""Columns of the memory tables."""
_README_BATCHES = (64, 512, 1024, 2048, 4096, 16384, 65536)
IMAGE_TEXT = {
    "plain step": "plain step",
    "gradcache-clip": "**gradient caching**",
    "gradcache-clip, room for all graphs": "gradient caching, room for all graphs",
    "gradient cache as published": "gradient cache as published",
    "open_clip accumulation": "open_clip's accumulation",
}
LEMMA_GLOSS = {
    "gradcache-clip, sorted by length": "**sorted by length**",
    "sentence-transformers": "sentence-transformers' cached loss",
    "gradcache-clip": "in the order they come",
    "gradient cache as published": "gradient cache as published",
}
_NEGATIVES_MEMORY = {
    "cached_step_bytes": "tensors of this step",
    "plain_step_bytes": "of a plain step over as many pairs",
}
_TABLE_HEAD = 2
_SCALING_WORLDS = (8, 128, 1024)


def memory(results: Path) -> str:
    """Peak memory of a step by batch size, some batches."""
    rows = read_csv(results, "memory_vs_batch.csv")
    return memory_table([row for row in rows if int(row["batch_size"]) in _README_BATCHES])


def memory_table(rows: list[dict[str, str]]) -> str:
    """One line a batch size, one column a method, and the time of ours against the plain step."""
    methods = [name for name in METHODS if any(row["method"] == name for row in rows)]
    chunk = max(int(row["chunk_size"]) for row in rows if row["method"] == "cached")
    titles = [METHODS[name].format(chunk_size=chunk) for name in methods]
    lines = []
    rows = sorted(rows, key=lambda row: int(row["batch_size"]))
    for batch, group in groupby(rows, key=lambda row: int(row["batch_size"])):
        found = {row["method"]: row for row in group}
        cells = [memory_cell(found[name]) if name in found else "" for name in methods]
        ratio = found.get("cached", {}).get("cached_over_plain_time", "")
        lines.append([f"{batch:,}", *cells, f"{float(ratio):.2f}" if ratio else ""])
    return table(["batch", *titles, "time against plain"], lines, "r" * (len(titles) + 2))


def memory_cell(row: Mapping[str, str]) -> str:
    """What was measured; else why not, and what was counted."""
    if row["status"] == "measured":
        return bytes_text(float(row["peak_growth_bytes"]))
    return f"{row['status'].split(':')[0]}; {bytes_text(float(row['counted_bytes']))} counted"


def engine_image_text(results: Path) -> str:
    """The engine beside other ways, on images and texts."""
    found = read_json(results, "engine.json")["image-text"]
    return _engine_table("ViT-S (64 px) and a 6-layer BERT", found, IMAGE_TEXT)


def engine_lemma_gloss(results: Path) -> str:
    """The same on texts of unequal length."""
    found = read_json(results, "engine.json")["lemma-gloss"]
    return _engine_table("WordNet lemmas and glosses, MiniLM's shape", found, LEMMA_GLOSS)


def _engine_table(what: str, found: Mapping[str, Any], titles: Mapping[str, str]) -> str:
    contestants = found["contestants"]
    names = [*(name for name in titles if name in contestants)]
    names += [name for name in contestants if name not in titles]
    head = f"{what}, {found['batch_size']:,} pairs, chunks of {found['chunk_size']}"
    lines = [_engine_line(titles.get(name, name), contestants[name]) for name in names]
    return table([head, "peak memory", "time of a step"], lines)


def _engine_line(title: str, row: Mapping[str, Any]) -> list[str]:
    if "failure" in row:
        return [title, row["failure"], ""]
    cells = bytes_text(row["peak_growth_bytes"]), f"{row['time_ratio']:.2f}"
    return [title, *(map(bold, cells) if title.startswith("**") else cells)]


def engine_error(results: Path) -> str:
    """The power of ten below which all gradients differ from those of the first contestant."""
    record = read_json(results, "engine.json")
    rows = [row for name in ("image-text", "lemma-gloss") for row in _contestants(record, name)]
    worst = max(row["gradient_error"] for row in rows if "failure" not in row)
    return f"1e{math.ceil(math.log10(worst))}"


def _contestants(record: Mapping[str, Any], workload: str) -> list[Mapping[str, Any]]:
    return list(record[workload]["contestants"].values()) if workload in record else []


def engine_overhead(results: Path) -> str:
    """Time of a step over linear layers against that of the loop written by hand."""
    return f"{read_json(results, 'engine.json')['overhead']['time_ratio']:.2f} times"


def demo(results: Path) -> str:
    """The table of `make demo`."""
    from gradcache_clip.train.report import RunFigures, to_markdown

    record = read_json(results, "demo.json")
    return to_markdown([RunFigures(**figures) for figures in record["figures"]]).strip()


def negatives(results: Path) -> str:
    """The picture; recall and memory by the number of pairs that compete, a few lines a set."""
    from negatives_rows import read_rows, summaries

    if not (results / "negatives.csv").exists():
        return UNMEASURED
    found = summaries(read_rows(results / "negatives.csv"))
    sets = [list(group) for _, group in groupby(found, key=lambda each: each.first.data)]
    blocks = [each.first.block_size for each in sets[0]]
    batch = sets[0][0].first.batch_size
    head = [f"{m:,}" + (" (the batch)" if m == batch else "") for m in blocks]
    lines = [line for each in sets for line in _negatives_lines(each)]
    picture = f"![Held-out recall against the pairs that compete]({_FROM_DOCS}/negatives.png)"
    return f"{picture}\n\n{table(['pairs that compete', *head, 'chance'], lines)}"


def _negatives_lines(found: Sequence[Summary]) -> list[list[str]]:
    from negatives_experiments import EXPERIMENTS

    first, second = EXPERIMENTS[found[0].first.data].sides
    one, name = found[0].first, found[0].first.data
    ways = {"forward": f"{first} → {second}", "backward": f"{second} → {first}"}
    chances = {"forward": one.forward_chance, "backward": one.backward_chance}
    recalls = [
        [
            f"{name}, R@1, {title}",
            *(f"{100 * each.mean(way):.1f} ± {100 * each.deviation(way):.1f} %" for each in found),
            f"{100 * chances[way]:.2g} %",
        ]
        for way, title in ways.items()
    ]
    held = [
        [f"{name}, {title}", *(bytes_text(getattr(each.first, field)) for each in found), ""]
        for field, title in _NEGATIVES_MEMORY.items()
    ]
    return [*recalls, *held]


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
    "memory": memory,
    "negatives": negatives,
    "engine-image-text": engine_image_text,
    "engine-lemma-gloss": engine_lemma_gloss,
    "engine-error": engine_error,
    "engine-overhead": engine_overhead,
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
