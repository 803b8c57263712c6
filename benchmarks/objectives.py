"""What hardness weights, query-query pairs and a teacher change in a text embedder.

    python benchmarks/objectives.py             # four objectives, three seeds
    python benchmarks/objectives.py --seeds 0   # one run of each

Every run is recipes/text_distillation.yaml, with some terms of its loss left out. First weights,
samples, order, steps and learning rate of a seed are the same. Run it where data/ and weights/ lie
as docs/recipes/text-distillation.md says. A run that objectives.csv has already is not made again.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from results import (
    ROOT,
    UNMEASURED,
    append_row,
    origin_words,
    paragraph,
    parser,
    provenance,
    read_csv,
    read_rows,
    show,
    table,
)

FILE = "objectives.csv"
RECIPE = ROOT / "recipes" / "text_distillation.yaml"
_NO_TEACHER = "loss.teacher=", "loss.teacher_weight=0"
_PLAIN = "loss.directions=[query_to_doc]", "loss.hardness_mode=none", "loss.hardness_strength=0"
OBJECTIVES = {
    "plain": (*_PLAIN, *_NO_TEACHER),
    "hardness weights, query-query pairs": _NO_TEACHER,
    "teacher": _PLAIN,
    "all of them": (),
}
"""Name -> what it changes in the recipe."""
_SEEDS = 0, 1, 2
_RECALL = "query_to_document_recall_at_"


@dataclass(frozen=True)
class Row:
    """Held-out recall of one run, at the end and before the first step."""

    objective: str
    seed: int
    batch_size: int
    steps: int
    learning_rate: float
    recall_at_1: float
    recall_at_5: float
    recall_at_10: float
    recall_at_1_before: float
    recall_at_1_chance: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the runs that are missing, and print the table."""
    made = parser(__doc__)
    made.add_argument("--seeds", nargs="+", type=int, default=_SEEDS, help="(0 1 2)")
    made.add_argument("--only", nargs="+", choices=OBJECTIVES, default=[*OBJECTIVES])
    options = made.parse_args(arguments)
    path, origin = options.results / FILE, provenance()
    options.results.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        for objective in options.only:
            if (objective, seed) not in {(row.objective, row.seed) for row in _rows(path)}:
                append_row(_trained(objective, seed), path, origin)
    show(section(options.results))
    return 0


def _rows(path: Path) -> list[Row]:
    return read_rows(Row, path) if path.exists() else []


def _trained(objective: str, seed: int) -> Row:
    from gradcache_clip.train.config_file import load_config
    from gradcache_clip.train.report.metrics_log import read_log
    from gradcache_clip.train.run import train

    run = ROOT / "runs" / "objectives" / f"{[*OBJECTIVES].index(objective)}-{seed}"
    resume = f"train.resume={run.exists()}".lower()
    more = [f"train.seed={seed}", f"train.output={run}", resume, "train.evaluate_every=0"]
    config = load_config(RECIPE, [*OBJECTIVES[objective], *more])
    summary = train(config)
    if not summary.finished:
        raise SystemExit(f"{run}: stopped after step {summary.step}; the same command goes on")
    metrics = summary.metrics
    (before,) = (row for row in read_log(run) if row["step"] == 0)
    recalls = {f"recall_at_{k}": metrics[f"{_RECALL}{k}"] for k in (1, 5, 10)}
    return Row(
        objective,
        seed,
        config.train.batch_size,
        config.train.steps,
        config.optimizer.learning_rate,
        **recalls,
        recall_at_1_before=before[f"{_RECALL}1"],
        recall_at_1_chance=metrics[f"{_RECALL}1_chance"],
    )


# The table


def section(results: Path) -> str:
    """Recall of each objective, and seed by seed how much more than the plain one's."""
    path = results / FILE
    rows = _rows(path)
    if not rows:
        return UNMEASURED
    found = {name: [row for row in rows if row.objective == name] for name in OBJECTIVES}
    plain = {row.seed: row.recall_at_1 for row in found["plain"]}
    lines = [
        [
            name,
            *(_spread([getattr(row, f"recall_at_{k}") for row in of_name]) for k in (1, 5, 10)),
            _gains(of_name, plain) if name != "plain" else "",
        ]
        for name, of_name in found.items()
        if of_name
    ]
    one, seeds = rows[0], len({row.seed for row in rows})
    took = (
        f"{one.steps} steps of {one.batch_size:,} triplets at learning rate {one.learning_rate:g}; "
        f"mean and standard deviation of {seeds} seeds. Before the first step R@1 is "
        f"{100 * one.recall_at_1_before:.1f} %, by chance {100 * one.recall_at_1_chance:.2f} % "
        f"({origin_words(read_csv(path))})."
    )
    head = ["objective", "R@1, %", "R@5, %", "R@10, %", "R@1 above plain, by seed"]
    return f"{table(head, lines)}\n\n{paragraph(took)}"


def _spread(recalls: Sequence[float]) -> str:
    deviation = statistics.stdev(recalls) if len(recalls) > 1 else 0.0
    return f"{100 * statistics.fmean(recalls):.1f} ± {100 * deviation:.1f}"


def _gains(rows: Sequence[Row], plain: dict[int, float]) -> str:
    """Percentage points, with signs."""
    by_seed = sorted((row.seed, row.recall_at_1) for row in rows if row.seed in plain)
    return ", ".join(f"{100 * (recall - plain[seed]):+.1f}" for seed, recall in by_seed)


BLOCKS: dict[str, Callable[[Path], str]] = {"objectives": section}


if __name__ == "__main__":
    raise SystemExit(main())
