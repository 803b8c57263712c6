"""For the site: equations become MathML, which browsers draw without a script or a font of ours."""

from __future__ import annotations

import html
import re
from typing import Any

from math_core import LatexError, LatexToMathML
from mkdocs.exceptions import PluginError
from mkdocs.structure.pages import Page

# What arithmatex leaves of $...$ and of ```math.
_EQUATION = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
_LATEX = LatexToMathML(fancy_error=False)


def on_page_content(content: str, page: Page, **_: Any) -> str:
    """Typeset every equation of a page; one that is no LaTeX ends the build."""
    try:
        return _EQUATION.sub(_mathml, content)
    except LatexError as error:
        raise PluginError(f"{page.file.src_uri}: {error}") from error


def _mathml(match: re.Match[str]) -> str:
    tag, latex = match.groups()
    equation = _LATEX.convert_with_local_state(html.unescape(latex), displaystyle=tag == "div")
    return f'<{tag} class="equation">{equation}</{tag}>'
