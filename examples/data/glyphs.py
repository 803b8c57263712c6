"""Characters drawn with the fonts that matplotlib ships, captioned with their Unicode names.

python examples/data/glyphs.py data/glyphs
"""

from __future__ import annotations

import io
import random
import sys
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from script import maker_parser, run_maker

from gradcache_clip.train.sources import (
    DataSummary,
    Recipe,
    Sample,
    finished_output,
    track,
    write_splits,
)

IMAGE_SIZE = 64
FONT_SIZE = 40
STYLES_A_CHARACTER = 4
LICENSE = "DejaVu fonts license (Bitstream Vera), SIL OFL 1.1 (STIX); names: Unicode license"

_FONTS = {
    "sans": "DejaVuSans.ttf",
    "sans-bold": "DejaVuSans-Bold.ttf",
    "sans-oblique": "DejaVuSans-Oblique.ttf",
    "serif": "DejaVuSerif.ttf",
    "serif-bold": "DejaVuSerif-Bold.ttf",
    "serif-italic": "DejaVuSerif-Italic.ttf",
    "mono": "DejaVuSansMono.ttf",
    "mono-bold": "DejaVuSansMono-Bold.ttf",
    "stix": "STIXGeneral.ttf",
    "stix-bold": "STIXGeneralBol.ttf",
    "stix-italic": "STIXGeneralItalic.ttf",
}


@dataclass(frozen=True)
class _Glyph:
    character: str
    style: str


def make_glyphs(
    out: Path,
    *,
    characters: int = 1500,
    validation_share: float = 0.15,
    seed: int = 0,
) -> DataSummary:
    """Make shards of drawn characters with captions such as "latin small letter a with acute".

    Needs no download. The split is by character; the group of a sample is its character, so that
    its styles match each other, and the label its Unicode category ("Lu": a capital letter).
    Characters that look the same (Latin and Greek capital A) are taken once.

    Args:
        out: gets train/ and validation/. A complete output is returned at once.
        characters: how many to draw, in up to four styles each.
        validation_share: share of the characters to hold out.
        seed: of the choice of characters and styles, and of the split.

    Raises:
        ValueError: fewer than one character, or `out` holds shards made with other settings.
    """
    if characters < 1:
        raise ValueError(
            f"characters: expected a positive integer, got {characters}; pass e.g. 1500"
        )
    import matplotlib

    recipe = Recipe(
        source=f"glyphs: fonts of matplotlib {matplotlib.__version__}",
        license=LICENSE,
        validation_share=validation_share,
        seed=seed,
        settings={
            "characters": characters,
            "unicode": unicodedata.unidata_version,
            "labels": "categories",
        },
    )
    if summary := finished_output(out, recipe):
        return summary
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    fonts = {
        style: ImageFont.truetype(str(folder / file), FONT_SIZE) for style, file in _FONTS.items()
    }
    covered = {style: _coverage(folder / file) for style, file in _FONTS.items()}
    return write_splits(
        _choose(fonts, covered, characters, seed),
        lambda glyph, split: _sample(glyph, fonts[glyph.style]),
        out,
        split_by=lambda glyph: glyph.character,
        recipe=recipe,
    )


def _coverage(font: Path) -> frozenset[int]:
    """Code points that a font has a glyph for."""
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(str(font)).get_charmap())


def _choose(
    fonts: Mapping[str, ImageFont.FreeTypeFont],
    covered: Mapping[str, frozenset[int]],
    characters: int,
    seed: int,
) -> list[_Glyph]:
    """Some characters, each in some of the styles that have it."""
    draw = random.Random(f"{seed}:glyphs")
    chosen = _distinct(sorted(covered["sans"]), fonts["sans"])
    draw.shuffle(chosen)
    glyphs: list[_Glyph] = []
    for character in chosen[:characters]:
        styles = [style for style in covered if ord(character) in covered[style]]
        draw.shuffle(styles)
        glyphs += [_Glyph(character, style) for style in styles[:STYLES_A_CHARACTER]]
    return glyphs


def _distinct(points: Iterable[int], font: ImageFont.FreeTypeFont) -> list[str]:
    """Drawable characters; of those that look the same, the first."""
    by_shape: dict[bytes, str] = {}
    for character in track([chr(p) for p in points if _is_drawable(chr(p))], "drawing characters"):
        by_shape.setdefault(_draw(character, font).tobytes(), character)
    return list(by_shape.values())


def _is_drawable(character: str) -> bool:
    """Whether it has a name and a shape of its own: a letter, number, mark of text or symbol."""
    return bool(unicodedata.name(character, "")) and unicodedata.category(character)[0] in "LNPS"


def _draw(character: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    image = Image.new("L", (IMAGE_SIZE, IMAGE_SIZE), 255)
    centre = (IMAGE_SIZE / 2, IMAGE_SIZE / 2)
    ImageDraw.Draw(image).text(centre, character, fill=0, font=font, anchor="mm")
    return image


def _sample(glyph: _Glyph, font: ImageFont.FreeTypeFont) -> Sample:
    file = io.BytesIO()
    _draw(glyph.character, font).save(file, "PNG")
    point = f"{ord(glyph.character):04X}"
    caption = unicodedata.name(glyph.character).lower()
    return Sample(
        key=f"{point}-{glyph.style}",
        image=file.getvalue(),
        extension="png",
        captions=(caption,),
        group=point,
        label=unicodedata.category(glyph.character),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script."""
    parser = maker_parser(__doc__, validation_share=0.15)
    text = "how many to draw (default: %(default)s)"
    parser.add_argument("--characters", type=int, default=1500, help=text)
    return run_maker(make_glyphs, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
