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
    """Duration of a full run on two slow cores."""
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
        """Arguments behind the script's name, without --results."""
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


PAIR_LOSSES = tuple(f"loss_cpu_fp32_{kind}.csv" for kind in ("times", "memory", "errors"))
RETRIEVAL, LATE_INTERACTION = "retrieval_losses.csv", "late_interaction.csv"
"""What loss.py writes, for the sections of the page."""
_PEERS = (
    *("cut-cross-entropy", "info-nce-pytorch", "liger-kernel", "lightly", "open_clip_torch"),
    *("pytorch-metric-learning", "sentence-transformers", "pylate", "late-interaction-kernels"),
)
_ONE_KERNEL = ("--architecture", "90", "--dtype", "bfloat16", "--variant", "plain")
_THREE_METHODS = ("--methods", "plain", "checkpointed", "cached")
BENCHMARKS = (
    Benchmark("scaling", "scaling.py", ("scaling.csv",), 0.1, 0.1, quick=()),
    Benchmark(
        "kernels", "kernel_resources.py", ("kernel_resources.csv",), 15, 0.4, quick=_ONE_KERNEL
    ),
    Benchmark("predicted", "memory_predicted.py", ("memory_predicted.csv",), 3, 0.4),
    Benchmark("distributed", "distributed.py", ("distributed.csv",), 5, 1),
    Benchmark(
        *("loss", "loss.py", (*PAIR_LOSSES, RETRIEVAL, LATE_INTERACTION), 55, 2),
        full=("--full",),
        peers=_PEERS,
    ),
    Benchmark(
        *("engine", "engine.py", ("engine.json",), 40, 1.1),
        peers=("sentence-transformers",),
        needs_wordnet=True,
    ),
    Benchmark(
        *("integrations", "integrations.py", ("integrations.csv",), 25, 1),
        quick=("clip", "--quick"),
        needs_wordnet=True,
    ),
    Benchmark(
        *("memory", "memory_vs_batch.py", ("memory_vs_batch.csv",), 35, 1),
        quick=("--quick", *_THREE_METHODS),
        keeps_rows=True,
    ),
    Benchmark("negatives", "negatives.py", ("negatives.csv",), 30, 0.7, keeps_rows=True),
    Benchmark(
        *("gpu", "gpu_suite.py", ("gpu/gpu_suite.json",), 8, 2.5),
        quick=("--only", "smoke"),
        needs_gpu=True,
    ),
    Benchmark(
        *("tuning", "tune_kernels.py", ("tune_kernels.csv",), 10, 0.5),
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
