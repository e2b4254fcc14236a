"""Sphinx configuration: `make docs`."""

import re
from pathlib import Path
from typing import Any

import cat_kernels

project = "cat-kernels"
author = "The cat-kernels authors"
version = release = cat_kernels.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
highlight_language = "text"  # what has no language is output, not Python
myst_heading_anchors = 3
source_suffix = {".md": "markdown"}
exclude_patterns = ["build"]
suppress_warnings = ["myst.header"]  # benchmarks/README.md begins with a heading of the third level

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["tables.css"]


DOCS = Path(__file__).resolve().parent
# Pages that are files elsewhere in the repository. Each has a stub in docs/, whose place its file takes on the site.
ELSEWHERE = {
    "readme": "README.md",
    "changelog": "CHANGELOG.md",
    "contributing": "CONTRIBUTING.md",
    "evidence/benchmarks": "benchmarks/README.md",
    **{
        f"operators/{path.parent.name}": f"cat_kernels/{path.parent.name}/README.md"
        for path in sorted(DOCS.parent.glob("cat_kernels/*/README.md"))
    },
}
PAGES = {(DOCS.parent / file).resolve(): name for name, file in ELSEWHERE.items()}
LINK = re.compile(r"\]\((?P<file>[^():#\s]+)(?P<anchor>#[^)\s]*)?\)")


def setup(app: Any) -> None:
    app.connect("source-read", _place)
    app.connect("autodoc-process-docstring", _keep_lines)


def _place(app: object, name: str, source: list[str]) -> None:
    """A stub's file in its place. Links lead to pages; what has none (a folder, a source file) loses its link."""
    file = DOCS.parent / ELSEWHERE[name] if name in ELSEWHERE else DOCS / f"{name}.md"
    text = file.read_text(encoding="utf-8") if name in ELSEWHERE else source[0]

    def linked(match: re.Match[str]) -> str:
        target = (file.parent / match["file"]).resolve()
        page = PAGES.get(target)
        if page is None and target.suffix == ".md" and DOCS in target.parents:
            page = str(target.relative_to(DOCS).with_suffix(""))
        if page is not None:
            return f"](/{page}.md{match['anchor'] or ''})"
        return match[0] if DOCS in target.parents or not target.exists() else "]()"

    source[0] = re.sub(r"(?<!!)\[([^][]*)\]\(\)", r"\1", LINK.sub(linked, text))


def _keep_lines(app: object, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Docstrings here are plain text to be read in the source: shown line for line, not parsed as markup."""
    lines[:] = ["::", "", *(f"   {line}" for line in lines), ""]
