"""What run_all.py has finished in a folder of results, in a JSON file beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from catalogue import Benchmark

NAME = "run_all.json"
MEASURED, KEPT = "measured", "measured before"


@dataclass(frozen=True)
class Finished:
    """What came of one benchmark."""

    status: str
    """"measured", or why not."""
    minutes: float = 0.0
    files: tuple[str, ...] = ()
    """What it wrote, by name."""
    origin: Mapping[str, str] = field(default_factory=dict)
    """Arguments, code, machine and versions."""


class State:
    """The finished benchmarks of a folder.

    Args:
        folder: of the results; it must exist.

    Raises:
        ValueError: the state file there is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._all = self._read()

    def of(self, one: Benchmark, origin: Mapping[str, str]) -> Finished | None:
        """What was measured, if it came from the same origin and its files are still there."""
        found = self._all.get(one.name)
        if found is None or found.status != MEASURED or dict(found.origin) != dict(origin):
            return None
        return found if all((self.folder / name).exists() for name in one.writes) else None

    def last_origin(self, one: Benchmark) -> dict[str, str] | None:
        """Of the last run, whatever came of it."""
        return dict(self._all[one.name].origin) if one.name in self._all else None

    def save(self, one: Benchmark, finished: Finished) -> None:
        """Add one; the file is whole at every moment."""
        self._all[one.name] = finished
        record = {name: asdict(each) for name, each in self._all.items()}
        beside = self.folder / f"{NAME}.new"
        beside.write_text(json.dumps(record, indent=1) + "\n")
        beside.replace(self.folder / NAME)

    def _read(self) -> dict[str, Finished]:
        path = self.folder / NAME
        if not path.exists():
            return {}
        try:
            record = json.loads(path.read_text())
            return {
                name: Finished(**{**each, "files": tuple(each["files"])})
                for name, each in record.items()
            }
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{path}: expected what run_all.py wrote, got something else ({error}); "
                "remove it, and everything is measured again"
            ) from error
