"""The tables of loss.py, one a loss, and the sentence that sums one up."""

from __future__ import annotations

import math
from collections.abc import Iterator

from loss_peers import CONTESTANTS, NEEDS_GPU, ours
from loss_rows import INEXACT_ABOVE, WRONG_ABOVE, ErrorRow, MemoryRow, Results, TimeRow
from loss_run import OPERATIONS, TITLES
from loss_truth import CASES
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text


def show_tables(results: Results, origin: dict[str, str], console: Console) -> None:
    """Print a table a loss, then what the columns mean and where the numbers come from."""
    for loss in TITLES:
        if (own := results.of(loss)).memory:
            console.print(_table(loss, own, origin["device"]))
            if absent := [row.contestant for row in own.memory if row.status == NEEDS_GPU]:
                console.print(f"Not here: {', '.join(absent)} ({NEEDS_GPU})")
            for sentence in findings(loss, own, origin["device"]):
                console.print(sentence)
    console.print(_legend(), style="dim")
    console.print("; ".join(_origin_words(origin)), style="dim")


def findings(loss: str, results: Results, device: str) -> Iterator[str]:
    """How fast ours is, against the matrix product and the others, and what memory it takes."""
    times = {row.contestant: row for row in main_times(results)}
    own = times.get(ours(device))
    if own and own.status == "measured":
        rivals = [
            f"{row.time_over_ours:.2f} x as fast as {marked(row.contestant, results)}"
            for row in times.values()
            if "gradcache_clip" not in row.contestant and row.status == "measured"
        ]
        yield (
            f"{own.contestant} at batch {own.batch_size:,}: {own.share_of_matmul:.0%} of the rate "
            f"of a matrix product; {', '.join(rivals) or 'no rival was timed'}"
        )
    for row in results.times:
        if own and row.batch_size != own.batch_size and row.status == "measured":
            yield (
                f"{row.contestant} at batch {row.batch_size:,}: {row.share_of_matmul:.0%} of the "
                f"rate of a matrix product, {row.milliseconds / 1e3:.1f} s"
            )


def main_times(results: Results) -> list[TimeRow]:
    """Those of the batch at which all contestants were timed."""
    smallest = min((row.batch_size for row in results.times), default=0)
    return [row for row in results.times if row.batch_size == smallest]


def memory_at_largest(results: Results) -> dict[str, MemoryRow]:
    """By contestant, at the largest batch tried at all; its status says if that did not run."""
    largest = max((row.batch_size for row in results.memory), default=0)
    found: dict[str, MemoryRow] = {}
    for row in results.memory:
        if row.batch_size == largest or row.contestant not in found or row.status != "measured":
            found[row.contestant] = row
    return found


