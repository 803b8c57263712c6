"""The demo, `make demo`: the benefit of large batches in little memory, on real pairs.

Trains the same model twice, with equal data, steps and memory: once with gradient caching, so that
all pairs of a batch compete, and once with plain gradient accumulation, where only those of a chunk
do. Then draws both and prints a table.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from gradcache_clip.losses import ClipLoss
from gradcache_clip.memory import count_cached_step, count_plain_step
from gradcache_clip.train.config import Config
from gradcache_clip.train.config_file import load_config
from gradcache_clip.train.precision import autocast
from gradcache_clip.train.programs import program_of
from gradcache_clip.train.report import (
    RunFigures,
    draw_curves,
    format_bytes,
    metrics_table,
    to_markdown,
)
from gradcache_clip.train.run_folder import RunFolder, existing_run
from gradcache_clip.train.run_pictures import run_curve
from gradcache_clip.train.tokenizer import load_tokenizer

HERE = Path(__file__).parent


def main() -> int:
    options = parse()
    console = Console()
    shards = Path("data") / options.data
    maker = HERE / "data" / f"{options.data}.py"
    if status := subprocess.call([sys.executable, str(maker), str(shards)]):
        return status
    output = options.output or Path("runs") / ("demo" if options.data == "emoji" else "demo-glyphs")
    if options.fresh and RunFolder(output).config.is_file():
        shutil.rmtree(output)
    cached, accumulated = output, output / "accumulated"
    for folder, caching in ((cached, True), (accumulated, False)):
        status = train(shards, folder, caching, options.overrides, console)
        if status:
            return status
    report(cached, accumulated, console, options.results)
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", choices=("emoji", "glyphs"), default="emoji")
    parser.add_argument("--output", type=Path, help="runs/demo, or runs/demo-glyphs for glyphs")
    parser.add_argument("--fresh", action="store_true", help="remove an earlier demo run first")
    parser.add_argument("--results", type=Path, help="folder for demo.json, the table as figures")
    parser.add_argument("overrides", nargs="*", metavar="SECTION.KEY=VALUE")
    return parser.parse_args()


def train(shards: Path, output: Path, caching: bool, overrides: list[str], console: Console) -> int:
    """Train in a separate process, to measure its peak memory; resume an interrupted run."""
    run = RunFolder(output)
    settings = [
        *(f"data.train={shards / 'train'}", f"data.validation={shards / 'validation'}"),
        *(f"train.output={output}", f"train.grad_cache={str(caching).lower()}", *overrides),
    ]
    if (run.read_summary() or {}).get("finished"):
        made_by = existing_run(output)[1].updated({"train.resume": False}).train
        if made_by != load_config(HERE / "demo.yaml", settings).train:
            print(
                f"demo: {output} holds a run with other settings; pass --fresh (FRESH=1)",
                file=sys.stderr,
            )
            return 2
        console.print(f"[dim]{output} is finished; --fresh (make demo FRESH=1) trains again")
        return 0
    console.rule(f"training with negatives from the whole {'batch' if caching else 'chunk'}")
    resume = ["train.resume=true"] if run.has_begun() else []
    command = [sys.executable, "-m", "gradcache_clip.cli", "train", str(HERE / "demo.yaml")]
    return subprocess.call([*command, *settings, *resume])


def report(cached: Path, accumulated: Path, console: Console, results: Path | None = None) -> None:
    runs = [existing_run(path) for path in (cached, accumulated)]
    curves = [run_curve(run, config) for run, config in runs]
    picture = draw_curves(curves, cached / "pictures" / "curves.png")
    cached_step, chunk_step, plain_step = count_memory(*runs[0])
    figures = [
        column(*runs[0], curves[0].name, cached_step, plain_step),
        column(*runs[1], curves[1].name, chunk_step),
    ]
    console.print(metrics_table(figures, title=f"Held-out retrieval, {cached}"))
    console.print(
        f"A step over {runs[0][1].train.batch_size:,} pairs holds "
        f"{format_bytes(cached_step)} of tensors with gradient caching; a plain step would hold "
        f"{format_bytes(plain_step)}, {plain_step / cached_step:.0f} times as much."
    )
    (cached / "table.md").write_text(to_markdown(figures), encoding="utf-8")
    console.print(f"Pictures: {picture.parent}    table: {cached / 'table.md'}")
    if results is not None:
        console.print(f"Figures: {save(figures, results)}")


def save(figures: list[RunFigures], results: Path) -> Path:
    """Write demo.json for benchmarks/report.py, with machine, versions and commit."""
    sys.path.insert(0, str(HERE.parent / "benchmarks"))
    from results import provenance

    record = {"origin": provenance(), "figures": [asdict(each) for each in figures]}
    results.mkdir(parents=True, exist_ok=True)
    path = results / "demo.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return path


def column(
    run: RunFolder, config: Config, name: str, step_bytes: int, plain_bytes: int | None = None
) -> RunFigures:
    summary = run.read_summary()
    assert summary is not None
    whole = config.train.grad_cache
    return RunFigures(
        name=name,
        recall=summary["metrics"],
        candidates=config.train.batch_size if whole else config.train.chunk_size,
        pairs_per_s=summary["pairs_per_s"],
        peak_memory_bytes=summary["peak_memory_bytes"],
        step_memory_bytes=step_bytes,
        plain_memory_bytes=plain_bytes,
    )


def count_memory(run: RunFolder, config: Config) -> tuple[int, int, int]:
    """Count the peak bytes of tensors in a step without running it: cached over the batch, plain
    over a chunk, plain over the batch."""
    import torch

    tokenizer = load_tokenizer(run.tokenizer, config.data.context_length)
    encoder = program_of(config).encoder(tokenizer)
    size = config.data.image_size
    images = torch.zeros(2, 3, size, size, dtype=torch.uint8)
    example = images, tokenizer(["a caption of some words"] * 2, pad_to_context=True)
    batch, chunk = config.train.batch_size, config.train.chunk_size
    with autocast(config.train.precision, torch.device("cpu")):
        cached = count_cached_step(encoder, ClipLoss(impl="tiled"), example, batch, chunk)
        chunked, plain = (
            count_plain_step(encoder, ClipLoss(impl="reference"), example, rows)
            for rows in (chunk, batch)
        )
    return cached.total_bytes, chunked.total_bytes, plain.total_bytes


if __name__ == "__main__":
    sys.exit(main())
