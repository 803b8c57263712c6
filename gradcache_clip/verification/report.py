"""The result of a verification, as data and as a table."""

from __future__ import annotations

from dataclasses import dataclass, field

SHOWN_ROWS = 15

EXACT = "exact"
ROUNDING = "exact (rounding)"
SAME_DRAWS = "exact (same draws)"
SAME_CHUNKS = "exact (same chunks)"
DIFFERS = "differs"

COLUMNS = ("parameter", "shape", "one shot", "same chunks", "verdict")


@dataclass(frozen=True)
class VerifyRow:
    """One gradient of the cached step against those of two plain steps."""

    name: str
    """The parameter's, after its encoder's where there are several."""
    shape: tuple[int, ...]
    error: float
    """|cached - plain| / |plain| in the Euclidean norm, plain: every encoder once over all rows."""
    same_chunks_error: float
    """The same against one graph over the same chunks, with the same random draws."""
    verdict: str
    """"exact"; "exact (rounding)" where the plain step changes as much when it merely sums its rows
    in another order; "exact (same draws)" where random layers draw other numbers in one shot, and
    one graph over the same chunks with the same draws gives the same gradient; "exact (same
    chunks)" where one such graph does, but features depend on how the batch is cut; "differs"."""

    def cells(self) -> tuple[str, ...]:
        """Format the row in the order of `COLUMNS`."""
        shape = " x ".join(map(str, self.shape)) or "scalar"
        error = "other draws" if self.verdict == SAME_DRAWS else _error(self.error)
        return self.name, shape, error, _error(self.same_chunks_error), self.verdict


@dataclass(frozen=True)
class VerifyReport:
    """A cached step beside the one-shot step; `print(report)` shows it as a table."""

    rows: tuple[VerifyRow, ...]
    """One for each trained parameter, the worst first."""
    exact: bool
    """Whether loss and gradients equal those of the one-shot step up to rounding. Random layers
    draw other numbers over chunks; where they alone make a difference, it is whether they equal
    those of one graph over the same chunks with the same draws."""
    reasons: list[str]
    """Why they differ, found by experiment; empty where nothing does."""
    loss: float
    """The cached step's."""
    one_shot_loss: float
    batch_size: int
    """Rows of the first input."""
    chunk_sizes: tuple[int, ...]
    """Rows of the largest chunk of each input."""
    precision: str
    """The dtype that the encoders computed in, the coarsest if there are several."""
    tolerance: float
    """Relative error against the one-shot step that rounding explains in any case."""
    failure: str = ""
    """Why the step is not exact even where its gradients equal the plain step's, for the headline;
    the first reason tells more."""
    notes: list[str] = field(default_factory=list)
    """Findings that make no difference, such as hooks that run once."""
    summed_over: int = 1
    """Processes over which gradients were summed before they were compared, as the caller must do
    where no strategy reduces them."""

    @property
    def headline(self) -> str:
        """The answer in one line."""
        if self.summed_over == 1:
            return self._answer
        return (
            f"{self._answer}, summed over {self.summed_over} processes; a step leaves this "
            "process's part in .grad: sum it over the processes, do not average"
        )

    @property
    def _answer(self) -> str:
        count, verdicts = len(self.rows), [row.verdict for row in self.rows]
        if DIFFERS in verdicts:
            return f"not exact: {verdicts.count(DIFFERS)} of {count} gradients differ"
        over_chunks = "those of one graph over the same chunks"
        if SAME_CHUNKS in verdicts:
            return f"not exact: gradients equal {over_chunks}, not those of the one-shot step"
        if self.failure:
            return f"not exact: {self.failure}"
        if not self.exact:
            return f"not exact: the loss differs, the {count} gradients do not"
        if SAME_DRAWS in verdicts:
            return f"exact: all {count} gradients equal {over_chunks}, with the same random draws"
        return f"exact: all {count} gradients equal those of the one-shot step up to rounding"

    @property
    def setting(self) -> str:
        """One line on the compared batch, chunks and precision."""
        sizes = " and ".join(map(str, dict.fromkeys(self.chunk_sizes)))
        return (
            f"{self.batch_size} rows in chunks of {sizes}, {self.precision}, tolerance "
            f"{self.tolerance:.0e}; loss {self.loss:.6f} cached, {self.one_shot_loss:.6f} one shot"
        )

    def shown(self) -> tuple[list[VerifyRow], str]:
        """Return the rows for a screen, and a line about the others."""
        shown, left = list(self.rows[:SHOWN_ROWS]), self.rows[SHOWN_ROWS:]
        if not left:
            return shown, ""
        verdicts = ", ".join(dict.fromkeys(row.verdict for row in left))
        return shown, f"and {len(left)} more: {verdicts}"

    def __str__(self) -> str:
        rows, rest = self.shown()
        cells = [COLUMNS, *(row.cells() for row in rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        table = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in cells
        ]
        findings = [f"- {finding}" for finding in (*self.reasons, *self.notes)]
        lines = [self.headline, *findings, self.setting, "", *table, rest]
        return "\n".join(lines).rstrip()


def _error(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}"
