"""For the site: a line of code that its box cannot show is a warning, which ends a strict build."""

from __future__ import annotations

import html
import logging
import re
from typing import Any

from mkdocs.structure.pages import Page

COLUMNS = 80
_CODE = re.compile(r"<pre\b.*?</pre>", re.DOTALL)
_TAG = re.compile(r"<[^>]+>")
_LOG = logging.getLogger("mkdocs.hooks.code_width")


def on_page_content(content: str, page: Page, **_: Any) -> None:
    """Look for code that is wider than the column of a page, docstrings included."""
    for block in _CODE.findall(content):
        for line in html.unescape(_TAG.sub("", block)).splitlines():
            if len(line) > COLUMNS:
                _LOG.warning(
                    f"{page.file.src_uri}: expected lines of code of at most {COLUMNS} characters, "
                    f"got {len(line)}; break this one: {line.strip()}"
                )
