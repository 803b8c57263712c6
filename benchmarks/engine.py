"""The gradient-caching engine beside the plain step and the other ways to train large batches.

    python benchmarks/engine.py --wordnet /usr/share/wordnet   # about 40 minutes on two cores
    python benchmarks/engine.py --quick                        # small models, under a minute
    python benchmarks/engine.py --overhead                     # 4 alone; the others stay
    python benchmarks/engine.py --redraw                       # table and picture of the last run

1. image-text: a ViT on 64-pixel images and a six-layer text tower.
2. lemma-gloss: WordNet through one encoder of the shape of MiniLM-L6, both directions (needs
   WordNet 3.0's data files, from the Debian package wordnet-base).
3. budget: time of a step against the memory for retained graphs.
4. overhead: linear layers, beside a two-pass loop written by hand.

Memory is the growth of a fresh process's peak; times are medians of ratios of neighbouring steps
in one process; gradients are compared with the first contestant's. Writes engine.json and
engine_budget.{png,svg} into benchmarks/results (or --results).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from engine_steps import (
    IMAGE_TEXT,
    LEMMA_GLOSS,
    Step,
    Workload,
    encode,
    image_text,
    lemma_gloss,
    ours,
    rows_of,
)
from fresh_process import (
    Limits,
    PeakGrowth,
    call_in_fresh_process,
    distance,
    from_zero,
    interleaved_times_ms,
    median_ratio,
)
from plots import OURS, PALE, files, picture, tidy
from results import (
    bold,
    bytes_text,
    paragraph,
    parser,
    provenance,
    read_json,
    show,
    table,
    write_json,
)
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from gradcache_clip import GradCache
from gradcache_clip.cache.graph_budget import SavedBytes

_FILE = "engine.json"
_WORKLOADS = {"image-text": (512, 32), "lemma-gloss": (2048, 32)}
_OVERHEAD = {"chunks": 64, "chunk_size": 64, "rounds": 300, "seconds": 30.0}
_QUICK = {"image-text": (32, 8), "lemma-gloss": (128, 16)}
CONTESTANTS = {"image-text": IMAGE_TEXT, "lemma-gloss": LEMMA_GLOSS}
_WARM_ROWS = 2
_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
_LINEAR = (64, 32)
_TITLES = {
    "image-text": {
        "plain step": "plain step",
        "gradcache-clip": "**gradient caching**",
        "gradcache-clip, room for all graphs": "gradient caching, room for all graphs",
        "gradient cache as published": "gradient cache as published",
        "open_clip accumulation": "open_clip's accumulation",
    },
    "lemma-gloss": {
        "gradcache-clip, sorted by length": "**sorted by length**",
        "sentence-transformers": "sentence-transformers' cached loss",
        "gradcache-clip": "in the order they come",
        "gradient cache as published": "gradient cache as published",
    },
}
_MODELS = {
    "image-text": "ViT-S (64 px) and a 6-layer BERT",
    "lemma-gloss": "WordNet lemmas and glosses, MiniLM's shape",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, or with --redraw read, then print the tables and draw."""
    options = _parser().parse_args(arguments)
    path = options.results / _FILE
    if options.overhead:
        write_json({**read_json(path), "overhead": _overhead(options)}, path)
    elif not options.redraw:
        write_json({"origin": provenance(), **_measure(options)}, path)
    show(section(options.results))
    if not options.overhead:
        for drawn in draw(read_json(path)["budget"], options.results / "engine_budget"):
            print(drawn)


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    sizes = _QUICK if options.quick else _WORKLOADS
    common = {
        "small": options.quick,
        "wordnet": str(options.wordnet),
        "rounds": 2 if options.quick else options.rounds,
        "seconds": 5.0 if options.quick else options.seconds,
    }
    record: dict[str, Any] = {}
    console = Console(stderr=True)
    with Progress(console=console) as progress:
        bar = progress.add_task("measuring", total=None)
        for workload, (batch_size, chunk_size) in sizes.items():
            if workload == "lemma-gloss" and not (options.wordnet / "data.noun").exists():
                console.print(f"lemma-gloss: no WordNet in {options.wordnet}; see --wordnet")
                continue
            progress.update(bar, description=workload)
            shape = {"batch_size": batch_size, "chunk_size": chunk_size}
            given = {**common, **shape, "workload": workload}
            record[workload] = {**shape, "contestants": _compare(given, options)}
        progress.update(bar, description="budget")
        batch_size, chunk_size = sizes["image-text"]
        shape = {"batch_size": batch_size // 2, "chunk_size": chunk_size}
        given = {**common, **shape, "workload": "image-text"}
        record["budget"] = _values(measure_budgets, given, options)
        progress.update(bar, description="overhead")
        record["overhead"] = _overhead(options)
    return record


def _overhead(options: argparse.Namespace) -> dict[str, Any]:
    """With an origin of its own, for it may be measured alone."""
    return {"origin": provenance(), **_values(measure_overhead, _OVERHEAD, options)}


def _compare(given: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Times and gradients in one process, memory in one each; failures are told."""
    rows = {
        name: _memory({**given, "name": name}, options) for name in CONTESTANTS[given["workload"]]
    }
    names = [name for name, row in rows.items() if "failure" not in row]
    for name, times in _values(measure_times, {**given, "names": names}, options).items():
        rows[name] |= times
    return rows


def _memory(arguments: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    try:
        return _values(measure_memory, arguments, options)
    except RuntimeError as error:
        return {"failure": str(error).strip().splitlines()[-1]}


def _values(function: Any, arguments: dict[str, Any], options: argparse.Namespace) -> Any:
    limits = Limits(seconds=options.timeout, threads=options.threads)
    outcome = call_in_fresh_process(function, arguments, limits)
    if outcome.failure:
        raise RuntimeError(outcome.failure)
    return outcome.values


# Measurements, each in a process of its own


def measure_memory(arguments: dict[str, Any]) -> dict[str, Any]:
    """Peak growth of one contestant's step, after a small step of its own."""
    make = CONTESTANTS[arguments["workload"]][arguments["name"]]
    _forget(make, _workload({**arguments, "batch_size": _WARM_ROWS * arguments["chunk_size"]}))
    work = _workload(arguments)
    step = make(work, arguments["chunk_size"])
    with PeakGrowth() as peak:
        step()
    return {"peak_growth_bytes": peak.bytes}


def measure_times(arguments: dict[str, Any]) -> dict[str, Any]:
    """Interleaved times of the contestants, and how far their gradients are from the first's."""
    contestants, work = CONTESTANTS[arguments["workload"]], _workload(arguments)
    names = arguments["names"]
    steps = [_stepping(work, contestants[name](work, arguments["chunk_size"])) for name in names]
    errors = _errors(work, steps)
    rounds = interleaved_times_ms(steps, arguments["rounds"], arguments["seconds"])
    columns = list(zip(*rounds, strict=True))
    return {
        name: {
            "step_ms": median(times),
            "time_ratio": median_ratio(times, columns[0]),
            "gradient_error": error,
            "rounds": len(rounds),
        }
        for name, times, error in zip(names, columns, errors, strict=True)
    }


def measure_budgets(arguments: dict[str, Any]) -> dict[str, Any]:
    """Time of a cached step against the plain one, for budgets up to all graphs."""
    work, size = _workload(arguments), arguments["chunk_size"]
    whole = _bytes_of_all_graphs(work, size)
    makers = [IMAGE_TEXT["plain step"](work, size)]
    makers += [ours(work, size, memory_budget=int(share * whole * 1.01)) for share in _SHARES]
    steps = [_stepping(work, step) for step in makers]
    rounds = interleaved_times_ms(steps, arguments["rounds"], arguments["seconds"])
    plain, *columns = zip(*rounds, strict=True)
    return {
        str(share): {
            "budget_bytes": int(share * whole),
            "time_ratio": median_ratio(times, plain),
        }
        for share, times in zip(_SHARES, columns, strict=True)
    }


def measure_overhead(arguments: dict[str, Any]) -> dict[str, Any]:
    """A cached step over linear layers beside a two-pass loop written by hand, one thread.

    The loss, which both evaluate, costs next to nothing: a real one would hide the engine.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    encoders = nn.Linear(*_LINEAR), nn.Linear(*_LINEAR)
    rows = arguments["chunks"] * arguments["chunk_size"]
    work = Workload(encoders, (torch.randn(rows, _LINEAR[0]), torch.randn(rows, _LINEAR[0])))
    cache = GradCache(encoders, _dot, chunk_size=arguments["chunk_size"])
    makers = [two_pass_loop(work, arguments["chunk_size"]), lambda: cache(*work.inputs).loss.item()]
    steps = [_stepping(work, step) for step in makers]
    error = _errors(work, steps)[1]
    times = interleaved_times_ms(steps, arguments["rounds"], arguments["seconds"])
    loop, engine = zip(*times, strict=True)
    return {
        "chunks": arguments["chunks"],
        "chunk_size": arguments["chunk_size"],
        "time_ratio": median_ratio(engine, loop),
        "loop_us_per_chunk": 1e3 * median(loop) / (2 * arguments["chunks"]),
        "engine_us_per_chunk": 1e3 * median(engine) / (2 * arguments["chunks"]),
        "gradient_error": error,
        "rounds": len(times),
    }


def two_pass_loop(work: Workload, chunk_size: int) -> Step:
    """The least that gives the gradients: no check, no random state, tensors alone."""

    def step() -> float:
        cut = [given.split(chunk_size) for given in work.inputs]
        with torch.no_grad():
            features = [
                torch.cat([encoder(chunk) for chunk in chunks])
                for encoder, chunks in zip(work.encoders, cut, strict=True)
            ]
        loss = _dot(*(each.requires_grad_() for each in features))
        loss.backward()
        for encoder, chunks, each in zip(work.encoders, cut, features, strict=True):
            for chunk, gradient in zip(chunks, each.grad.split(chunk_size), strict=True):
                encoder(chunk).backward(gradient)
        return loss.item()

    return step


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum() / len(a)


def _workload(arguments: dict[str, Any]) -> Workload:
    if arguments["workload"] == "image-text":
        return image_text(arguments["batch_size"], small=arguments["small"])
    folder = Path(arguments["wordnet"])
    return lemma_gloss(arguments["batch_size"], folder, small=arguments["small"])


def _stepping(work: Workload, step: Step) -> Callable[[], float]:
    return from_zero(step, nn.ModuleList(work.encoders).parameters())


def _errors(work: Workload, steps: list[Callable[[], float]]) -> list[float]:
    gradients = []
    for step in steps:
        step()
        parameters = [p for encoder in work.encoders for p in encoder.parameters()]
        gradients.append([p.grad.clone() for p in parameters if p.grad is not None])
    return [distance(each, gradients[0]) for each in gradients]


def _forget(make: Callable[[Workload, int], Step], work: Workload) -> None:
    """Load libraries and warm the allocator, outside of what is measured."""
    _stepping(work, make(work, _WARM_ROWS))()


def _bytes_of_all_graphs(work: Workload, chunk_size: int) -> int:
    total = 0
    for encoder, given in zip(work.encoders, work.inputs, strict=True):
        saved = SavedBytes(encoder.parameters())
        with saved.counting(True):
            encode(encoder, rows_of(given, slice(0, chunk_size)))
        rows = len(given["input_ids"] if isinstance(given, dict) else given)
        total += saved.total * -(-rows // chunk_size)
    return total


# The section of docs/benchmarks.md, and what the README quotes


def section(results: Path) -> str:
    """Both workloads, and what more memory buys."""
    record = read_json(results / _FILE)
    overhead = record["overhead"]
    text = paragraph(
        "Memory: growth of the peak of a fresh process. Time: median ratio of steps that take "
        f"turns. Every gradient equals that of the first row to within {_error(results)}. "
        f"Over linear layers on one thread, in {overhead['chunks']} chunks of "
        f"{overhead['chunk_size']} rows, a step takes {_times_a_loop(results)} as long as a "
        f"two-pass loop written by hand: {overhead['engine_us_per_chunk']:.0f} microseconds a "
        f"chunk and tower where the loop takes {overhead['loop_us_per_chunk']:.0f}."
    )
    budget = [
        [
            f"{100 * float(share):.0f} %",
            bytes_text(each["budget_bytes"]),
            f"{each['time_ratio']:.2f}",
        ]
        for share, each in record["budget"].items()
    ]
    head = ("`memory_budget`, share of all graphs", "`memory_budget`", "time over the plain step")
    tables = [_workload_table(results, name) for name in _TITLES if name in record]
    return "\n\n".join([*tables, text, table(head, budget, "rrr")])


def _workload_table(results: Path, workload: str) -> str:
    """A step beside other engines, titled contestants first."""
    found, titles = read_json(results / _FILE)[workload], _TITLES[workload]
    contestants = found["contestants"]
    names = [*(name for name in titles if name in contestants)]
    names += [name for name in contestants if name not in titles]
    shape = f"{found['batch_size']:,} pairs, chunks of {found['chunk_size']}"
    lines = [_line(titles.get(name, name), contestants[name]) for name in names]
    return table([f"{_MODELS[workload]}, {shape}", "peak memory", "time of a step"], lines)


def _line(title: str, row: Mapping[str, Any]) -> list[str]:
    if "failure" in row:
        return [title, row["failure"], ""]
    cells = bytes_text(row["peak_growth_bytes"]), f"{row['time_ratio']:.2f}"
    return [title, *(map(bold, cells) if title.startswith("**") else cells)]


def _error(results: Path) -> str:
    """The power of ten below which all gradients differ from those of the first contestant."""
    record = read_json(results / _FILE)
    names = [name for name in _TITLES if name in record]
    rows = [row for name in names for row in record[name]["contestants"].values()]
    worst = max(row["gradient_error"] for row in rows if "failure" not in row)
    return f"1e{math.ceil(math.log10(worst))}"


def _times_a_loop(results: Path) -> str:
    """Time of a step over linear layers against that of the loop written by hand."""
    return f"{read_json(results / _FILE)['overhead']['time_ratio']:.2f} times"


BLOCKS: dict[str, Callable[[Path], str]] = {
    "engine-image-text": partial(_workload_table, workload="image-text"),
    "engine-lemma-gloss": partial(_workload_table, workload="lemma-gloss"),
    "engine-error": _error,
    "engine-overhead": _times_a_loop,
}


def draw(budget: Mapping[str, Mapping[str, float]], stem: Path) -> list[Path]:
    """Time of a step falls to the plain step's as more graphs are kept."""
    points = sorted((100 * float(share), row["time_ratio"]) for share, row in budget.items())
    with picture(stem, (6.4, 4.0), layout="constrained") as figure:
        axes = figure.subplots()
        axes.plot(*zip(*points, strict=True), "o-", color=OURS, linewidth=2)
        axes.axhline(1.0, color=PALE, linestyle="--", linewidth=1)
        axes.annotate("plain step", (100, 1.0), (0, 6), textcoords="offset points", ha="right")
        axes.set_xlabel("memory_budget, % of what all graphs of the batch take")
        axes.set_ylabel("time of a step / plain step")
        axes.set_title("What more memory buys: fewer chunks are run twice", loc="left")
        axes.set_ylim(bottom=0.8)
        tidy(axes)
    return files(stem)


# The command


def _parser() -> argparse.ArgumentParser:
    made = parser(__doc__)
    add = made.add_argument
    add("--wordnet", type=Path, default=Path("/usr/share/wordnet"), help="(default: %(default)s)")
    add("--rounds", type=int, default=5, help="timed rounds (default: %(default)s)")
    add("--seconds", type=float, default=600.0, help="no further round after this (600)")
    add("--timeout", type=float, default=3600.0, help="seconds until a process is ended (3600)")
    add("--threads", type=int, help="threads of torch (all cores)")
    add("--quick", action="store_true", help="small models, under a minute")
    add("--overhead", action="store_true", help="measure 4 alone, and keep the other results")
    add("--redraw", action="store_true", help="measure nothing; show the last run again")
    return made


if __name__ == "__main__":
    main()
