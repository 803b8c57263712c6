"""Every benchmark of this folder: how it is run, in full and quickly, and what it writes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

WORDNET = Path("/usr/share/wordnet")


@dataclass(frozen=True)
class Benchmark:
    """One script with its arguments; `--results FOLDER` is added to them."""

    name: str
    script: str
    writes: tuple[str, ...]
    """Data files that are there once it has run; pictures come beside them."""
    minutes: float
    """What a full run takes on two slow cores."""
    quick_minutes: float
    full: tuple[str, ...] = ()
    quick: tuple[str, ...] = ("--quick",)
    peers: tuple[str, ...] = ()
    """Distributions that it compares with; without one of them the others are measured."""
    needs_gpu: bool = False
    needs_wordnet: bool = False
    """For one of its parts, which is left out without."""
    keeps_rows: bool = False
    """Goes on with the rows of an earlier run in its files."""

    def arguments(self, *, quick: bool, wordnet: Path = WORDNET) -> list[str]:
        """What follows the script, but for the folder of the results."""
        elsewhere = self.needs_wordnet and wordnet != WORDNET
        return [
            *(self.quick if quick else self.full),
            *(("--wordnet", str(wordnet)) if elsewhere else ()),
        ]

    def command(self) -> str:
        """The full run, for a person to type.

        Example:
            >>> find("scaling").command()
            'python benchmarks/scaling.py'
        """
        return " ".join(["python", f"benchmarks/{self.script}", *self.full])


BENCHMARKS = (
    Benchmark(
        name="scaling",
        script="scaling.py",
        writes=("scaling.csv",),
        minutes=0.1,
        quick_minutes=0.1,
        quick=(),
    ),
    Benchmark(
        name="kernels",
        script="kernel_resources.py",
        writes=("kernel_resources.csv",),
        minutes=15,
        quick_minutes=0.4,
        quick=("--architecture", "90", "--dtype", "bfloat16", "--variant", "plain"),
    ),
    Benchmark(
        name="predicted",
        script="memory_predicted.py",
        writes=("memory_predicted.csv",),
        minutes=3,
        quick_minutes=0.4,
    ),
    Benchmark(
        name="distributed",
        script="distributed.py",
        writes=("distributed.csv",),
        minutes=5,
        quick_minutes=1,
    ),
    Benchmark(
        name="loss",
        script="loss.py",
        writes=tuple(f"loss_cpu_fp32_{kind}.csv" for kind in ("times", "memory", "errors")),
        minutes=40,
        quick_minutes=1.1,
        full=("--full",),
        peers=(
            *("cut-cross-entropy", "info-nce-pytorch", "liger-kernel", "lightly"),
            *("open_clip_torch", "pytorch-metric-learning", "sentence-transformers"),
        ),
    ),
    Benchmark(
        name="engine",
        script="engine.py",
        writes=("engine.json",),
        minutes=40,
        quick_minutes=1.1,
        peers=("sentence-transformers",),
        needs_wordnet=True,
    ),
    Benchmark(
        name="integrations",
        script="integrations.py",
        writes=("integrations.csv",),
        minutes=10,
        quick_minutes=1,
        quick=("clip", "--quick"),
        needs_wordnet=True,
    ),
    Benchmark(
        name="memory",
        script="memory_vs_batch.py",
        writes=("memory_vs_batch.csv",),
        minutes=35,
        quick_minutes=1.0,
        quick=("--quick", "--methods", "plain", "checkpointed", "cached"),
        keeps_rows=True,
    ),
    Benchmark(
        name="negatives",
        script="negatives.py",
        writes=("negatives.csv",),
        minutes=30,
        quick_minutes=0.7,
        keeps_rows=True,
    ),
    Benchmark(
        name="gpu",
        script="gpu_suite.py",
        writes=("gpu_suite.json",),
        minutes=8,
        quick_minutes=2.5,
        quick=("--only", "tests"),
        needs_gpu=True,
    ),
    Benchmark(
        name="tuning",
        script="tune_kernels.py",
        writes=("tune_kernels.csv",),
        minutes=10,
        quick_minutes=0.5,
        full=("--seconds", "600"),
        quick=("--seconds", "20"),
        needs_gpu=True,
    ),
)


def find(name: str) -> Benchmark:
    """The benchmark of that name.

    Raises:
        ValueError: there is none; the message lists the names.
    """
    for one in BENCHMARKS:
        if one.name == name:
            return one
    names = ", ".join(one.name for one in BENCHMARKS)
    raise ValueError(f"benchmark: expected one of {names}, got {name}")
