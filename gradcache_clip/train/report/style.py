"""Style of our figures. Uses matplotlib's figure objects only, so pyplot, its backend and the
caller's settings are unchanged."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from gradcache_clip.train.atomic_file import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, PALE, RIGHT, WRONG = "#222222", "#777777", "#1a9641", "#b8b8b8"
MAIN, OTHERS = "#1f5fbf", ("#d9772b", "#7b5aa6", "#4a9a8d")

_DPI, _MARGIN = 100, 18
# Ships with matplotlib, so pictures look the same on every machine.
_FONT = "DejaVu Sans"
_SETTINGS = {
    "font.family": [_FONT],
    # Captions may contain a $, which would start a formula.
    "text.parse_math": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": PALE,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.titlesize": 11,
}
_MISSING = "\N{WHITE VERTICAL RECTANGLE}"


@contextmanager
def settings() -> Iterator[None]:
    """Apply our style inside the block, regardless of the caller's settings."""
    from matplotlib import style

    with style.context(["default", _SETTINGS]):
        yield


def new_figure(width: int, height: int) -> Figure:
    """Create an empty figure of this size in pixels, with constrained layout."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    margin = _MARGIN / width
    layout = ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.12, rect=(margin, 0, 1 - 2 * margin, 1))
    return Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI, layout=layout)


def write_head(figure: Figure, title: str, legend: str = "") -> None:
    """Write a title above the figure and a legend below it."""
    left = _MARGIN / figure.bbox.width
    figure.suptitle(title, x=left, ha="left", fontsize=14, fontweight="bold")
    figure.supxlabel(legend, x=left, ha="left", fontsize=9.5, color=PALE)


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write a figure in the format of the path's suffix; creates the folder if missing."""
    path = Path(path)
    with replacing(path) as temporary:
        figure.savefig(temporary, format=path.suffix.lstrip(".") or "png")
    return path


def short(text: str, length: int) -> str:
    """Shorten a text to one line of at most `length` characters; missing glyphs become a box.

    Example:
        >>> short("two\\nlines and more", 10)
        'two lines…'
    """
    line = "".join(map(_printable, " ".join(text.split())))
    return line if len(line) <= length else line[: length - 1].rstrip() + "…"


def _printable(sign: str) -> str:
    if ord(sign) in _glyphs() and unicodedata.category(sign) not in ("Cc", "Cf"):
        return sign
    return "" if unicodedata.category(sign)[0] in "CM" else _MISSING


@lru_cache(maxsize=1)
def _glyphs() -> frozenset[int]:
    from matplotlib import font_manager

    return frozenset(font_manager.get_font(font_manager.findfont(_FONT)).get_charmap())
