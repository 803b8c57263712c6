"""What is quoted of results: the tables and sentences of blocks, from known figures."""

from __future__ import annotations

import csv
import importlib
import json
import math
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import integrations
import objectives
from loss_figures import contestants, quoted_losses
from loss_rows import ErrorRow, MemoryRow, Results, TimeRow, write_results
from report import BLOCKS, page
from results import ROOT, UNMEASURED, read_rows

import recipes

ORIGIN = {"machine": "a machine", "torch": "2.6", "commit": "abc", "date": "2026-01-01"}
OURS, PLAIN = "gradcache_clip tiled", "plain loss"
QUICK_RIVAL, SMALL_RIVAL = "lightly NTXentLoss", "torch linear_cross_entropy x 2"


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def memory_row(method: str, batch_size: int, measured: int = 0, **more: Any) -> dict[str, Any]:
    return {
        "method": method,
        "batch_size": batch_size,
        "chunk_size": 32 if method == "cached" else batch_size,
        "encoders": "two encoders",
        "cap_bytes": 2**40,
        "status": "measured" if measured else "not run: would take 9 minutes",
        "peak_growth_bytes": measured or "",
        "counted_bytes": 3 * 2**30,
        "cached_over_plain_time": "",
        **ORIGIN,
        **more,
    }


def loss_results(loss: str = "clip", rival_ms: float = 150.0) -> Results:
    """Ours, the plain loss, a rival with a matrix and one without, at known numbers."""

    def head(name: str) -> tuple[Any, ...]:
        return loss, name, "1.0", 8192, 512, "fp32"

    times = {OURS: 100.0, PLAIN: 200.0, QUICK_RIVAL: rival_ms, SMALL_RIVAL: 160.0}
    memory = {OURS: 5e7, PLAIN: 4e9, QUICK_RIVAL: 2e9, SMALL_RIVAL: 1e8}
    return Results(
        times=[
            TimeRow(*head(name), "measured", ms, ms / 100, ms / 110, ms / 90, 80 / ms, 5)
            for name, ms in times.items()
        ],
        memory=[
            replace(MemoryRow(*head(name), "measured", held), batch_size=16384, width=256)
            for name, held in memory.items()
        ],
        errors=[ErrorRow(*head(name), "measured", "gap", 1e-8, 2e-6, 1e-6, 1e-7) for name in times],
    )


def all_losses(**of_clip: Any) -> Results:
    each = [loss_results("clip", **of_clip), loss_results("siglip"), loss_results("nt_xent")]
    together = zip(*(one.all() for one in each), strict=True)
    return Results(*(list(chain.from_iterable(rows)) for rows in together))


def test_the_memory_of_every_method_and_why_one_did_not_run(tmp_path: Path):
    rows = [
        memory_row("plain", 64, 2**30),
        memory_row("cached", 64, 300 * 2**20, cached_over_plain_time=1.084),
        memory_row("plain", 4096),
        memory_row("cached", 4096, 500 * 2**20),
        memory_row("plain", 128, 2**20),
    ]
    write_csv(tmp_path / "memory_vs_batch.csv", rows)
    assert BLOCKS["memory"](tmp_path).splitlines() == [
        "| batch | plain | gradient caching, chunk 32 | time against plain |",
        "|--:|--:|--:|--:|",
        "| 64 | 1.00 GiB | 300 MiB | 1.08 |",
        "| 4,096 | not run; 3.00 GiB counted | 500 MiB |  |",
    ]


def test_the_engine_in_the_order_of_its_titles_and_with_failures(tmp_path: Path):
    def row(gib: float, ratio: float, error: float) -> dict[str, float]:
        return {
            "peak_growth_bytes": gib * 2**30,
            "time_ratio": ratio,
            "gradient_error": error,
            "step_ms": 1.0,
        }

    contestants = {
        "a new one": {"failure": "out of memory"},
        "gradcache-clip": row(1, 1.149, 2e-7),
        "plain step": row(10, 1, 0),
    }
    workload = {"batch_size": 1024, "chunk_size": 8, "contestants": contestants}
    record = {"image-text": workload, "overhead": {"time_ratio": 1.5449}}
    (tmp_path / "engine.json").write_text(json.dumps(record))
    assert BLOCKS["engine-image-text"](tmp_path).splitlines()[2:] == [
        "| plain step | 10.0 GiB | 1.00 |",
        "| **gradient caching** | **1.00 GiB** | **1.15** |",
        "| a new one | out of memory |  |",
    ]
    assert "1,024 pairs, chunks of 8" in BLOCKS["engine-image-text"](tmp_path)
    assert BLOCKS["engine-error"](tmp_path) == "1e-6"
    assert BLOCKS["engine-overhead"](tmp_path) == "1.54 times"