def bytes_text(nbytes: float) -> str:
    """Such as 4.25 GB or 46 MB, in powers of ten."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.0f} MB"


def time_text(milliseconds: float) -> str:
    """Such as 3.41 s or 327 ms."""
    if milliseconds >= 1e3:
        return f"{milliseconds / 1e3:.2f} s"
    return f"{milliseconds:#.3g} ms".replace(". ", " ")


def marked(name: str, results: Results) -> str:
    """The name, and whether what it computes is something else."""
    wrong = any(row.contestant == name and row.is_wrong() for row in results.errors)
    return f"{name} (WRONG)" if wrong else name


def remark(loss: str, name: str, results: Results) -> str:
    """What is wrong, why it did not run, or how it was called."""
    own = Results(*([row for row in rows if row.contestant == name] for rows in results.all()))
    failed = [row.status for row in (*own.memory[:1], *main_times(own))]
    failed += [row.status for row in own.errors if row.status not in failed]
    words = [f"{row.case} ({_worst_text(row)})" for row in own.errors if row.is_wrong()]
    wrong = f"WRONG in {', '.join(words)}" if words else ""
    failures = [word for word in dict.fromkeys(failed) if word not in ("measured", "over cap")]
    notes = [one.note for one in CONTESTANTS if (one.loss, one.name) == (loss, name)]
    return "; ".join(filter(None, [wrong, *failures, *notes]))


def _worst_text(row: ErrorRow) -> str:
    output, error = row.worst()
    return f"{output} not finite" if math.isinf(error) else f"{output} off by {error:.2g}"


def _table(loss: str, results: Results, device: str) -> Table:
    times, memory = {row.contestant: row for row in main_times(results)}, memory_at_largest(results)
    table = Table(title=_title(loss, results, device), box=SIMPLE, padding=(0, 1))
    largest = max((row.batch_size for row in results.memory), default=0)
    table.add_column("contestant", no_wrap=True)
    for heading in ("time", "time\n/ ours", "of matmul\nrate", f"memory at\n{largest:,}"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name in CASES:
        table.add_column(f"error,\n{name}", justify="right", no_wrap=True)
    table.add_column("note", min_width=28)
    for name in results.contestants():
        if memory[name].status == NEEDS_GPU:
            continue
        errors = {row.case: row for row in results.errors if row.contestant == name}
        style = "bold" if name == ours(device) else ""
        cells = (*_time_cells(times.get(name)), _memory_cell(memory[name], largest))
        verdicts = (_error_cell(errors.get(case)) for case in CASES)
        table.add_row(name, *cells, *verdicts, remark(loss, name, results), style=style)
    return table


def _title(loss: str, results: Results, device: str) -> str:
    time = next(iter(main_times(results)), None)
    where = f"forward and backward on {device}, {results.memory[0].dtype}"
    speed = f"; times at batch {time.batch_size:,}, D = {time.width}" if time else ""
    return f"{TITLES[loss]}, {where}{speed}; memory at D = {results.memory[0].width}"


def _time_cells(row: TimeRow | None) -> tuple[str, str, str]:
    if row is None or row.status != "measured":
        return "too large" if row and row.status == "over cap" else "", "", ""
    ratio = "" if math.isnan(row.time_over_ours) else f"{row.time_over_ours:.2f}"
    return time_text(row.milliseconds), ratio, f"{row.share_of_matmul:.0%}"


def _memory_cell(row: MemoryRow, largest: int) -> str:
    if row.status in ("over cap", "out of memory", "timed out"):
        return row.status
    if row.status != "measured":
        return ""
    at = "" if row.batch_size == largest else f" at {row.batch_size:,}"
    return bytes_text(row.peak_growth_bytes) + at


def _error_cell(row: ErrorRow | None) -> Text:
    if row is None or math.isnan(error := row.worst()[1]):
        return Text("failed" if row else "", style="yellow")
    if row.is_wrong():
        return Text("WRONG", style="bold white on red")
    return Text(f"{error:.0e}", style="yellow" if error > INEXACT_ABOVE else "")


def _legend() -> str:
    counts = ", ".join(
        f"{count} B^2 D for the {TITLES[loss]}" for loss, count in OPERATIONS.items()
    )
    cases = "; ".join(f"{name}: {case.meaning}" for name, case in CASES.items())
    return (
        "Time: forward and backward, median of interleaved rounds in one process. Of matmul rate: "
        f"operations (whatever a contestant really does, {counts}) / time, over the rate of a "
        "matrix product of the same dtype in the same rounds. Memory: growth of the peak over the "
        "inputs in a fresh process. Error: the worst of loss, dq, dk, dscale and dbias against "
        f"fp64, largest difference over largest entry; WRONG above {WRONG_ABOVE:g} or not finite. "
        f"{cases}."
    )


def _origin_words(origin: dict[str, str]) -> Iterator[str]:
    yield origin["gpu"] or origin["machine"]
    yield f"{origin['used_threads']} threads used"
    yield f"torch {origin['torch']}"
    yield f"commit {origin['commit']}, {origin['date']}"
