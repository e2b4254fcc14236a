"""The documentation's site: files of the repository that are pages there, links between them, and that it builds."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def conf() -> dict[str, Any]:
    return runpy.run_path(str(DOCS / "conf.py"))


def placed(conf: dict[str, Any], name: str, text: str = "") -> str:
    source = [text]
    conf["_place"](None, name, source)
    return source[0]


def test_every_file_that_is_a_page_has_its_stub(conf: dict[str, Any]) -> None:
    stubs = {
        str(path.relative_to(DOCS).with_suffix(""))
        for path in DOCS.rglob("*.md")
        if path.read_text(encoding="utf-8").startswith("On the site [")
    }
    assert stubs == set(conf["ELSEWHERE"])
    assert len(stubs) > 10
    for name, file in conf["ELSEWHERE"].items():
        assert f"[{file}]" in (DOCS / f"{name}.md").read_text(encoding="utf-8")
        assert placed(conf, name).startswith((ROOT / file).read_text(encoding="utf-8").partition("\n")[0])


def test_links_between_files_become_links_between_pages(conf: dict[str, Any]) -> None:
    text = (
        "[a](../cat_kernels/stem/README.md) [b](data.md#labels) [c](https://x.org) [d](../csrc) x[0](spec) ![e](a.png)"
    )
    expected = "[a](/operators/stem.md) [b](/data.md#labels) [c](https://x.org) d x[0](spec) ![e](a.png)"
    assert placed(conf, "visible-only", text) == expected
    assert "](/data.md)" in placed(conf, "readme")
    assert "](/operators/residual_norm.md)" in placed(conf, "operators/norm_gelu")


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    for module in ("sphinx", "myst_parser", "furo"):
        pytest.importorskip(module)
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", str(DOCS), str(tmp_path / "site")]
    done = subprocess.run(
        [*command, "-d", str(tmp_path / "doctrees")], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    page = (tmp_path / "site" / "fusion.html").read_text(encoding="utf-8")
    assert 'href="operators/stem.html"' in page
    for file in (tmp_path / "site").rglob("*.html"):
        for target in re.findall(r'(?:href|src)="([^"#:?]+\.(?:html|png))[#"?]', file.read_text(encoding="utf-8")):
            assert (file.parent / target).exists(), f"{file.name}: {target}"