def test_the_losses_beside_the_nearest_libraries(tmp_path: Path):
    origin = {"device": "cpu", "gpu": "", "used_threads": "8", **ORIGIN}
    write_results(all_losses(), origin, tmp_path / "loss_cpu_fp32")
    setting, lines = quoted_losses(tmp_path).split("\n\n")
    assert "8 CPU cores" in setting and "16,384 pairs of width 256" in setting.replace("\n", " ")
    nearest = "1.50 x (lightly), 1.60 x (torch's `linear_cross_entropy`)"
    assert f"| CLIP | **50 MB** | 4.00 GB | 2.00 x ours | {nearest} | 80 % |" in lines
    assert len(lines.splitlines()) == 5


def test_a_faster_rival_is_quoted_as_such_and_a_wrong_one_not(tmp_path: Path):
    origin = {"device": "cpu", "gpu": "", "used_threads": "2", **ORIGIN}
    found = all_losses(rival_ms=50.0)
    write_results(found, origin, tmp_path / "loss_cpu_fp32")
    assert "0.50 x (lightly)" in quoted_losses(tmp_path)
    found.errors = [
        replace(row, dq_error=0.5) if row.contestant == QUICK_RIVAL else row for row in found.errors
    ]
    write_results(found, origin, tmp_path / "loss_cpu_fp32")
    assert "lightly" not in quoted_losses(tmp_path)


def test_all_contestants_with_the_best_in_bold_whoever_it_is():
    lines = contestants("clip", loss_results(rival_ms=50.0), "cpu").splitlines()[2:]
    assert [line.split(" | ")[0] for line in lines] == [
        f"| {name}" for name in (QUICK_RIVAL, OURS, SMALL_RIVAL, PLAIN)
    ]
    assert "| **50.0 ms** | 0.50 (0.45 to 0.56) | 160 % | 2.00 GB |" in lines[0]
    assert "| 100 ms | 1 | 80 % | **50 MB** | 2e-06 |  |" in lines[1]


def test_what_failed_is_told_and_never_best():
    found = loss_results()
    found.times[1] = replace(found.times[1], status="over cap", milliseconds=math.nan)
    found.memory[1] = replace(found.memory[1], status="out of memory", peak_growth_bytes=math.nan)
    found.errors[2] = replace(found.errors[2], dk_error=math.inf)
    lines = {line.split(" | ")[0]: line for line in contestants("clip", found, "cpu").splitlines()}
    assert "| too large |  |  | out of memory |" in lines[f"| {PLAIN}"]
    assert "WRONG in gap (dk not finite)" in lines[f"| {QUICK_RIVAL}"]


