"""Files of texts as tables of pyarrow: JSON lines, Parquet, CSV and Arrow.

`datasets` keeps an Arrow copy of them in its cache and maps it into memory.
"""

from __future__ import annotations

import atexit
import glob
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from gradcache_clip.train.config_errors import ConfigError

LINES = (".jsonl", ".json")
_SUFFIXES = (*LINES, ".parquet", ".csv", ".arrow")


def find_text_files(source: str | Path) -> list[Path]:
    """The files that a path, folder or glob stands for, sorted by name.

    They are all JSON lines (.jsonl, .json), all Parquet, all CSV, or all Arrow; the last are in a
    folder that `datasets` saved with `save_to_disk`.

    Raises:
        FileNotFoundError: there is none.
        ConfigError: they are of several kinds.
    """
    path = Path(source)
    if path.is_dir():
        files = _files_of_folder(path)
    elif path.exists():
        files = [path]
    else:
        files = [Path(name) for name in sorted(glob.glob(str(source)))]  # noqa: PTH207
    files = [path for path in files if path.is_file() and path.suffix in _SUFFIXES]
    if not files:
        splits = sorted(path.parent.name for path in Path(source).glob("*/state.json"))
        remedy = f"name one of its folders {splits}" if splits else "check the path"
        raise FileNotFoundError(
            f"{source}: expected a local .jsonl, .json, .parquet, .csv or .arrow file, a folder of "
            f"them or a glob, got none; {remedy}, or make some with "
            "`python examples/data/wordnet.py OUT`"
        )
    if len(kinds := sorted({path.suffix for path in files})) > 1:
        raise ConfigError(
            f"{source}: expected files of one kind, got {' and '.join(kinds)}; name some by a "
            f"glob, such as {path}/*{kinds[0]}"
        )
    return files


def _files_of_folder(folder: Path) -> list[Path]:
    files = sorted(path for path in folder.iterdir() if path.suffix in _SUFFIXES)
    data = [path for path in files if path.suffix != ".json"]
    # Beside other files, .json ones describe the set.
    return data or [path for path in files if path.name != "dataset_dict.json"]


def table_of(files: Sequence[Path]) -> Any:
    """The rows of all files as a table of pyarrow, in a mapped file.

    Raises:
        ConfigError: a file is damaged or of another kind, or unpacks to too much.
    """
    import pyarrow
    from datasets.exceptions import DatasetGenerationError

    kind = ".jsonl" if files[0].suffix in LINES else files[0].suffix
    names = [str(file) for file in files]
    try:
        with _bars_on_terminals_alone():
            return _mapped(names) if kind == ".arrow" else _copied(kind, names)
    except (
        *(DatasetGenerationError, pyarrow.ArrowException),
        *(OSError, ValueError, LookupError, TypeError),
    ) as error:
        reason = error.__cause__ or error
        if isinstance(reason, OSError) and reason.errno:
            # Of the disk or the file system.
            raise reason from None
        raise ConfigError(
            f"{files[0]}: expected {kind} files with the same columns in each, got "
            f"{type(reason).__name__}: {_one_line(reason)}; repair the file, or write it anew"
        ) from error


def _copied(kind: str, names: list[str]) -> Any:
    from datasets import Dataset, Features, Value

    from gradcache_clip.train.data.text_builder import table_of_copy

    if kind == ".jsonl" and not any(Path(name).stat().st_size for name in names):
        # Which the library takes for an error.
        return Dataset.from_dict({"text": []}, features=Features({"text": Value("string")})).data
    return table_of_copy(kind, names, _cache_folder())


def _mapped(names: list[str]) -> Any:
    """Arrow files themselves. Not load_from_disk: its state.json may name files elsewhere."""
    from datasets import Dataset, concatenate_datasets

    table = concatenate_datasets([Dataset.from_file(name) for name in names]).data
    # Else a position could lead out of the file.
    table.validate(full=True)
    return table


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def _cache_folder() -> str:
    """The cache of `datasets`, or a temporary folder where that one cannot be written."""
    from datasets import config

    folder = Path(config.HF_DATASETS_CACHE)
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return str(folder)
    temporary = tempfile.mkdtemp(prefix="gradcache-clip-texts-")
    atexit.register(shutil.rmtree, temporary, ignore_errors=True)
    return temporary


@contextmanager
def _bars_on_terminals_alone() -> Iterator[None]:
    from datasets import disable_progress_bars, enable_progress_bars
    from datasets.utils import are_progress_bars_disabled

    hidden = are_progress_bars_disabled() or sys.stderr.isatty()
    if hidden:
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
