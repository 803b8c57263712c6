"""For the site: a line of code that its box cannot show ends the build."""

from __future__ import annotations

import html
import re
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.pages import Page

COLUMNS = 80
_CODE = re.compile(r"<pre\b.*?</pre>", re.DOTALL)
_TAG = re.compile(r"<[^>]+>")


def on_page_content(content: str, page: Page, **_: Any) -> None:
    """Refuse code wider than the column of a page, in the page itself and in docstrings."""
    for block in _CODE.findall(content):
        for line in html.unescape(_TAG.sub("", block)).splitlines():
            if len(line) > COLUMNS:
                raise PluginError(
                    f"{page.file.src_uri}: expected lines of code of at most {COLUMNS} characters, "
                    f"got {len(line)}; break this one: {line.strip()}"
                )
