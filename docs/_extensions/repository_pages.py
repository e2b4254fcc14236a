"""Pages that lie elsewhere in the repository, such as the operators' READMEs, as pages of the site as well.

They are copied into `FOLDER` before pages are read, at their own path, and links between them and to the pages here are
written anew. A link that leads to one in the repository so leads to one on the site.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sphinx.application import Sphinx

FOLDER = "repository"
# {what is copied: its title in the list, if not its own}
PAGES = {
    "README.md": "Overview",
    "cat_kernels/*/README.md": None,
    "benchmarks/README.md": None,
    "CONTRIBUTING.md": None,
    "CHANGELOG.md": None,
}
LINK = re.compile(r"(?<=\]\()(?P<path>[^()#\s:]+)(?=(?:#[^()\s]*)?\))")


def pages(root: Path) -> dict[str, str | None]:
    """{path in the repository: title}, in the list's order."""
    found = ((path, title) for pattern, title in PAGES.items() for path in sorted(root.glob(pattern)))
    return {path.relative_to(root).as_posix(): title for path, title in found}


def relinked(text: str, page: str, copied: Iterable[str]) -> str:
    """The text of `page`, a path in the repository, with links as its place on the site needs them."""
    own = posixpath.dirname(page)

    def place(path: str) -> str:
        return path.removeprefix("docs/") if path.startswith("docs/") else f"{FOLDER}/{path}"

    def link(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(own, match["path"]))
        if target not in copied and not target.startswith("docs/"):
            return match[0]
        return posixpath.relpath(place(target), posixpath.dirname(place(page)))

    return LINK.sub(link, text)


def copy(app: Sphinx) -> None:
    root, folder = Path(app.srcdir).parent, Path(app.srcdir, FOLDER)
    copied = pages(root)
    texts = {page: relinked((root / page).read_text(encoding="utf-8"), page, copied) for page in copied}
    names = [page.removesuffix(".md") for page in copied]
    listed = [f"{title} <{name}>" if title else name for name, title in zip(names, copied.values(), strict=True)]
    texts["index.md"] = "\n".join(["# In the repository", "", "```{toctree}", ":maxdepth: 1", *listed, "```", ""])
    for page, text in texts.items():
        path = folder / page
        if not path.exists() or path.read_text(encoding="utf-8") != text:  # an older page is not read again
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    for path in folder.rglob("*.md"):
        if path.relative_to(folder).as_posix() not in texts:
            path.unlink()


def read(app: Sphinx, docname: str, source: list[str]) -> None:
    if not docname.startswith(f"{FOLDER}/"):
        source[0] = relinked(source[0], f"docs/{docname}.md", pages(Path(app.srcdir).parent))


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("builder-inited", copy)
    app.connect("source-read", read)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
