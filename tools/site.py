"""mkdocs hooks: README.md and its neighbours are pages of the site, and links work there as in the repository.

A page in docs/ may link to any file of the repository. What is no page itself is copied into the site.
"""

import os
import re
from pathlib import Path

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
PAGES = {"README.md": "index.md", **{name: name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")}}
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")


def on_files(files: Files, config) -> Files:
    """Adds the pages of the repository's root, and the files that pages link to."""
    for name, uri in PAGES.items():
        files.append(File.generated(config, uri, content=(ROOT / name).read_text()))
    for file in list(files.documentation_pages()):
        if file.src_uri.endswith(".md"):
            for target in LINK.findall(file.content_string):
                path = _in_repository(file.src_uri, target)
                uri = _in_site(path)
                if files.get_file_from_path(uri) is None and (ROOT / path).is_file():
                    files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page, **_) -> str:
    """Turns links between files of the repository into links between pages of the site."""
    uri = page.file.src_uri
    return LINK.sub(
        lambda link: "](" + os.path.relpath(_in_site(_in_repository(uri, link[1])), os.path.dirname(uri) or "."),
        markdown,
    )


def on_page_content(html: str, page, files: Files, **_) -> str:
    """Does the same for the links of a notebook, which are HTML by now."""

    def link(found: re.Match) -> str:
        path = _in_site(_in_repository(page.file.src_uri, found[1]))
        target = files.get_file_from_path(path)
        if target is None:
            raise PluginError(f"{page.file.src_uri} links to {path}, which is no page")
        return f'href="{target.url_relative_to(page.file)}"'

    return re.sub(r'href="(?!https?:)([^"#]+\.md)"', link, html) if page.file.src_uri.endswith(".ipynb") else html


def _in_repository(uri: str, target: str) -> str:
    """The path from the repository's root of what the page `uri` links to."""
    folder = "." if uri in PAGES.values() else os.path.join("docs", os.path.dirname(uri))
    return os.path.normpath(os.path.join(folder, target))


def _in_site(path: str) -> str:
    """The path in the site of a file of the repository."""
    return PAGES.get(path, path.removeprefix("docs/"))
