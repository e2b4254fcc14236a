"""Sphinx configuration: `make docs`."""

import sys
from pathlib import Path
from typing import Any

import cat_kernels

sys.path.insert(0, str(Path(__file__).parent / "_extensions"))

project = "cat-kernels"
author = "The cat-kernels authors"
version = release = cat_kernels.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode", "command_help", "repository_pages"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
source_suffix = {".md": "markdown"}
exclude_patterns = ["evidence/records", "build"]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
highlight_language = "text"  # what has no language is what a program printed, not Python


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", _keep_lines)


def _keep_lines(app: object, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Docstrings here are plain text to be read in the source: shown line for line, not parsed as markup."""
    lines[:] = ["::", "", *(f"   {line}" for line in lines), ""]