def test_what_recipes_came_to_and_which_are_still_to_train(tmp_path: Path):
    assert BLOCKS["recipe-clip"](tmp_path) == UNMEASURED
    assert BLOCKS["recipes"](tmp_path) == UNMEASURED
    took = {"batch_size": 1024, "chunk_size": 16, "steps": 300, "cpu_minutes": 11.6}
    took |= {"peak_memory_bytes": 2**30, **ORIGIN}
    recall = {"image_to_text_recall_at_1": 0.5, "image_to_text_recall_at_1_chance": 0.01}
    recall["image_to_text_mean_rank"] = 7.0
    classes = {"knn_accuracy": 0.4, "probe_accuracy": 0.6, "label_chance": 0.2}
    rare = {"query_to_document_recall_at_1": 0.3, "query_to_document_recall_at_1_chance": 1 / 2059}
    metrics = {"clip": recall, "simclr": classes, "text_embedding": rare}
    records = {name: {**took, "metrics": each} for name, each in metrics.items()}
    (tmp_path / recipes.FILE).write_text(json.dumps(records))
    text = BLOCKS["recipe-clip"](tmp_path)
    assert text.splitlines()[2:4] == ["| R@1 image → text | 50.0 % | 1.0 % |", ""]
    assert "300 steps of 1,024 pairs in chunks of 16; 12 CPU minutes" in text
    lines = BLOCKS["recipe-simclr"](tmp_path)
    assert "| named by a linear classifier | 60.0 % | 20.0 % |" in lines
    assert BLOCKS["recipe-lit"](tmp_path) == UNMEASURED
    *_, last = BLOCKS["recipes"](tmp_path).splitlines()[2:]
    assert last.endswith("| R@1 query → document | 30.0 % | 0.05 % |")
    assert len(BLOCKS["recipes"](tmp_path).splitlines()) == 5


