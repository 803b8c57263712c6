"""A page in pixels for the pictures: images, frames and texts at exact places.

Matplotlib's figure objects alone are used, without pyplot, so a program's own figures, backend and
settings are left as they are.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL import Image

    Picture = Tensor | numpy.ndarray | Image.Image

DPI = 100
INK, PALE, RIGHT, WRONG = "#222222", "#777777", "#1a9641", "#b8b8b8"
MAIN, OTHERS = "#1f5fbf", ("#d9772b", "#7b5aa6", "#4a9a8d")

# It comes with matplotlib, so a picture looks the same on every machine.
_FONT = "DejaVu Sans"
_SETTINGS = {
    "font.family": [_FONT],
    "font.size": 10,
    "text.usetex": False,
    "text.parse_math": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": PALE,
    "axes.facecolor": "white",
    "axes.titlesize": 11,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "savefig.dpi": "figure",
    "savefig.bbox": None,
    "path.sketch": None,
    "path.effects": [],
}
_INVISIBLE = {"Cc", "Cf", "Cs", "Co", "Cn", "Mn", "Me"}
_MISSING = "\N{WHITE VERTICAL RECTANGLE}"


@contextmanager
def settings() -> Iterator[None]:
    """Our look while a picture is drawn; the program's own settings come back afterwards."""
    from matplotlib import rc_context

    with rc_context(_SETTINGS):
        yield


def new_figure(width: int, height: int) -> Figure:
    """An empty figure of that many pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write a PNG (or what the suffix says), making the folder where it is missing."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


class Page:
    """A figure with one axes in pixels, (0, 0) at the upper left."""

    def __init__(self, width: int, height: int) -> None:
        self.figure = new_figure(width, height)
        self.axes: Axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, width), ylim=(height, 0))
        self.axes.axis("off")
        self._renderer: Any = self.figure.canvas.get_renderer()  # type: ignore[attr-defined]

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: float = 10,
        color: str = INK,
        width: float | None = None,
        align: str = "left",
        weight: str = "normal",
        rotation: float = 0,
    ) -> None:
        """One line, centred on y, clipped with an ellipsis to `width` pixels."""
        text = printable(text)
        if width is not None:
            text = self._clipped(text, width, size, weight)
        self.axes.text(
            x,
            y,
            text,
            fontsize=size,
            color=color,
            fontweight=weight,
            ha=align,
            va="center_baseline" if not rotation else "bottom",
            rotation=rotation,
            rotation_mode="anchor",
        )

    def _clipped(self, text: str, width: float, size: float, weight: str) -> str:
        from matplotlib.font_manager import FontProperties

        font = FontProperties(family=_FONT, size=size, weight=weight)

        def fits(candidate: str) -> bool:
            measured = self._renderer.get_text_width_height_descent(candidate, font, False)
            return bool(measured[0] <= width)

        if fits(text):
            return text
        # The longest start that fits, by halving.
        low, high = 0, len(text)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(_cut(text, middle)) else (low, middle - 1)
        return _cut(text, low)

    def image(self, x: float, y: float, size: int, picture: Picture) -> None:
        """Scaled to fit a square, keeping its shape, in the middle of it."""
        pixels = fitted(picture, size)
        height, width = pixels.shape[:2]
        left, top = round(x + (size - width) / 2), round(y + (size - height) / 2)
        extent = (left, left + width, top + height, top)
        limits = self.axes.get_xlim(), self.axes.get_ylim()
        self.axes.imshow(pixels, extent=extent, interpolation="nearest", aspect="auto")
        self.axes.set(xlim=limits[0], ylim=limits[1])

    def frame(
        self, x: float, y: float, width: float, height: float, color: str, *, line: float = 1
    ) -> None:
        """The outline of a box, `line` pixels wide."""
        from matplotlib.patches import Rectangle

        points = line * 72 / DPI
        self.axes.add_patch(Rectangle((x, y), width, height, fill=False, ec=color, lw=points))

    def bar(self, x: float, y: float, width: float, height: float, color: str) -> None:
        """A filled box."""
        from matplotlib.patches import Rectangle

        self.axes.add_patch(Rectangle((x, y), width, height, color=color, lw=0))


def _cut(text: str, length: int) -> str:
    return text[:length].rstrip() + "…"


def printable(text: str) -> str:
    """On one line; signs that the font lacks become a box, those without a shape go."""
    known = _glyphs()
    kept = []
    for sign in " ".join(text.split()):
        if ord(sign) in known and unicodedata.category(sign) not in ("Cf", "Cc"):
            kept.append(sign)
        elif unicodedata.category(sign) not in _INVISIBLE:
            kept.append(_MISSING)
    return "".join(kept)


@lru_cache(maxsize=1)
def _glyphs() -> frozenset[int]:
    from matplotlib import font_manager

    return frozenset(font_manager.get_font(font_manager.findfont(_FONT)).get_charmap())


def fitted(picture: Picture, size: int) -> numpy.ndarray:
    """uint8 (height, width, 3), the longer side `size` pixels, on white where transparent."""
    from PIL import Image

    image = _as_image(picture)
    scale = size / max(image.size)
    shape = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    # A very small image is shown as the pixels it has; smoothing would invent a blur.
    method = Image.Resampling.NEAREST if scale >= 4 else Image.Resampling.BICUBIC
    return numpy.asarray(image.resize(shape, method))


def _as_image(picture: Picture) -> Image.Image:
    from PIL import Image

    if isinstance(picture, Tensor):
        picture = _array(picture)
    if isinstance(picture, numpy.ndarray):
        picture = Image.fromarray(picture)
    rgba = picture.convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    return Image.alpha_composite(white, rgba).convert("RGB")


def _array(tensor: Tensor) -> numpy.ndarray:
    if tensor.ndim != 3 or tensor.shape[0] not in (1, 3, 4):
        raise ValueError(
            f"images: expected tensors of shape (1, 3 or 4, height, width), got "
            f"{tuple(tensor.shape)}; pass one image at a time, channels first"
        )
    if tensor.is_floating_point():
        tensor = (tensor.detach().nan_to_num().clamp(0, 1) * 255).round().to(torch.uint8)
    array = tensor.cpu().permute(1, 2, 0).numpy()
    return array[..., 0] if array.shape[2] == 1 else array
