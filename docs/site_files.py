"""For the site: what pages link to outside of docs/ comes along, under repository/."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

_LINK = re.compile(r"(?<=\]\()(\.\./[^)#\s]+)")


def on_files(files: Files, config: Any) -> Files:
    """Add every file that a page links to outside of docs/."""
    for page in list(files.documentation_pages()):
        for path in map(_Outside(page, config).path, _LINK.findall(page.content_string)):
            if path is not None and files.get_file_from_path(_place(path)) is None:
                content = (_root(config) / path).read_bytes()
                files.append(File.generated(config, _place(path), content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: Any, **_: Any) -> str:
    """Let links to those files lead there."""
    return _LINK.sub(lambda match: _Outside(page.file, config).link(match[1]), markdown)


class _Outside:
    """Links of one page that leave docs/."""

    def __init__(self, page: File, config: Any) -> None:
        self._folder = posixpath.dirname(page.src_uri)
        self._root = _root(config)

    def path(self, target: str) -> str | None:
        """The file that a link means, from the repository's root; None if inside docs/."""
        path = posixpath.normpath(posixpath.join("docs", self._folder, target))
        inside = path.startswith("docs/") or not (self._root / path).is_file()
        return None if inside else path

    def link(self, target: str) -> str:
        path = self.path(target)
        return target if path is None else posixpath.relpath(_place(path), self._folder or ".")


def _place(path: str) -> str:
    # A source file as a page's attachment would be shown as text; markdown would become a page.
    return f"repository/{path}" + (".txt" if path.endswith((".py", ".md", ".yaml")) else "")


def _root(config: Any) -> Path:
    return Path(config["docs_dir"]).parent