def test_a_known_recipe_is_kept_and_a_failed_one_is_told(tmp_path: Path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(recipes, "run_watched", lambda command, *_: asked.append(command[-2]) or 1)
    metrics = {"image_to_text_recall_at_1": 0.5, "image_to_text_recall_at_1_chance": 0.01}
    took = {"cpu_minutes": 11.6, "peak_memory_bytes": 2**30, "metrics": metrics, **ORIGIN}
    record = {"clip": {**recipes._work("clip")[2], **took}}
    (tmp_path / recipes.FILE).write_text(json.dumps(record))
    folders = ["--results", str(tmp_path), "--images", str(tmp_path / "images")]
    assert recipes.main(["--only", "clip", *folders]) == 0 and asked == []
    assert recipes.main(["--only", "clip", "siglip", *folders]) == 1
    assert asked == ["recipes/siglip.yaml"]
    printed = capsys.readouterr()
    assert "50.0 %" in printed.out and "siglip: no result; see" in printed.err
    record["clip"]["steps"] += 1
    (tmp_path / recipes.FILE).write_text(json.dumps(record))
    assert recipes.main(["--only", "clip", *folders]) == 1, "other settings are another run"


def test_the_loss_phase_of_the_library_with_a_guide_is_no_headline():
    block = BLOCKS["loss-objectives"](ROOT / "benchmarks" / "results")
    (line,) = (each for each in block.splitlines() if "guide" in each)
    assert line.endswith(" x ours |  |")


def test_recall_of_objectives_is_a_mean_over_seeds_beside_the_plain_one(tmp_path: Path):
    from results import append_row

    assert BLOCKS["objectives"](tmp_path) == UNMEASURED
    for objective, recalls in (("plain", (0.2, 0.3)), ("teacher", (0.25, 0.29))):
        for seed, recall in enumerate(recalls):
            row = objectives.Row(objective, seed, 8, 5, 0.001, recall, 0.5, 0.6, 0.1, 0.01)
            append_row(row, tmp_path / objectives.FILE, ORIGIN)
    lines = BLOCKS["objectives"](tmp_path).splitlines()
    assert lines[2] == "| plain | 25.0 ± 7.1 | 50.0 ± 0.0 | 60.0 ± 0.0 |  |"
    assert lines[3] == "| teacher | 27.0 ± 2.8 | 50.0 ± 0.0 | 60.0 ± 0.0 | +5.0, -1.0 |"
    took = " ".join(lines[5:])
    assert "5 steps of 8 triplets" in took and "Before the first step R@1 is 10.0 %" in took


def test_negatives_as_the_pages_quote_them(tmp_path: Path):
    from negatives_training import Row
    from results import append_row

    assert BLOCKS["negatives"](tmp_path) == UNMEASURED
    setting = ("emoji", 16, 0, 1e-3, 300, 1024, 16, "heads")
    few = Row(*setting, 0.1, 0.2, 0.002, 0.002, 500, 500, 30 * 2**20, 2**20, 1.0)
    many = replace(few, block_size=1024, forward_recall=0.15, plain_step_bytes=2**30)
    for seed in (0, 1):
        append_row(replace(few, seed=seed), tmp_path / "negatives.csv", ORIGIN)
        append_row(replace(many, seed=seed), tmp_path / "negatives.csv", ORIGIN)
    _, _, *lines = BLOCKS["negatives"](tmp_path).splitlines()
    assert lines[0] == "| pairs that compete | 16 | 1,024 (the batch) | chance |"
    assert lines[2] == "| emoji, R@1, image → name | 10.0 ± 0.0 % | 15.0 ± 0.0 % | 0.2 % |"
    assert lines[5] == "| emoji, of a plain step over as many pairs | 1 MiB | 1.00 GiB |  |"
    assert BLOCKS["measured-negatives"](tmp_path) == "commit abc, 2026-01-01"


def test_drop_ins_of_a_library_and_those_not_measured(tmp_path: Path):
    ours, others = (BLOCKS[f"integrations-{x}"] for x in ("open_clip", "lightning"))
    assert ours(tmp_path) == UNMEASURED
    row = {"drop_in": "open_clip.ClipLoss", "beside": "its own", "pairs": 256, "loss_error": 0.0}
    row |= {"gradient_error": 3e-7, "time_ratio": 1.5, "step_ms": 1.0, "rounds": 5}
    row |= {"peak_growth_bytes": 2**20, "their_peak_growth_bytes": 2**30, **ORIGIN}
    write_csv(tmp_path / "integrations.csv", [row])
    line = "| `ClipLoss` | its own | 256 | 0 | 3e-07 | 1.50 | 1 MiB | 1.00 GiB |"
    assert ours(tmp_path).splitlines()[2:] == [line]
    assert others(tmp_path) == UNMEASURED
    assert line in page(tmp_path)


def test_drop_ins_that_are_not_measured_again_keep_their_rows(tmp_path: Path, monkeypatch):
    def measured(name: str, options: Any) -> integrations.Row:
        case, pairs = integrations.CASES[name], options.rounds
        return integrations.Row(*case[:2], pairs, 0.0, 0.0, 1.0, 1.0, 5, 1, 1, origin=ORIGIN)

    monkeypatch.setattr(integrations, "_measured", measured)
    for given in (["lightning", "clip", "--rounds=1"], ["siglip", "clip", "--rounds=2"]):
        integrations.main([*given, f"--results={tmp_path}"])
    rows = read_rows(integrations.Row, tmp_path / "integrations.csv")
    names = [each.drop_in.split(".")[1] for each in rows]
    assert names == ["ClipLoss", "SigLipLoss", "cached_step"]
    assert [each.pairs for each in rows] == [2, 2, 1] and rows[0].origin == ORIGIN


def test_the_demo_keeps_the_figures_of_its_table(tmp_path: Path, monkeypatch):
    from gradcache_clip.train.report import RunFigures

    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    demo = importlib.import_module("demo")
    recall = {"image_to_text_recall_at_1": 0.5, "image_to_text_recall_at_1_chance": 0.01}
    path = demo.save([RunFigures("cached", recall, 1024, 5000.0, 3 << 30)], tmp_path / "new")
    assert path == tmp_path / "new" / "demo.json"
    assert all(json.loads(path.read_text())["origin"].get(name) for name in ("machine", "commit"))
    assert "| R@1 image → text | 50.0 % | 1.0 % |" in BLOCKS["demo"](path.parent)


def test_the_page_tells_where_figures_are_from_and_what_is_missing(tmp_path: Path):
    rows = [memory_row("plain", 64, 2**30), memory_row("cached", 64, 2**28)]
    write_csv(tmp_path / "memory_vs_batch.csv", rows)
    text = page(tmp_path)
    assert "## Memory of a training step" in text and "two encoders" in text
    assert "a machine; torch 2.6; commit abc, 2026-01-01. Data:" in text
    assert "memory_vs_batch.png" not in text, "there is no picture"
    missing = text.split("## Not measured yet")[1]
    assert "- engine: `python benchmarks/engine.py`" in missing
    assert "- gpu: `python benchmarks/gpu_suite.py`, on an NVIDIA GPU" in missing
    assert "- memory" not in missing
